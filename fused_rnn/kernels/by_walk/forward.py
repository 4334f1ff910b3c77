"""The forward of one layer around a walk: buffers, input projection, chunks of time.

Legend as in ``fused_rnn.kernels.by_walk.walk``; the rows of all steps follow one another without gaps.

Time is walked in chunks where the whole does not have to exist at once: gates_x in inference, d_gates in the backward, and
the float32 copies of bfloat16 and float16. What one product writes, the next then reads from cache, and no call faults in
fresh memory that grows with T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fused_rnn.data.biases import summed_biases
from fused_rnn.data.cell import Weights
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.by_walk.walk import Walk
from fused_rnn.kernels.memory import empty
from fused_rnn.kernels.protocol import COMPUTE, LayerCall, LayerResult, States
from fused_rnn.kernels.weight_gradients import compute_weights

# Bytes of one chunk's row buffer: a few second-level caches. At least so many rows, because a product of fewer leaves the
# matrix units waiting for the weights.
_CHUNK_BYTES = 8 << 20
_CHUNK_ROWS = 512


def chunks(steps: Steps, most_bytes: int, least_rows: int, row_bytes: int, backwards: bool) -> Iterator[tuple[int, int]]:
    """Cut the steps into chunks of about so many bytes: (t_begin, t_end), first to last or last to first."""
    rows = max(least_rows, most_bytes // row_bytes)
    length = max(1, rows // max(1, steps.batch))
    starts = range(0, steps.length, length)
    for t in reversed(starts) if backwards else starts:
        yield t, min(t + length, steps.length)


def copied(states: States, dtype: torch.dtype) -> States:
    """States for a kernel to write over: contiguous, in the dtype that it computes in."""
    if states[0].dtype == dtype:
        return tuple([state.clone(memory_format=torch.contiguous_format) for state in states])
    return tuple([state.to(dtype, memory_format=torch.contiguous_format) for state in states])


def pack(walk: Walk, call: LayerCall, weights: Sequence[Weights], backward: bool) -> object:
    """What the walk reads in place of these weights: the backward's product, or the forward's."""
    projections = [weight.hr for weight in weights if weight.hr is not None]
    return walk.pack([weight.hh for weight in weights], projections or None, call.layer.steps, backward)


def forward(walk: Walk, call: LayerCall, keep: bool, leading: Sequence[int]) -> LayerResult:
    """Compute a layer.

    Args:
        walk: of its cell.
        call: an input (R, I), with states.
        keep: whether a backward will follow.
        leading: the shape of the output but for its columns: R rows.
    """
    (cell, _, steps, reverse, cell_states, _), input, states, weights, reset = call
    assert states is not None
    storage, device = input.dtype, input.device
    rows, recurrences = input.shape[0], len(weights)
    gates, output = weights[0].hh.shape
    exact = COMPUTE[storage]
    compute = exact
    columns = len(cell.tape) * (gates // cell.num_gates)

    weights = compute_weights(weights, compute)
    bias = summed_biases(cell, weights, exact)
    ends = copied(states, exact)
    # In its shape from the start: an output that is a view made in an autograd Function cannot be changed in place.
    result = empty((*leading, recurrences * output), storage, device)
    out = result.view(rows, recurrences, output)
    tape = empty((rows, recurrences, columns), storage, device) if keep and not cell.tape_is_out else None

    hidden = gates // cell.num_gates
    # A copy, which the caller may change; the kernel writes c where it writes the whole tape.
    cells = empty((*leading, recurrences * hidden), storage, device) if cell_states else None
    write_tape = keep or cells is not None

    def copy_cells(tape: Tensor | None, span: slice, recurrence: slice) -> None:
        """Take c of these rows and recurrences, where it is wanted, from what the kernel wrote."""
        if cells is not None and tape is not None:
            first = cell.tape.index(cell.cell_state) * hidden
            cells.view(rows, recurrences, hidden)[span, recurrence] = tape[..., first : first + hidden]

    def results() -> LayerResult:
        after = ends if storage == exact else tuple([end.to(storage) for end in ends])
        return LayerResult(result, after, cells, tape)

    # Whole, where nothing would be gained by chunks: the tape is kept anyway, or all of it is small.
    row_bytes = columns * compute.itemsize
    small = cell.tape_is_out or keep or rows * recurrences * row_bytes <= _CHUNK_BYTES
    # Walks take one mask: recurrences that differ in it walk one by one.
    alike = reset is None or recurrences == 1
    if storage == compute and small and alike:
        whole = out if cell.tape_is_out else empty((rows, recurrences, columns), storage, device) if tape is None else tape
        for d, weight in enumerate(weights):
            torch.mm(input, weight.ih.t(), out=whole[:, d, :gates])
        packed = pack(walk, call, weights, backward=False)
        walk.forward(whole, out, ends, packed, bias, steps, reverse, None if reset is None else reset[0], write_tape)
        copy_cells(whole, slice(None), slice(None))
        return results()

    workspace: Tensor | None = None
    for d, (weight, backwards) in enumerate(zip(weights, reverse, strict=True)):
        packed = pack(walk, call, [weight], backward=False)
        for t_begin, t_end in chunks(steps, _CHUNK_BYTES, _CHUNK_ROWS, row_bytes, backwards):
            part, span = steps.part(t_begin, t_end), steps.rows(t_begin, t_end)
            n = span.stop - span.start
            if workspace is None or workspace.shape[0] < n:
                workspace = empty((n, 1, columns), compute, device)
            chunk = workspace[:n]
            x = input[span].to(compute)
            torch.mm(x, weight.ih.t(), out=chunk[:, 0, :gates])
            chunk_out = out[span, d : d + 1]
            if cell.tape_is_out:
                chunk_out = chunk
            elif storage != compute:
                chunk_out = torch.empty((n, 1, output), dtype=compute, device=device)
            walk.forward(
                chunk,
                chunk_out,
                tuple(end[d : d + 1] for end in ends),
                packed,
                None if bias is None else bias[d : d + 1],
                part,
                (backwards,),
                None if reset is None else reset[d, span],
                write_tape,
            )
            copy_cells(chunk, span, slice(d, d + 1))
            if storage != compute or cell.tape_is_out:
                out[span, d : d + 1] = chunk_out
            if tape is not None:
                tape[span, d : d + 1] = chunk
    return results()
