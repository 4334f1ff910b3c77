"""The products with the input that the C++ kernels do on their own: gates_x and d_input on the walk, and weight gradients."""

from __future__ import annotations

import pytest
import torch
from test_backends import Case, check
from tolerances import assert_close_to_reference

from fused_rnn.cells import CELLS

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

from cpp_support import backward_results, make_backward, make_forward, with_weight  # noqa: E402 (after the check)

# (steps, sequences, inputs, units); the last three have steps enough for several blocks of rows.
SIZES = [
    (4, 3, 1, 1),
    (3, 9, 5, 17),
    (2, 50, 33, 16),
    (3, 7, 200, 37),
    (2, 13, 130, 70),
    (9, 24, 21, 33),
    (150, 1, 9, 20),
    (70, 2, 5, 16),
]
every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@every_cell
@every_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_gates_x_and_d_input_are_formed_on_the_walk(
    isa: str, cell: str, dtype: torch.dtype, form: str, size: tuple[int, int, int, int]
) -> None:
    """Two recurrences, whose d_input is one product after the walk, and each way alone, whose is formed on it."""
    steps, batch, inputs, hidden = size
    for reverse in ((False, True), (False,), (True,)):
        check("cpp", cell, Case(steps, batch, inputs, hidden, reverse, form=form, reset=True), dtype)


@every_cell
@every_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_d_input_on_the_walk_is_that_of_the_product(
    isa: str, cell: str, dtype: torch.dtype, reverse: bool, size: tuple[int, int, int, int]
) -> None:
    """Beside it nothing depends on whether d_input is wanted; it is what the gates' gradients and weight_ih give."""
    steps, batch, inputs, hidden = size
    call = make_backward(make_forward(cell, dtype, steps, batch, inputs, hidden, (reverse,))) | {"gates_wanted": True}
    d_input, *others = backward_results(call)
    for actual, expected in zip(others, backward_results(call | {"wanted": [False, *call["wanted"][1:]]}), strict=True):
        assert torch.equal(actual, expected)
    d_gates_x, ih = others[-1][:, 0, -CELLS[cell].num_gates * hidden :], call["weights"][0].ih
    exact = d_gates_x.double() @ ih.double()
    assert_close_to_reference(d_input.flatten(0, 1), d_gates_x @ ih, exact)


# (rows, gates, inputs) of weight_ih's gradient: more rows than a stretch of a product, sizes beside those of its tiles, and in
# the last two more inputs than gates.
GRADIENTS = [(1, 1, 1), (7, 9, 3), (130, 33, 65), (300, 100, 17), (257, 300, 130), (64, 513, 48), (257, 40, 130), (900, 17, 33)]


@every_dtype
@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
def test_weight_gradient(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """What the gates' gradients and the input give, in the same bits for every number of threads."""
    rows, outputs, inputs = shape
    call = make_backward(make_forward("rnn_tanh", dtype, 1, rows, inputs, outputs, (False,), reset=False))
    call |= {"gates_wanted": True, "wanted": [False, False, True, True, True, True, False]}
    results = [backward_results(call | {"threads": threads}) for threads in (1, 2, 3)]
    *_, d_gates = results[0]
    d_gates, x, h = d_gates[:, 0], call["input"][0], call["states"][0][0]
    expected = [d_gates.T @ x, d_gates.T @ h, d_gates.sum(0), d_gates.sum(0)]
    wide = d_gates.double()
    exact = [wide.T @ x.double(), wide.T @ h.double(), wide.sum(0), wide.sum(0)]
    for result in results:
        for actual, first in zip(result, results[0], strict=True):
            assert torch.equal(actual, first)
    for grads in zip(results[0][:-1], expected, exact, strict=True):
        assert_close_to_reference(*grads)


@every_cell
def test_gradients_of_wider_rows_are_the_same(isa: str, cell: str) -> None:
    """Rows of the input and of the weight within wider ones."""
    call = make_backward(make_forward(cell, batch_sizes=torch.tensor([9, 9, 5, 2, 2, 1])))
    wide = torch.nn.functional.pad(call["input"], (3, 2), value=float("nan"))[:, 3:-2]
    weight = torch.nn.functional.pad(call["weights"][0].ih, (1, 1), value=float("nan"))[:, 1:-1]
    assert not wide.is_contiguous()
    moved = backward_results(call | {"input": wide} | with_weight(call, "ih", weight))
    for actual, expected in zip(moved, backward_results(call), strict=True):
        assert torch.equal(actual, expected)


@every_cell
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_no_rows_are_zero(isa: str, cell: str, packed: bool) -> None:
    """No sequence, or none with a step, which keeps the gradient of its state."""
    sizes = torch.zeros(4, dtype=torch.int64) if packed else None
    forward = make_forward(cell, length=4, batch=3 if packed else 0, batch_sizes=sizes)
    call = make_backward(forward)
    count = len(CELLS[cell].states)
    d_input, *rest = backward_results(call)
    assert d_input.shape == forward["input"].shape
    for actual, expected in zip(rest[:count], call["d_states"], strict=True):
        assert torch.equal(actual, expected)
    for grad in rest[count:]:
        assert (grad == 0).all()
