"""The backward of one layer around a walk: d_gates in chunks of time, and the products that follow each chunk.

Legend as in ``fused_rnn.kernels.by_walk.walk``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fused_rnn.kernels.by_walk.forward import chunks, copied, pack
from fused_rnn.kernels.by_walk.walk import Walk
from fused_rnn.kernels.memory import empty
from fused_rnn.kernels.protocol import COMPUTE, LayerCall, OutputGradients
from fused_rnn.kernels.weight_gradients import (
    GroupedWeightGradients,
    PreviousH,
    WeightGradients,
    compute_weights,
    in_dtype,
    multiply,
    previous_h,
)

# A chunk of d_gates. Every chunk adds to the weights' gradients, which are read and written once more for it: below some 2,000
# rows that costs more than what the chunk gains in cache.
_CHUNK_BYTES = 16 << 20
_CHUNK_ROWS = 2048


def backward(
    walk: Walk,
    call: LayerCall,
    out: Tensor,
    tape: Tensor | None,
    gradients: OutputGradients,
    wanted: Sequence[bool],
    groups: int | None,
) -> list[Tensor | None]:
    """Compute the gradients of a layer; arguments and results as of a backend's backward.

    Args:
        walk: of its cell.
        call: an input (R, I), with states.
        gradients: contiguous, (R, ·) and (D, N, ·).
    """
    (cell, _, steps, reverse, _, _), input, states, weights, reset = call
    assert states is not None
    d_out, d_ends, d_cells = gradients
    input_wanted, states_wanted = wanted[0], wanted[1 : 1 + len(states)]
    collect = WeightGradients if groups is None else partial(GroupedWeightGradients, groups)
    storage, device = input.dtype, input.device
    exact = COMPUTE[storage]
    compute = exact
    rows, recurrences = input.shape[0], len(weights)
    hidden, output = weights[0].hh.shape[0] // cell.num_gates, weights[0].hh.shape[1]
    columns = len(cell.d_gates) * hidden + (0 if weights[0].hr is None else output)

    weights = compute_weights(weights, compute)
    states_0 = tuple([in_dtype(state, exact).contiguous() for state in states])
    d_states = tuple(
        [
            torch.zeros_like(state) if d_end is None else copied((d_end,), exact)[0]
            for state, d_end in zip(states_0, d_ends, strict=True)
        ]
    )
    flat, out = out, out.view(rows, recurrences, output)
    tape = out if tape is None else tape
    d_out = None if d_out is None else d_out.view(rows, recurrences, output)
    d_cells = None if d_cells is None else d_cells.view(rows, recurrences, hidden)
    d_input = empty(input.shape, compute, device) if input_wanted else None
    sums = [collect(cell, weight, wanted[1 + len(states) + 5 * d :][:5], storage) for d, weight in enumerate(weights)]

    def finish(d: int, d_gates: Tensor, t_begin: int, t_end: int, h: PreviousH, tape: Tensor) -> None:
        """The products of recurrence d after steps t_begin .. t_end - 1; d_gates and tape hold these steps' rows alone."""
        x, d_x = input, d_input
        if t_end - t_begin < steps.length:
            span = steps.rows(t_begin, t_end)
            x, d_x = x[span], None if d_x is None else d_x[span]
        sums[d].walk(d_gates, in_dtype(x, compute), h, t_begin, t_end, tape)
        if d_x is not None:
            d_gates_x = sums[d].blocks(d_gates, cell.gates)
            multiply(d_gates_x, weights[d].ih, d_x, d > 0)

    previous = [previous_h(call, d, flat if recurrences == 1 else out[:, d]) for d in range(recurrences)]
    row_bytes = columns * compute.itemsize
    # Walks take one mask: recurrences that differ in it walk one by one.
    alike = reset is None or recurrences == 1
    if storage == compute and rows * recurrences * row_bytes <= _CHUNK_BYTES and alike:
        whole = empty((rows, recurrences, columns), compute, device)
        packed = pack(walk, call, weights, backward=True)
        mask = None if reset is None else reset[0]
        walk.backward(whole, d_states, d_out, d_cells, tape, out, states_0, packed, steps, 0, steps.length, reverse, mask)
        for d, h in enumerate(previous):
            finish(d, whole[:, d], 0, steps.length, h, tape[:, d])
    else:
        workspace: Tensor | None = None
        for d, (h, backwards) in enumerate(zip(previous, reverse, strict=True)):
            packed = pack(walk, call, [weights[d]], backward=True)
            for t_begin, t_end in chunks(steps, _CHUNK_BYTES, _CHUNK_ROWS, row_bytes, backwards=not backwards):
                span = steps.rows(t_begin, t_end)
                n = span.stop - span.start
                if workspace is None or workspace.shape[0] < n:
                    workspace = empty((n, 1, columns), compute, device)
                # With a conversion, only the rows that the chunk reads exist in the wider dtype: its own and those one step
                # before it in the walk.
                if storage == compute:
                    first, last = 0, steps.length
                elif backwards:
                    first, last = t_begin, min(t_end + 1, steps.length)
                else:
                    first, last = max(t_begin - 1, 0), t_end
                part, near = steps.part(first, last), steps.rows(first, last)
                tape_near = tape[near, d : d + 1].to(compute)
                walk.backward(
                    workspace[:n],
                    tuple(d_state[d : d + 1] for d_state in d_states),
                    None if d_out is None else d_out[near, d : d + 1].to(compute),
                    None if d_cells is None else d_cells[near, d : d + 1].to(compute),
                    tape_near,
                    tape_near if cell.tape_is_out else out[near, d : d + 1].to(compute),
                    tuple(state[d : d + 1] for state in states_0),
                    packed,
                    part,
                    t_begin - first,
                    t_end - first,
                    (backwards,),
                    None if reset is None else reset[d, near],
                )
                own = slice(span.start - near.start, span.stop - near.start)
                finish(d, workspace[:n, 0], t_begin, t_end, h, tape_near[own, 0])
    if storage != exact:
        d_input = None if d_input is None else d_input.to(storage)
        d_states = tuple([d_state.to(storage) for d_state in d_states])
    before = [grad if asked else None for grad, asked in zip(d_states, states_wanted, strict=True)]
    return [d_input, *before, *(grad for each in sums for grad in each.result())]
