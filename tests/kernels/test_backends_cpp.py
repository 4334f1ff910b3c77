"""The C++ backend through the seam: every instruction set, each way to read weights, stretches of time, a forked child."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_backends import CASES, PROJECTED, Case, _fitting, check, every_cell, every_projected_cell
from tolerances import assert_close_to_reference

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

from cpp_support import CELLS, backward_results, forward_results, make_backward, make_forward  # noqa: E402 (after the check)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _poisoned_kept_memory() -> None:
    """Fill the blocks that the extension keeps with NaN, so that a read before the first write shows."""
    blocks = [
        torch.frombuffer(_C.Memory(size), dtype=torch.uint8) for size in (300 << 10, 600 << 10, 1 << 20, 3 << 20, 9 << 20)
    ]
    for block in blocks:
        block.fill_(255)


@every_cell
@every_dtype
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 6, 8, 10, 11, 15, 24)], ids=str)
def test_instruction_sets(isa: str, cell: str, dtype: torch.dtype, case: Case) -> None:
    check("cpp", cell, _fitting(cell, case), dtype)


@every_projected_cell
@every_dtype
@pytest.mark.parametrize("case", PROJECTED[:4], ids=str)
def test_instruction_sets_with_a_projection(isa: str, cell: str, dtype: torch.dtype, case: Case) -> None:
    check("cpp", cell, case, dtype)


@every_cell
@every_dtype
@pytest.mark.parametrize("batch", [1, 4, 5, 9])
def test_instruction_sets_in_steps_of_cells(isa: str, cell: str, dtype: torch.dtype, batch: int) -> None:
    """Rows that read the weights as they are, and more, for which a group of columns is laid out."""
    check("cpp", cell, Case(steps=1, batch=batch, form="step", hidden=37, inputs=20), dtype)


@every_cell
@pytest.mark.parametrize("hidden", [1, 4, 7, 8, 9, 15, 16, 17, 31, 33, 49, 65])
@pytest.mark.parametrize("inputs", [1, 16, 50])
def test_sizes_across_vectors(isa: str, cell: str, hidden: int, inputs: int) -> None:
    """Units and features at, below and above the lanes and the tiles, over steps and in one."""
    for steps in (1, 3):
        for reverse in ((False,), (False, True)):
            check("cpp", cell, Case(steps, 5, inputs, hidden, reverse), torch.float32)


# Weights beyond the second-level cache: from 2 MiB on, and whether their rows begin with whole vectors. By the number of gates.
LARGE = {4: (300, 256, 250), 3: (460, 256, 250), 2: (400, 384, 378), 1: (300, 640, 630)}


@every_cell
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("length", "whole"), [(15, False), (16, False), (63, True), (64, True)])
def test_few_sequences_of_large_weights(cell: str, batch: int, length: int, whole: bool) -> None:
    """As torch stores them for so many steps, in panels for more."""
    inputs, *hidden = LARGE[CELLS[cell].num_gates]
    check("cpp", cell, Case(length, batch, inputs, hidden[not whole]), torch.float32)


@every_cell
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 8])
def test_few_rows_of_large_weights(isa: str, cell: str, batch: int) -> None:
    inputs, *hidden = LARGE[CELLS[cell].num_gates]
    check("cpp", cell, Case(1, batch, inputs, hidden[batch % 2], (False, True)), torch.float32)
    check("cpp", cell, Case(1, batch, inputs, hidden[0], form="step"), torch.float32)


@every_cell
@every_dtype
@pytest.mark.parametrize(("length", "batch"), [(12, 8), (97, 1), (2, 48), (2, 49), (96, 1), (16, 6)])
def test_weights_of_the_input_as_torch_stores_them(cell: str, dtype: torch.dtype, length: int, batch: int) -> None:
    """Up to 96 rows in steps of at most 48, and one row more; both ways, and with rows that have no step."""
    check("cpp", cell, Case(length, batch, 20, 9, (False, True)), dtype)
    check("cpp", cell, Case(length, batch, 20, 9, (True,), form="packed", reset=True), dtype)


@every_cell
@pytest.mark.parametrize(("length", "batch"), [(3, 48), (3, 49), (24, 8), (25, 8)])
def test_large_weights_of_the_input_as_torch_stores_them(isa: str, cell: str, length: int, batch: int) -> None:
    """Up to 192 rows of these."""
    inputs, *hidden = LARGE[CELLS[cell].num_gates]
    check("cpp", cell, Case(length, batch, inputs, hidden[1]), torch.float32)


@every_cell
@every_dtype
@pytest.mark.parametrize("reverse", [(False,), (True, False)], ids=str)
def test_inputs_wider_than_the_gates(isa: str, cell: str, dtype: torch.dtype, reverse: tuple[bool, ...]) -> None:
    """More than 2^18 multiplications: the gradient of weight_ih is summed as its transpose."""
    hidden = 32 // CELLS[cell].num_gates
    assert 15 * 10 * hidden * CELLS[cell].num_gates * 100 > 1 << 18
    check("cpp", cell, Case(15, 10, 100, hidden, reverse, reset=True), dtype)


@every_projected_cell
@every_dtype
def test_projections_wider_than_their_outputs(isa: str, cell: str, dtype: torch.dtype) -> None:
    """The same for the gradient of weight_hr."""
    assert 20 * 16 * 9 * 110 > 1 << 18
    check("cpp", cell, Case(20, 16, 10, 110, projection=9, reverse=(False, True)), dtype)


# Gradients of the gates of more than 16 MiB; what is stored in 16 bits is widened in stretches of 8 MiB forward.
LONG = {
    "bidirectional": Case(70, 130, 30, 128, (False, True), reset=True),
    "packed": Case(60, 320, 30, 128, (True, False), form="packed", reset=True, cell_states=True),
    "one way": Case(70, 130, 30, 128, (True,)),
    "wide": Case(140, 300, 140, 32, (False,), reset=True),
}


@every_dtype
@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        ("lstm", "bidirectional"),
        ("lstm", "packed"),
        ("gru", "packed"),
        ("gru", "one way"),
        ("lstm", "wide"),
    ],
)
def test_long_layers_match_the_reference(cell: str, kind: str, dtype: torch.dtype) -> None:
    """Several stretches, of which the last is shorter; the wide one sums weight_ih's gradient as its transpose."""
    if dtype == torch.float64 and kind == "wide":
        pytest.skip("a float64 sum over so many rows is no judge of one")
    case = _fitting(cell, LONG[kind])
    check("cpp", cell, replace(case, steps=case.steps // 2) if dtype == torch.float64 else case, dtype)


@every_cell
@every_dtype
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)], ids=str)
def test_stretches_of_time_change_rounding_alone(
    cell: str, dtype: torch.dtype, packed: bool, reverse: tuple[bool, ...]
) -> None:
    """Who wants the gradients of the gates as well gets everything at once: the same but for the order of the sums."""
    hidden, batch = 512 // len(CELLS[cell].d_gates), 300
    sizes = torch.linspace(batch, batch // 2, 60).long() if packed else None
    forward = make_forward(cell, dtype, 60, batch, 20, hidden, reverse, batch_sizes=sizes)
    call = make_backward(forward) | {"threads": 2}
    in_stretches, at_once = backward_results(call), backward_results(call | {"gates_wanted": True})
    d_gates = at_once.pop()
    assert d_gates.numel() * d_gates.itemsize > 16 << 20
    places = [place for place, wanted in enumerate(call["wanted"]) if wanted]
    for place, actual, expected in zip(places, in_stretches, at_once, strict=True):
        assert_close_to_reference(actual, expected, expected.double(), f"operand {place}")


@every_cell
@every_dtype
def test_stretches_do_not_depend_on_the_threads(cell: str, dtype: torch.dtype) -> None:
    hidden = 512 // len(CELLS[cell].d_gates)
    forward = make_forward(cell, dtype, 50, 200, 20, hidden)
    first = forward_results(forward)
    backward = make_backward(forward)
    gradients = backward_results(backward)
    for threads in (2, 3):
        for actual, expected in zip(forward_results(forward | {"threads": threads}), first, strict=True):
            assert torch.equal(actual, expected)
        for actual, expected in zip(backward_results(backward | {"threads": threads}), gradients, strict=True):
            assert torch.equal(actual, expected)


@every_cell
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=["bfloat16", "float16"])
def test_long_inference_in_halves_gives_the_bits_of_training(cell: str, dtype: torch.dtype) -> None:
    """Without a tape stretches are longer; no sum depends on that."""
    call = make_forward(cell, dtype, 60, 250, 20, 64)
    kept, dropped = (_C.layer_forward(**call | {"keep": keep, "threads": 2}) for keep in (True, False))
    for actual, expected in zip([dropped[0], *dropped[1]], [kept[0], *kept[1]], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@every_cell
def test_after_fork(cell: str) -> None:
    """A forked child computes what its parent computes, though the parent's threads are not there."""
    # Large enough for the kernels to use several threads. The child calls nothing else: torch's own operations may hang there.
    forward = make_forward(cell, length=6, batch=8, hidden=64) | {"threads": 2}
    backward = make_backward(forward) | {"threads": 2}

    def run_both() -> list[np.ndarray]:
        return [result.numpy() for result in (*forward_results(forward), *backward_results(backward))]

    expected = run_both()

    def in_child() -> None:
        for value, wanted in zip(run_both(), expected, strict=True):
            assert np.array_equal(value, wanted)

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the child hangs")
    assert child.exitcode == 0
