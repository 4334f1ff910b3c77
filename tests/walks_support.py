"""One case of a walk (``fused_rnn.kernels.by_walk.walk``): its inputs, a backend's results, and the reference's in float64."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from tolerances import assert_close_to_reference
from torch import Tensor

from fused_rnn.cells import equations_of, named
from fused_rnn.cells.definition import DEFINED
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.by_walk.walk import Walk
from fused_rnn.kernels.numba import derived
from fused_rnn.kernels.reference import recurrence

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
    if backend == "reference":
        return recurrence.walk(equations_of(named(cell)))
    if backend == "numba":
        return derived.walk_of(named(cell))
    assert backend == "triton"
    # Where Triton is not installed, this cannot be imported.
    from triton_walks import walk_of

    return walk_of(named(cell))


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
    cell, steps = named(cell_name), make_steps(case)
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
    cell, steps = named(cell_name), inputs.steps
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
    # Blocks that no backward reads may hold anything.
    read = [i for i, block in enumerate(cell.tape) if cell.tape_is_out or block in DEFINED[cell_name].derived.kept]
    blocks = tape[inputs.live].unflatten(2, (len(cell.tape), h))[:, :, read]
    result = {"tape": blocks, "out": out[inputs.live], "d_gates": d_gates[inputs.live]}
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
