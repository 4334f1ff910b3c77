"""The forward of one layer around the kernels: buffers, input projection, chunks of time.

Everything here computes without a graph; ``fused_rnn.autograd`` records it and ``fused_rnn.gradients`` holds the backward.
Legend as in ``fused_rnn.kernels``: T steps, N sequences, D recurrences, H hidden units, G gates, P the size of h, R rows; the
rows of all steps follow one another without gaps.

Time is walked in chunks where the whole does not have to exist at once: gates_x in inference, d_gates in the backward, and
the float32 copies of bfloat16 and float16. What one product writes, the next then reads from cache, and no call faults in
fresh memory that grows with T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.cells import Cell, Weights, summed_biases
from fused_rnn.dispatch import Kernels
from fused_rnn.memory import empty
from fused_rnn.steps import Steps

States = tuple[Tensor, ...]

# Bytes of one chunk's row buffer: a few second-level caches. At least so many rows, because a product of fewer leaves the
# matrix units waiting for the weights.
_CHUNK_BYTES = 8 << 20
_CHUNK_ROWS = 512

# What the kernels compute in, by the dtype that the tensors are stored in.
COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class Layer:
    """What a call of one layer has besides tensors.

    Attributes:
        cell: which cell.
        kernels: its kernels on the chosen backend.
        steps: which rows a step works on.
        reverse: for each of the D recurrences, whether it walks from the last step to the first.
        cell_states: whether c of every step is a result.
    """

    cell: Cell
    kernels: Kernels
    steps: Steps
    reverse: tuple[bool, ...]
    cell_states: bool = False

    def chunks(self, most_bytes: int, least_rows: int, row_bytes: int, backwards: bool) -> Iterator[tuple[int, int]]:
        """Cut the steps into chunks of about so many bytes: (t_begin, t_end), first to last or last to first."""
        rows = max(least_rows, most_bytes // row_bytes)
        length = max(1, rows // max(1, self.steps.batch))
        starts = range(0, self.steps.length, length)
        for t in reversed(starts) if backwards else starts:
            yield t, min(t + length, self.steps.length)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes as long as an allocation even where it changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def compute_weights(weights: Sequence[Weights], dtype: torch.dtype) -> list[Weights]:
    """The weights in the dtype that the kernels compute in."""
    if weights[0].hh.dtype == dtype:
        return list(weights)
    return [
        Weights(
            weight.ih.to(dtype), weight.hh.to(dtype), *(None if tensor is None else tensor.to(dtype) for tensor in weight[2:])
        )
        for weight in weights
    ]


def copied(states: States, dtype: torch.dtype) -> States:
    """States for a kernel to write over: contiguous, in the dtype that it computes in."""
    if states[0].dtype == dtype:
        return tuple([state.clone(memory_format=torch.contiguous_format) for state in states])
    return tuple([state.to(dtype, memory_format=torch.contiguous_format) for state in states])


def pack(layer: Layer, weights: Sequence[Weights], backward: bool, with_input: bool = False) -> object:
    """What the kernels of ``layer`` read in place of these weights: the backward's product, or the forward's."""
    projections = [weight.hr for weight in weights if weight.hr is not None]
    extra = ([weight.ih for weight in weights],) if with_input else ()
    return layer.kernels.pack([weight.hh for weight in weights], projections or None, layer.steps, backward, *extra)


def _one_step(
    layer: Layer, input: Tensor, states: States, weights: Sequence[Weights], reset: Tensor | None
) -> tuple[Tensor, States] | None:
    """One step of one recurrence in the backend's own way, or None where that does not apply."""
    whole = layer.steps.dense and len(weights) == 1 and reset is None and COMPUTE[input.dtype] == input.dtype
    if layer.cell_states or not whole or layer.kernels.step is None:
        return None
    *four, projection = weights[0]
    taken: tuple[Tensor, States] | None = None
    if projection is None:
        taken = layer.kernels.step(layer.cell.name, input.unsqueeze(0), states, four, False)
    # In place: an output that is a view made in an autograd Function cannot be changed in place.
    return None if taken is None else (taken[0].squeeze_(0), taken[1])


def _whole(
    layer: Layer, input: Tensor, states: States, weights: Sequence[Weights], reset: Tensor | None, keep: bool
) -> tuple[Tensor, States, Tensor | None]:
    """As ``forward``, with a backend that takes the input's product and the walk together."""
    cell, rows, recurrences = layer.cell, input.shape[0], len(weights)
    # Two-dimensional from the start: an output that is a view made in an autograd Function cannot be changed in place.
    result = input.new_empty((rows, recurrences * weights[0].hh.shape[1]))
    given = (input, states, weights, reset, keep or layer.cell_states, result)
    ends, tape = layer.kernels.whole_forward(cell, layer.steps, layer.reverse, *given)  # type: ignore[misc]
    if layer.cell_states:
        hidden = weights[0].hh.shape[0] // cell.num_gates
        first = cell.tape.index(cell.cell_state) * hidden
        ends = (*ends, tape[..., first : first + hidden].reshape(rows, recurrences * hidden))
    return result, ends, tape if keep and not cell.tape_is_out else None


def forward(
    layer: Layer,
    input: Tensor,
    states: States,
    weights: Sequence[Weights],
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, States, Tensor | None]:
    """Compute a layer.

    Args:
        input: (R, I).
        states: h (D, N, P) and for the LSTM c (D, N, H).
        weights: the parameters of the D recurrences.
        reset: (R,) bool, or None.
        keep: whether a backward will follow.

    Returns:
        out (R, D·P); the states after the walk, and with ``layer.cell_states`` c of every step, (R, D·H); and the tape,
        (R, D, tape blocks·H) in the dtype of the input, or None where it is not kept or is the output.
    """
    if layer.kernels.whole_forward is not None:
        return _whole(layer, input, states, weights, reset, keep)
    cell, steps = layer.cell, layer.steps
    storage, device = input.dtype, input.device
    if steps.length == 1 and not keep:
        taken = _one_step(layer, input, states, weights, reset)
        if taken is not None:
            return (*taken, None)
    rows, recurrences = input.shape[0], len(weights)
    gates, output = weights[0].hh.shape
    exact = COMPUTE[storage]
    compute = exact
    columns = len(cell.tape) * (gates // cell.num_gates)

    weights = compute_weights(weights, compute)
    bias = summed_biases(cell, weights, exact)
    ends = copied(states, exact)
    # Two-dimensional from the start: an output that is a view made in an autograd Function cannot be changed in place.
    result = empty((rows, recurrences * output), storage, device)
    out = result.view(rows, recurrences, output)
    tape = empty((rows, recurrences, columns), storage, device) if keep and not cell.tape_is_out else None

    hidden = gates // cell.num_gates
    # A copy, which the caller may change; the kernel writes c where it writes the whole tape.
    cells = empty((rows, recurrences * hidden), storage, device) if layer.cell_states else None
    write_tape = keep or cells is not None

    def copy_cells(tape: Tensor | None, span: slice, recurrence: slice) -> None:
        """Take c of these rows and recurrences, where it is wanted, from what the kernel wrote."""
        if cells is not None and tape is not None:
            first = cell.tape.index(cell.cell_state) * hidden
            cells.view(rows, recurrences, hidden)[span, recurrence] = tape[..., first : first + hidden]

    def results() -> tuple[Tensor, States, Tensor | None]:
        after = ends if storage == exact else tuple([end.to(storage) for end in ends])
        return result, after if cells is None else (*after, cells), tape

    takes_input = layer.kernels.takes_input is not None and layer.kernels.takes_input(steps, weights[0])
    if takes_input and storage == compute and (keep or cells is None):
        packed = pack(layer, weights, backward=False, with_input=True)
        kept = out if cell.tape_is_out else tape
        layer.kernels.forward(kept, out, ends, packed, bias, steps, layer.reverse, reset, keep, input)
        copy_cells(kept, slice(None), slice(None))
        return results()

    # Whole, where nothing would be gained by chunks: the tape is kept anyway, or all of it is small.
    row_bytes = columns * compute.itemsize
    small = cell.tape_is_out or keep or rows * recurrences * row_bytes <= _CHUNK_BYTES
    if storage == compute and small:
        whole = out if cell.tape_is_out else empty((rows, recurrences, columns), storage, device) if tape is None else tape
        for d, weight in enumerate(weights):
            layer.kernels.project(input, weight.ih, whole[:, d, :gates])
        packed = pack(layer, weights, backward=False)
        layer.kernels.forward(whole, out, ends, packed, bias, steps, layer.reverse, reset, write_tape)
        copy_cells(whole, slice(None), slice(None))
        return results()

    workspace: Tensor | None = None
    for d, (weight, backwards) in enumerate(zip(weights, layer.reverse, strict=True)):
        packed = pack(layer, [weight], backward=False, with_input=takes_input)
        for t_begin, t_end in layer.chunks(_CHUNK_BYTES, _CHUNK_ROWS, row_bytes, backwards):
            part, span = steps.part(t_begin, t_end), steps.rows(t_begin, t_end)
            n = span.stop - span.start
            if workspace is None or workspace.shape[0] < n:
                workspace = empty((n, 1, columns), compute, device)
            chunk = workspace[:n]
            x = input[span].to(compute)
            if not takes_input:
                layer.kernels.project(x, weight.ih, chunk[:, 0, :gates])
            chunk_out = out[span, d : d + 1]
            if cell.tape_is_out:
                chunk_out = chunk
            elif storage != compute:
                chunk_out = torch.empty((n, 1, output), dtype=compute, device=device)
            layer.kernels.forward(
                chunk,
                chunk_out,
                tuple(end[d : d + 1] for end in ends),
                packed,
                None if bias is None else bias[d : d + 1],
                part,
                (backwards,),
                None if reset is None else reset[span],
                write_tape,
                *((x,) if takes_input else ()),
            )
            copy_cells(chunk, span, slice(d, d + 1))
            if storage != compute:
                out[span, d : d + 1] = chunk_out
                if tape is not None:
                    tape[span, d : d + 1] = chunk
    return results()
