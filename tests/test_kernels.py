"""The contract of a walk (``fused_rnn.kernels.by_walk.walk``): who has walks, every cell, against the reference in float64."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tolerances import assert_close_to_reference
from torch import Tensor

import fused_rnn
from fused_rnn import reference
from fused_rnn.cells import CELLS, Weights
from fused_rnn.kernels import cell_modules
from fused_rnn.kernels.by_walk.walk import Walk, walks
from fused_rnn.steps import Steps

# The backends whose layers are made around walks.
BACKENDS = [name for name in ("numba", "reference") if fused_rnn.backends()[name].available]
DTYPES = (torch.float32, torch.float64)
PADDING = 7.0


@dataclass(frozen=True)
class Case:
    """Sizes and options of one run of the kernels."""

    steps: int = 5
    batch: int = 3
    hidden: int = 17
    reverse: tuple[bool, ...] = (False,)
    projection: int | None = None
    ragged: str | None = None
    reset: bool = False
    bias: bool = True
    d_out: bool = True
    d_cells: bool = False
    chunk: int | None = None
    by_direction: bool = False
    padding: int = 0

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != Case.__dataclass_fields__[name].default]
        return ",".join(changed) or "plain"


@dataclass
class Inputs:
    """Everything that one run reads, in float64."""

    steps: Steps
    rows: int
    weight_hh: list[Tensor]
    weight_hr: list[Tensor] | None
    gates_x: Tensor
    states: tuple[Tensor, ...]
    bias: Tensor | None
    reset: Tensor | None
    d_out: Tensor | None
    d_cells: Tensor | None
    d_states: tuple[Tensor, ...]
    live: Tensor


def walk_of(backend: str, cell: str) -> Walk:
    """The functions of a cell."""
    package = "fused_rnn.reference" if backend == "reference" else f"fused_rnn.kernels.{backend}"
    return walks(cell_modules(package))[cell]


def make_steps(case: Case) -> Steps:
    """Dense, packed (one sequence has no step at all) or right-padded steps."""
    if case.ragged is None:
        return Steps(case.steps, case.batch)
    sizes = torch.linspace(case.batch, 1, case.steps).round().to(torch.int64)
    if case.ragged == "packed":
        return Steps.packed(sizes, case.batch + 1)
    assert case.ragged == "padded"
    return Steps(case.steps, case.batch, sizes, torch.arange(case.steps) * case.batch)


def make_inputs(cell_name: str, case: Case) -> Inputs:
    """Fresh numbers of a size that keeps the gates away from saturation."""
    cell, steps = CELLS[cell_name], make_steps(case)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{cell_name} {case}".encode()))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, h, n = len(case.reverse), case.hidden, steps.batch
    p = case.projection or h
    rows = steps.rows(0, steps.length).stop
    widths = (p, h)[: len(cell.states)]
    live = torch.zeros(rows, dtype=torch.bool)
    for t in range(steps.length):
        live[steps.rows(t, t + 1)] = True
    return Inputs(
        steps,
        rows,
        [randn(cell.num_gates * h, p) / p**0.5 for _ in range(d)],
        None if case.projection is None else [randn(p, h) / h**0.5 for _ in range(d)],
        randn(rows, d, cell.num_gates * h),
        tuple(randn(d, n, width) for width in widths),
        randn(d, len(cell.bias) * h) if case.bias else None,
        torch.rand(rows, generator=generator) < 0.3 if case.reset else None,
        randn(rows, d, p) if case.d_out else None,
        randn(rows, d, h) if case.d_cells and cell.cell_state is not None else None,
        tuple(randn(d, n, width) for width in widths),
        live,
    )


def run(backend: str, cell_name: str, case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward and backward of one backend, in the way that the case says; returns all that they wrote."""
    cell, steps = CELLS[cell_name], inputs.steps
    walk = walk_of(backend, cell_name)
    h = case.hidden
    p = case.projection or h
    padded = []

    def rows(number: int, width: int) -> Tensor:
        """Row buffer full of NaN, inside a wider one whose other columns must stay as they are."""
        d = len(case.reverse)
        whole = torch.full((number, d * width + case.padding), PADDING, dtype=dtype)
        padded.append(whole[:, d * width :])
        buffer = whole.as_strided((number, d, width), (d * width + case.padding, width, 1))
        return buffer.fill_(float("nan"))

    tape = rows(inputs.rows, len(cell.tape) * h)
    tape[..., : cell.num_gates * h] = inputs.gates_x
    out = tape if cell.tape_is_out else rows(inputs.rows, p)
    out_given = out.clone()
    extra = 0 if case.projection is None else p
    d_gates = rows(inputs.rows, len(cell.d_gates) * h + extra)
    d_out = None
    if inputs.d_out is not None:
        d_out = rows(inputs.rows, p)
        d_out.copy_(inputs.d_out)
    d_cells = None
    if inputs.d_cells is not None:
        d_cells = rows(inputs.rows, h)
        d_cells.copy_(inputs.d_cells)
    states = tuple(state.to(dtype, copy=True) for state in inputs.states)
    d_states = tuple(state.to(dtype, copy=True) for state in inputs.d_states)
    bias = None if inputs.bias is None else inputs.bias.to(dtype)

    runs = [slice(d, d + 1) for d in range(len(case.reverse))] if case.by_direction else [slice(None)]
    for part in runs:
        weight_hh = [weight.to(dtype) for weight in inputs.weight_hh[part]]
        weight_hr = None if inputs.weight_hr is None else [weight.to(dtype) for weight in inputs.weight_hr[part]]
        reverse = case.reverse[part]
        some_bias = None if bias is None else bias[part]
        chunk = case.chunk or steps.length
        chunks = [(begin, min(begin + chunk, steps.length)) for begin in range(0, steps.length, chunk)]
        if case.chunk is not None:
            assert len(set(reverse)) == 1, "a caller that walks in chunks walks one way"
        states_now = tuple(state[part].clone() for state in states)
        packed = walk.pack(weight_hh, weight_hr, steps, False)
        for begin, end in reversed(chunks) if reverse[0] else chunks:
            where = steps.rows(begin, end)
            reset = None if inputs.reset is None else inputs.reset[where]
            walk.forward(
                tape[where, part], out[where, part], states_now, packed, some_bias, steps.part(begin, end), reverse, reset, True
            )
        states_0 = tuple(state[part].contiguous() for state in states)
        d_states_now = tuple(state[part].clone() for state in d_states)
        before = tape.clone(), out.clone()
        packed = walk.pack(weight_hh, weight_hr, steps, True)
        for begin, end in chunks if reverse[0] else reversed(chunks):
            where = steps.rows(begin, end)
            walk.backward(
                d_gates[where, part],
                d_states_now,
                None if d_out is None else d_out[:, part],
                None if d_cells is None else d_cells[:, part],
                tape[:, part],
                out[:, part],
                states_0,
                packed,
                steps,
                begin,
                end,
                reverse,
                inputs.reset,
            )
        assert torch.equal(before[0].nan_to_num(9), tape.nan_to_num(9)), "the backward changed the tape"
        assert torch.equal(before[1].nan_to_num(9), out.nan_to_num(9)), "the backward changed the output"
        for whole, now in zip(states + d_states, states_now + d_states_now, strict=True):
            whole[part] = now
    for columns in padded:
        assert torch.all(columns == PADDING), "written past the end of a row"
    dead = ~inputs.live
    assert torch.equal(out[dead].nan_to_num(9), out_given[dead].nan_to_num(9)), "written a row that no step works on"
    result = {"tape": tape[inputs.live], "out": out[inputs.live], "d_gates": d_gates[inputs.live]}
    for name, state, d_state in zip(cell.states, states, d_states, strict=True):
        result[f"{name}_n"], result[f"d_{name}_0"] = state, d_state
    return result


def check(backend: str, cell_name: str, case: Case, dtype: torch.dtype) -> None:
    """Compare a backend's results with the reference's in float64."""
    inputs = make_inputs(cell_name, case)
    whole = Case(**{**vars(case), "chunk": None, "by_direction": False, "padding": 0})
    expected = run("reference", cell_name, whole, inputs, torch.float64)
    # Plain torch in the same dtype stands in for torch.nn, which does not show its gates.
    in_torch = run("reference", cell_name, whole, inputs, dtype)
    actual = run(backend, cell_name, case, inputs, dtype)
    for name, value in expected.items():
        assert_close_to_reference(actual[name], in_torch[name], value, name)


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
