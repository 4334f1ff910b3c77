"""The products with the input that the C++ kernels do on their own: gates_x and d_input on the walk, and weight gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close_to_reference
from torch import Tensor

import fused_rnn
from fused_rnn import dispatch, kernels
from fused_rnn.cells import CELLS, Weights
from fused_rnn.steps import Steps

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")


def kernels_of(cell: str) -> dispatch.Kernels:
    with fused_rnn.backend("cpp"):
        return dispatch.kernels(CELLS[cell], torch.device("cpu"))


def make_steps(kind: str, length: int, batch: int) -> Steps:
    sizes = torch.linspace(batch, 1, length).round().to(torch.int64)
    return Steps(length, batch) if kind == "dense" else Steps.packed(sizes, batch)


# The last three have steps enough for several blocks of rows.
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
every_size = pytest.mark.parametrize(("length", "batch", "inputs", "hidden"), SIZES)


def with_input(cell: str, dtype: torch.dtype, kind: str, size: tuple[int, ...], reverse: tuple[bool, ...]) -> tuple[Any, ...]:
    """Run both ways; return (what the kernels with the input left, what those on gates_x left, in float64 too)."""
    length, batch, inputs, hidden = size
    torch.manual_seed(0)
    kit, steps, d = kernels_of(cell), make_steps(kind, length, batch), len(reverse)
    gates, rows = CELLS[cell].num_gates, steps.rows(0, length).stop
    x = torch.randn(rows, inputs)
    weight_ih = [torch.randn(gates * hidden, inputs) / inputs**0.5 for _ in range(d)]
    weight_hh = [torch.randn(gates * hidden, hidden) / hidden**0.5 for _ in range(d)]
    bias = torch.randn(d, len(CELLS[cell].bias) * hidden)
    reset = torch.rand(rows) < 0.3
    h_0 = [torch.randn(d, batch, hidden) for _ in CELLS[cell].states]

    def run(apart: bool, kind: torch.dtype) -> list[Tensor]:
        ih, hh = [w.to(kind) for w in weight_ih], [w.to(kind) for w in weight_hh]
        tape = torch.full((rows, d, len(CELLS[cell].tape) * hidden), float("nan"), dtype=kind)
        out = tape if CELLS[cell].tape_is_out else torch.empty(rows, d, hidden, dtype=kind)
        states = tuple(state.to(kind, copy=True) for state in h_0)
        arguments = (tape, out, states)
        if apart:
            for i in range(d):
                tape[:, i, : gates * hidden] = x.to(kind) @ ih[i].T
            kit.forward(*arguments, kit.pack(hh, None, steps, False), bias.to(kind), steps, reverse, reset, True)
        else:
            packed = kit.pack(hh, None, steps, False, ih)
            kit.forward(*arguments, packed, bias.to(kind), steps, reverse, reset, True, x.to(kind))
        return [tape, out, *states]

    return run(False, dtype), run(True, dtype), run(True, torch.float64)


@every_cell
@every_dtype
@every_size
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_gates_x_are_formed_on_the_walk(
    isa: str, cell: str, dtype: torch.dtype, kind: str, length: int, batch: int, inputs: int, hidden: int
) -> None:
    found = with_input(cell, dtype, kind, (length, batch, inputs, hidden), (False, True))
    for actual, expected, exact in zip(*found, strict=True):
        assert_close_to_reference(actual, expected, exact)


@every_cell
def test_without_a_backward_there_is_no_tape(isa: str, cell: str) -> None:
    torch.manual_seed(0)
    kit, steps, hidden = kernels_of(cell), Steps(5, 9), 37
    gates = CELLS[cell].num_gates
    x, ih, hh = torch.randn(45, 11), torch.randn(gates * hidden, 11), torch.randn(gates * hidden, hidden) / 6
    results = []
    for keep in (True, False):
        out = torch.empty(45, 1, hidden)
        blocks = len(CELLS[cell].tape)
        tape = out if CELLS[cell].tape_is_out else torch.empty(45, 1, blocks * hidden) if keep else None
        states = tuple(torch.ones(1, 9, hidden) for _ in CELLS[cell].states)
        kit.forward(tape, out, states, kit.pack([hh], None, steps, False, [ih]), None, steps, (False,), None, keep, x)
        results.append([out, *states])
    for kept, dropped in zip(*results, strict=True):
        assert torch.equal(kept, dropped)


@every_cell
@every_dtype
@every_size
@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("reverse", [False, True])
def test_d_input_is_formed_on_the_walk(
    isa: str, cell: str, dtype: torch.dtype, kind: str, reverse: bool, length: int, batch: int, inputs: int, hidden: int
) -> None:
    """In two chunks of time, into rows of a wider buffer; nothing else changes."""
    torch.manual_seed(0)
    kit, steps = kernels_of(cell), make_steps(kind, length, batch)
    row, gates = CELLS[cell], CELLS[cell].num_gates
    rows = steps.rows(0, length).stop
    ih, hh = torch.randn(gates * hidden, inputs, dtype=dtype), torch.randn(gates * hidden, hidden, dtype=dtype) / hidden**0.5
    tape = torch.rand(rows, 1, len(row.tape) * hidden, dtype=dtype)
    out = tape if row.tape_is_out else torch.rand(rows, 1, hidden, dtype=dtype)
    d_out = torch.randn(rows, 1, hidden, dtype=dtype)
    d_cells = torch.randn(rows, 1, hidden, dtype=dtype) if row.cell_state is not None else None
    reset = torch.rand(rows) < 0.3
    states_0 = tuple(torch.randn(1, batch, hidden, dtype=dtype) for _ in row.states)

    def run(apart: bool) -> list[Tensor]:
        d_gates = torch.empty(rows, 1, len(row.d_gates) * hidden, dtype=dtype)
        d_states = tuple(torch.ones_like(state) for state in states_0)
        wide = torch.full((rows, inputs + 3), float("nan"), dtype=dtype)
        packed = kit.pack([hh], None, steps, True, *(() if apart else ([ih],)))
        cuts = [(0, 1), (1, length)]
        for begin, end in cuts if reverse else reversed(cuts):
            where = steps.rows(begin, end)
            given = (
                d_gates[where],
                d_states,
                d_out,
                d_cells,
                tape,
                out,
                states_0,
                packed,
                steps,
                begin,
                end,
                (reverse,),
                reset,
            )
            kit.backward(*given, *(() if apart else (wide[where, :inputs],)))
        d_x = d_gates[:, 0, -gates * hidden :]
        if apart:
            wide[:, :inputs] = d_x @ ih
        assert wide[:, inputs:].isnan().all()
        return [d_gates, *d_states, wide[:, :inputs], d_x.double() @ ih.double()]

    ours, expected = run(False), run(True)
    for actual, same in zip(ours[:-2], expected[:-2], strict=True):
        assert torch.equal(actual, same)
    assert_close_to_reference(ours[-2], expected[-2], expected[-1])


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 9, 3), (130, 33, 65), (300, 100, 17), (257, 300, 130), (64, 513, 48)])
@pytest.mark.parametrize("add", [False, True])
def test_weight_gradient(isa: str, dtype: torch.dtype, shape: tuple[int, int, int], add: bool) -> None:
    """Factors in wider buffers, the inputs in parts; the same bits for every number of threads."""
    rows, outputs, inputs = shape
    torch.manual_seed(0)
    d_gates = torch.randn(rows, outputs + 5, dtype=dtype)[:, 2 : outputs + 2]
    x = torch.randn(rows, inputs + 1, dtype=dtype)[:, :inputs]
    cut = rows // 3
    start = torch.randn(outputs, inputs + 2, dtype=dtype)
    start_bias = torch.randn(outputs, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        d_weight, d_bias = start.clone(), start_bias.clone()
        parts = [x[:cut], x[cut:]]
        _C.weight_gradient(d_gates, parts, d_weight[:, :inputs], d_bias, add, threads)
        assert torch.equal(d_weight[:, inputs:], start[:, inputs:])
        results.append((d_weight[:, :inputs], d_bias))
    expected, expected_bias = start.clone()[:, :inputs], start_bias.clone()
    kernels.weight_gradient(d_gates, [x[:cut], x[cut:]], expected, expected_bias, add)
    exact = d_gates.double().T @ x.double() + (start[:, :inputs].double() if add else 0)
    exact_bias = d_gates.double().sum(0) + (start_bias.double() if add else 0)
    for d_weight, d_bias in results:
        assert torch.equal(d_weight, results[0][0])
        assert torch.equal(d_bias, results[0][1])
        assert_close_to_reference(d_weight, expected, exact)
        assert_close_to_reference(d_bias, expected_bias, exact_bias)


def test_weight_gradient_of_no_rows_is_zero() -> None:
    d_weight = torch.full((3, 4), torch.nan)
    _C.weight_gradient(torch.empty(0, 3), [], d_weight, None, False, 2)
    assert (d_weight == 0).all()


WRONG_GRADIENTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "dtype": lambda call: {"d_gates": call["d_gates"].double()},
    "integers": lambda call: {"d_gates": call["d_gates"].int()},
    "rows of inputs": lambda call: {"inputs": [call["inputs"][0][:-1]]},
    "columns of inputs": lambda call: {"inputs": [call["inputs"][0][:, :-1]]},
    "no inputs": lambda call: {"inputs": []},
    "1D inputs": lambda call: {"inputs": [call["inputs"][0][0]]},
    "1D d_gates": lambda call: {"d_gates": call["d_gates"][0]},
    "rows of d_weight": lambda call: {"d_weight": call["d_weight"][:-1]},
    "strides of d_weight": lambda call: {"d_weight": call["d_weight"].repeat_interleave(2, 1)[:, ::2]},
    "length of d_bias": lambda call: {"d_bias": call["d_bias"][:-1]},
    "d_weight within inputs": lambda call: {"d_weight": call["inputs"][0][:5]},
    "d_bias within d_gates": lambda call: {"d_bias": call["d_gates"][0]},
    "no threads": lambda call: {"threads": 0},
}


@pytest.mark.parametrize("case", WRONG_GRADIENTS)
def test_wrong_weight_gradients_raise(case: str) -> None:
    call = {
        "d_gates": torch.ones(6, 5),
        "inputs": [torch.ones(6, 4)],
        "d_weight": torch.empty(5, 4),
        "d_bias": torch.empty(5),
        "add": False,
        "threads": 1,
    }
    _C.weight_gradient(**call)
    assert (call["d_weight"] == 6).all()
    with pytest.raises(ValueError, match="expected"):
        _C.weight_gradient(**call | WRONG_GRADIENTS[case](call))


def test_wrong_inputs_raise() -> None:
    kit, steps = kernels_of("lstm"), Steps(2, 4)
    ih, hh, x = torch.randn(12, 5), torch.randn(12, 3), torch.randn(8, 5)
    tape, out = torch.empty(8, 1, 15), torch.empty(8, 1, 3)
    states = (torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))
    good, plain = kit.pack([hh], None, steps, False, [ih]), kit.pack([hh], None, steps, False)
    in_columns = kit.pack([hh], None, Steps(2, 1), False)
    assert in_columns.ih is None

    def run(tape: Tensor | None, packed: object, input: Tensor | None, keep: bool = True) -> None:
        kit.forward(tape, out, states, packed, None, steps, (False,), None, keep, input)

    run(tape, good, x)
    run(None, good, x, keep=False)
    wrong: list[tuple[Any, ...]] = [
        (tape, good, None),
        (tape, plain, x),
        (tape, in_columns._replace(ih=good.ih), x),
        (tape, good._replace(ih=_C.Packed("lstm", [ih], False, "input", True, 1)), x),
        (None, good, x),
        (None, plain, None, False),
        (tape, good, x[:-1]),
        (tape, good, x[:, :-1]),
        (tape, good, x.double()),
        (tape, good, tape[:, 0, :5]),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="expected"):
            run(*arguments)


def test_the_choice_follows_rows_and_weights() -> None:
    takes = kernels_of("lstm").takes_input
    assert takes is not None
    small, large = (Weights(torch.empty(4 * h, h), torch.empty(4 * h, h)) for h in (64, 1024))
    assert takes(Steps(8, 8), small)
    assert takes(Steps(64, 1), small)
    assert not takes(Steps(9, 7), small)
    assert not takes(Steps(8, 8), large)
    assert takes(Steps(8, 32), large)
    assert not takes(Steps(1, 512), small), "a single step has no walk"
    assert not takes(Steps.packed(torch.tensor([60, 2, 1])), small), "few rows in all"
