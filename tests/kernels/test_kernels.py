"""The contract of a walk (``fused_rnn.kernels.by_walk.walk``): who has walks, every cell, against the reference in float64."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os

import numpy as np
import pytest
import torch
from walks_support import Case, check, make_inputs, run, walk_of

import fused_rnn
from fused_rnn import reference
from fused_rnn.cells import CELLS
from fused_rnn.data.cell import Weights
from fused_rnn.data.steps import Steps

# The backends whose layers are made around walks.
BACKENDS = [name for name in ("numba", "reference") if fused_rnn.backends()[name].available]
DTYPES = (torch.float32, torch.float64)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
# The reference is plain torch, whose operations are not made for a forked child.
every_kernel_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

CASES = [
    Case(steps=1, batch=1, hidden=1),
    Case(steps=1, batch=2, hidden=33),
    Case(batch=1, hidden=200),
    Case(batch=1, hidden=200, reverse=(True,)),
    Case(steps=4, batch=2, hidden=70, reverse=(True, False), reset=True),
    Case(steps=1, batch=1, hidden=200),
    Case(batch=19, hidden=33),
    Case(batch=17, hidden=200, reverse=(False, True)),
    Case(steps=40, batch=33, hidden=32),
    Case(batch=4, hidden=1, reverse=(False, True)),
    Case(steps=200, batch=2, hidden=16),
    Case(steps=3, batch=5, hidden=300),
    Case(steps=3, batch=18, hidden=670),
    Case(batch=0),
    Case(reverse=(False, True, False)),
    Case(padding=3, reverse=(True, False)),
    Case(padding=5, reverse=(True, False), by_direction=True),
    Case(batch=7, reset=True),
    Case(batch=33, hidden=64, reset=True, reverse=(False, True)),
    Case(batch=1, hidden=129, reset=True, steps=9),
    Case(bias=False, hidden=33),
    Case(d_out=False),
    Case(d_cells=True, batch=5, hidden=33, reverse=(False, True)),
    Case(d_cells=True, d_out=False, batch=19, hidden=65, padding=2, reset=True, reverse=(True, False)),
    Case(d_cells=True, batch=7, ragged="packed", steps=6, chunk=2),
    Case(d_cells=True, batch=7, ragged="padded", steps=6, chunk=2, reverse=(True,), reset=True),
    *(
        Case(batch=batch, ragged=ragged, reverse=reverse, reset=reset, steps=7, padding=1)
        for batch, ragged, reverse, reset in itertools.product(
            (6, 21), ("packed", "padded"), ((False,), (True,), (False, True)), (False, True)
        )
    ),
    *(
        Case(batch=9, ragged=ragged, reverse=(reverse,), reset=True, steps=8, chunk=3)
        for ragged, reverse in itertools.product((None, "packed", "padded"), (False, True))
    ),
    Case(batch=18, hidden=65, chunk=1, steps=4),
    Case(batch=9, ragged="packed", reverse=(True, True), chunk=2, by_direction=True),
]
PROJECTED = [
    Case(projection=5),
    Case(projection=1, hidden=2, batch=1, steps=2),
    Case(projection=40, hidden=130, batch=19, reverse=(False, True)),
    Case(projection=33, hidden=200, batch=1, reset=True),
    Case(projection=9, hidden=33, batch=6, ragged="packed", steps=7, d_cells=True, reset=True, reverse=(False, True)),
    Case(projection=33, hidden=130, batch=3, d_cells=True, d_out=False),
    *(
        Case(projection=9, batch=7, ragged=ragged, reverse=(reverse,), reset=True, steps=6, chunk=chunk, padding=2)
        for ragged, reverse, chunk in itertools.product((None, "packed", "padded"), (False, True), (None, 2))
    ),
]


@every_dtype
@every_cell
@every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_reference(backend: str, cell: str, dtype: torch.dtype, case: Case) -> None:
    """Sizes, directions, ragged rows, resets, chunks and strides give what the float64 reference gives."""
    check(backend, cell, case, dtype)


@every_dtype
@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.projected is not None])
@every_backend
@pytest.mark.parametrize("case", PROJECTED, ids=str)
def test_projected_cells_match_the_reference(backend: str, cell: str, dtype: torch.dtype, case: Case) -> None:
    """The same for the cells whose h can be a projection."""
    check(backend, cell, case, dtype)


@every_cell
@every_backend
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 40])
def test_any_number_of_threads(backend: str, cell: str, threads: int, batch: int) -> None:
    """More threads than cores, a number that does not divide the work, one: all right, and the same bits in every run."""
    case = Case(batch=batch, hidden=160, reverse=(False, True), steps=6)
    inputs = make_inputs(cell, case)
    given = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(backend, cell, case, torch.float32)
        first, second = (run(backend, cell, case, inputs, torch.float32) for _ in range(2))
    finally:
        torch.set_num_threads(given)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@every_cell
@every_backend
def test_python_threads_at_once(backend: str, cell: str) -> None:
    """Calls from several Python threads do not disturb each other."""
    cases = [Case(batch=batch, hidden=140, steps=12) for batch in (1, 2, 20, 40)]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for done in [pool.submit(check, backend, cell, case, torch.float32) for case in cases * 2]:
            done.result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@every_kernel_backend
def test_after_fork(backend: str) -> None:
    """A forked child computes what its parent computes, though the parent's threads are not there."""
    # Large enough for the walk to use several threads. The child calls nothing else: torch's own operations may hang there.
    steps, h = Steps(6, 8), 64
    walk = walk_of(backend, "gru")
    weight, gates_x = torch.randn(3 * h, h) / 8, torch.randn(48, 1, 4 * h)
    tape, out, d_gates = gates_x.clone(), torch.empty(48, 1, h), torch.empty(48, 1, 4 * h)
    h_0, h_n, d_h, d_out = torch.zeros(1, 8, h), torch.zeros(1, 8, h), torch.zeros(1, 8, h), torch.ones(48, 1, h)

    def run_both() -> None:
        tape.numpy()[...] = gates_x.numpy()
        h_n.numpy()[...] = 0
        d_h.numpy()[...] = 1
        walk.forward(tape, out, (h_n,), walk.pack([weight], None, steps, False), None, steps, (False,), None, True)
        packed = walk.pack([weight], None, steps, True)
        walk.backward(d_gates, (d_h,), d_out, None, tape, out, (h_0,), packed, steps, 0, 6, (False,), None)

    run_both()
    expected = [tensor.numpy().copy() for tensor in (tape, out, d_gates, h_n, d_h)]

    def in_child() -> None:
        run_both()
        for value, tensor in zip(expected, (tape, out, d_gates, h_n, d_h), strict=True):
            assert np.allclose(value, tensor.numpy(), atol=1e-5)

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the child hangs")
    assert child.exitcode == 0


@every_dtype
@every_backend
def test_nonlinearities_over_their_whole_range(backend: str, dtype: torch.dtype) -> None:
    """Saturation, infinities and NaN in the gates come out as the reference has them, in their own row only."""
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan")]
    values = torch.cat([torch.tensor(special), torch.linspace(-120, 120, 4001), torch.logspace(-30, 0, 95)]).to(dtype)
    for cell in CELLS.values():
        walk = walk_of(backend, cell.name)
        n, steps = len(values), Steps(1, len(values))
        tape = torch.full((n, 1, len(cell.tape)), float("nan"), dtype=dtype)
        tape[:, 0, : cell.num_gates] = values[:, None]
        out = tape if cell.tape_is_out else torch.full((n, 1, 1), float("nan"), dtype=dtype)
        states = tuple(torch.zeros(1, n, 1, dtype=dtype) for _ in cell.states)
        packed = walk.pack([torch.zeros(cell.num_gates, 1, dtype=dtype)], None, steps, False)
        walk.forward(tape, out, states, packed, None, steps, (False,), None, True)
        weights = (Weights(torch.ones(cell.num_gates, 1).double(), torch.zeros(cell.num_gates, 1).double()),)
        states = tuple(torch.zeros(1, n, 1).double() for _ in cell.states)
        expected, _ = reference.layer(cell, values.double()[:, None], steps, states, weights, (False,))
        eps = torch.finfo(dtype).eps
        # A cell that mixes h in has a share that goes to it and a share that goes to its gates: one rounding error of 1 - z is
        # all of it where z is nearly 1.
        absolute = 2 * eps if cell.direct else torch.finfo(dtype).tiny * 100
        torch.testing.assert_close(out[:, 0].double(), expected, rtol=10 * eps, atol=absolute, equal_nan=True)
