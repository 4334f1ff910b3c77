"""The recurrence around the equations of one step: written once, for every cell.

It serves two callers. ``layer`` is a whole layer in differentiable torch. ``walk`` gives the three functions of a walk
(``kernels.by_walk.walk``), whose backward is that of ``Equations``, which the tests judge by torch.autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_rnn.data.cell import Weights
from fused_rnn.data.equations import Equations, States
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.by_walk.walk import Walk


class Packed(NamedTuple):
    """Nothing is repacked: D tensors each."""

    weight_hh: tuple[Tensor, ...]
    weight_hr: tuple[Tensor, ...] | None


def _rows(steps: Steps, t: int) -> tuple[int, int]:
    """First row and number of rows of step ``t``."""
    if steps.batch_sizes is None or steps.offsets is None:
        return t * steps.batch, steps.batch
    return int(steps.offsets[t]), int(steps.batch_sizes[t])


def _walk(
    equations: Equations,
    gates_x: Tensor,
    states: States,
    weights: tuple[Tensor, Tensor | None, Tensor | None],
    steps: Steps,
    reverse: bool,
    reset: Tensor | None,
) -> tuple[dict[int, tuple[Tensor, tuple[Tensor, ...]]], States]:
    """Walk one recurrence: gates_x (R, G·H), states (N, ·), weights (weight_hh, bias_hh, weight_hr).

    Returns:
        step -> (h, tape), and the states after the walk.
    """
    weight_hh, bias_hh, weight_hr = weights
    done = {}
    for t in reversed(range(steps.length)) if reverse else range(steps.length):
        begin, n = _rows(steps, t)
        before = tuple(state[:n] for state in states)
        if reset is not None:
            fresh = reset[begin : begin + n, None]
            before = tuple(torch.where(fresh, torch.zeros_like(state), state) for state in before)
        gates_h = _recurrent(equations, gates_x[begin : begin + n], before, weight_hh, bias_hh)
        after, tape = equations.step(gates_x[begin : begin + n], gates_h, before)
        if weight_hr is not None:
            after = (linear(after[0], weight_hr), *after[1:])
        done[t] = after[0], tape
        # Every sequence that has no step here keeps its state.
        states = tuple(
            new if n == steps.batch else torch.cat((new, state[n:])) for new, state in zip(after, states, strict=True)
        )
    return done, states


def _first_rows(equations: Equations, weight_hh: Tensor) -> int:
    """How many rows of weight_hh multiply h; those behind them the operand of the later gates."""
    return weight_hh.shape[0] // equations.cell.num_gates * len(equations.cell.first)


def _recurrent(equations: Equations, gates_x: Tensor, states: States, weight_hh: Tensor, bias_hh: Tensor | None) -> Tensor:
    """gates_h of one step, (n, G·H): the product with h, and that of the later gates with their operand."""
    if equations.operand is None:
        return linear(states[0], weight_hh, bias_hh)
    first = _first_rows(equations, weight_hh)
    biases = (None, None) if bias_hh is None else (bias_hh[:first], bias_hh[first:])
    gates_h = linear(states[0], weight_hh[:first], biases[0])
    operand = equations.operand(gates_x, gates_h, states)
    return torch.cat((gates_h, linear(operand, weight_hh[first:], biases[1])), dim=-1)


def _in_rows(values: Sequence[Tensor], steps: Steps, rows: int) -> Tensor:
    """The values of all steps, (n, ·) each, in their rows, (R, ·); zero in rows that no step works on."""
    pieces: list[Tensor] = []
    filled = 0
    for t, value in enumerate(values):
        begin, n = _rows(steps, t)
        if begin > filled:
            pieces.append(value.new_zeros(begin - filled, value.shape[-1]))
        pieces.append(value)
        filled = begin + n
    if rows > filled:
        pieces.append(pieces[-1].new_zeros(rows - filled, pieces[-1].shape[-1]))
    return torch.cat(pieces)


def layer(
    equations: Equations,
    input: Tensor,
    steps: Steps,
    states: States,
    weights: Sequence[Weights],
    reverse: Sequence[bool],
    reset: Tensor | None,
    cell_states: bool = False,
) -> tuple[Tensor, States]:
    """A whole layer in differentiable torch; see ``fused_rnn.reference.layer``."""
    outs, ends, cells = [], [], []
    for d, (weight, backwards) in enumerate(zip(weights, reverse, strict=True)):
        gates_x = linear(input, weight.ih, weight.bias_ih)
        recurrent = (weight.hh, weight.bias_hh, weight.hr)
        mask = None if reset is None else reset[d]
        done, end = _walk(equations, gates_x, tuple(state[d] for state in states), recurrent, steps, backwards, mask)
        outs.append(_in_rows([done[t][0] for t in range(steps.length)], steps, input.shape[0]))
        ends.append(end)
        if cell_states:
            index = equations.cell.tape.index(equations.cell.cell_state)
            cells.append(_in_rows([done[t][1][index] for t in range(steps.length)], steps, input.shape[0]))
    states_n = tuple(torch.stack(directions) for directions in zip(*ends, strict=True))
    return torch.cat(outs, dim=-1), (*states_n, torch.cat(cells, dim=-1)) if cell_states else states_n


def _pack(weight_hh: Sequence[Tensor], weight_hr: Sequence[Tensor] | None, steps: Steps, backward: bool) -> Packed:
    return Packed(tuple(weight_hh), None if weight_hr is None else tuple(weight_hr))


def _before(
    equations: Equations, tape: Tensor, out: Tensor, states_0: States, steps: Steps, t: int, reverse: bool, reset: Tensor | None
) -> States:
    """The states before step ``t`` of one recurrence, from what the forward kept: (n, ·) each."""
    begin, n = _rows(steps, t)
    previous = t + 1 if reverse else t - 1
    first, m = _rows(steps, previous) if 0 <= previous < steps.length else (0, 0)
    m = min(n, m)
    width = tape.shape[-1] // len(equations.cell.tape)
    before = []
    for name, state_0 in zip(equations.cell.states, states_0, strict=True):
        kept = out
        if name == equations.cell.cell_state:
            column = equations.cell.tape.index(name) * width
            kept = tape[:, column : column + width]
        state = torch.cat((kept[first : first + m], state_0[m:n]))
        if reset is not None:
            state = state.masked_fill(reset[begin : begin + n, None], 0)
        before.append(state)
    return tuple(before)


def _backward_step(
    equations: Equations, before: States, tape: Tensor, out: Tensor, weights: tuple[Tensor, Tensor | None], d_states: States
) -> tuple[Tensor, States]:
    """The backward of one step.

    Returns:
        d_gates of the step, (n, d_gates blocks·H), and the gradients of the states before it, (n, ·) each.
    """
    cell = equations.cell
    weight_hh, weight_hr = weights
    blocks = tape.chunk(len(cell.tape), dim=-1)
    d_h = d_states[0] if weight_hr is None else d_states[0] @ weight_hr
    found, direct = equations.backward(blocks, before, out, (d_h, *d_states[1:]))
    first = _first_rows(equations, weight_hh)
    if equations.later_backward is not None:
        d_operand = torch.cat([found[name] for name in cell.later], dim=-1) @ weight_hh[first:]
        more, d_before = equations.later_backward(blocks, before, d_operand)
        found = {name: found[name] + more[name] if name in more else found[name] for name in found}
        direct[0] = direct[0] + d_before
    d_gates_h = torch.cat([found[name] for name in cell.d_hh], dim=-1)
    direct[0] = direct[0] + d_gates_h[:, :first] @ weight_hh[:first]
    return torch.cat([found[name] for name in cell.d_gates], dim=-1), tuple(direct)


def walk(equations: Equations) -> Walk:
    """A cell's walk, made of its equations."""
    cell = equations.cell

    def forward(
        tape: Tensor,
        out: Tensor,
        states: States,
        packed: Packed,
        bias: Tensor | None,
        steps: Steps,
        reverse: Sequence[bool],
        reset: Tensor | None,
        keep: bool,
    ) -> None:
        width = tape.shape[-1] // len(cell.tape)
        for d, backwards in enumerate(reverse):
            weight_hr = None if packed.weight_hr is None else packed.weight_hr[d]
            # A copy, because for a cell whose tape is its output the walk would read what it has written.
            gates_x = tape[:, d, : cell.num_gates * width].clone()
            bias_hh = None
            if bias is not None:
                gates_x += bias[d, : cell.num_gates * width]
                # A block beyond the gates belongs to the last gate, whose recurrent part the tape keeps apart.
                bias_hh = bias.new_zeros(cell.num_gates * width)
                apart = bias[d, cell.num_gates * width :]
                bias_hh[cell.num_gates * width - apart.shape[0] :] = apart
            weights = (packed.weight_hh[d], bias_hh, weight_hr)
            done, ends = _walk(equations, gates_x, tuple(state[d] for state in states), weights, steps, backwards, reset)
            for t, (h, blocks) in done.items():
                begin, n = _rows(steps, t)
                tape[begin : begin + n, d] = torch.cat(blocks, dim=-1)
                out[begin : begin + n, d] = h
            for state, end in zip(states, ends, strict=True):
                state[d] = end

    def backward(
        d_gates: Tensor,
        d_states: States,
        d_out: Tensor | None,
        d_cells: Tensor | None,
        tape: Tensor,
        out: Tensor,
        states_0: States,
        packed: Packed,
        steps: Steps,
        t_begin: int,
        t_end: int,
        reverse: Sequence[bool],
        reset: Tensor | None,
    ) -> None:
        first = steps.rows(t_begin, t_end).start
        for d, backwards in enumerate(reverse):
            # float64, as what the kernels are judged against.
            weight_hh = packed.weight_hh[d].double()
            weight_hr = None if packed.weight_hr is None else packed.weight_hr[d].double()
            d_walk = [d_state[d].double() for d_state in d_states]
            for t in range(t_begin, t_end) if backwards else reversed(range(t_begin, t_end)):
                begin, n = _rows(steps, t)
                rows = slice(begin, begin + n)
                d_after = [d_state[:n] for d_state in d_walk]
                if d_out is not None:
                    d_after[0] = d_after[0] + d_out[rows, d]
                if d_cells is not None:
                    if cell.cell_state is None:
                        raise ValueError(f"d_cells: expected None for {cell.name}, which has no cell state, got a tensor")
                    d_after[1] = d_after[1] + d_cells[rows, d]
                states = tuple(state[d] for state in states_0)
                before = _before(equations, tape[:, d], out[:, d], states, steps, t, backwards, reset)
                d_step, d_before = _backward_step(
                    equations,
                    tuple(state.double() for state in before),
                    tape[rows, d].double(),
                    out[rows, d].double(),
                    (weight_hh, weight_hr),
                    tuple(d_after),
                )
                if weight_hr is not None:
                    d_step = torch.cat((d_step, d_after[0]), dim=-1)
                d_gates[begin - first : begin - first + n, d] = d_step
                if reset is not None:
                    d_before = tuple(d_state.masked_fill(reset[rows, None], 0) for d_state in d_before)
                d_walk = [torch.cat((new, old[n:])) for new, old in zip(d_before, d_walk, strict=True)]
            for d_state, d_end in zip(d_states, d_walk, strict=True):
                d_state[d] = d_end

    return Walk(_pack, forward, backward)
