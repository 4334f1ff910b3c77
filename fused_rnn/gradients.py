"""The backward of one layer around the kernels: d_gates in chunks of time, and the products that follow each chunk.

Weight gradients are a few large products over all rows of a chunk, never one per step and never atomic: the same bits at every
run with the same number of threads. Legend as in ``fused_rnn.kernels``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.cells import Weights
from fused_rnn.layer import COMPUTE, Layer, States, compute_weights, copied, in_dtype, pack
from fused_rnn.memory import empties, empty
from fused_rnn.steps import Steps, keep_if_captured

# A chunk of d_gates. Every chunk adds to the weights' gradients, which are read and written once more for it: below some 2,000
# rows that costs more than what the chunk gains in cache.
_CHUNK_BYTES = 16 << 20
_CHUNK_ROWS = 2048


@dataclass
class Gradients:
    """Gradients of a layer's inputs, None where they were not asked for."""

    input: Tensor | None
    states: States
    weights: list[tuple[Tensor | None, ...]]


def _previous_rows(steps: Steps, reverse: bool) -> Tensor:
    """For each row, the row of the same sequence one step earlier in the walk, or R + j where sequence j starts there: (R,)."""
    assert steps.batch_sizes is not None
    assert steps.offsets is not None
    batch_sizes, offsets = steps.batch_sizes, steps.offsets
    # On the CPU by name, here and below: the default device may be another.
    total = steps.rows(0, steps.length).stop
    t = torch.repeat_interleave(torch.arange(steps.length, device="cpu"), batch_sizes)
    j = torch.arange(len(t), device="cpu") - torch.repeat_interleave(torch.cumsum(batch_sizes, 0) - batch_sizes, batch_sizes)
    before = t + 1 if reverse else t - 1
    inside = (before >= 0) & (before < steps.length)
    before = before.clamp(0, steps.length - 1)
    has = inside & (j < batch_sizes[before])
    previous = torch.zeros(total, dtype=torch.int64, device="cpu")
    previous[offsets[t] + j] = torch.where(has, offsets[before] + j, total + j)
    return previous


@functools.lru_cache(maxsize=8)
def _previous_rows_there(batch_sizes: bytes, batch: int, reverse: bool, device: torch.device) -> Tensor:
    """The same on a GPU; kept, because a CUDA graph cannot hold copies from the host: what ran before a capture has made it."""
    sizes = torch.frombuffer(bytearray(batch_sizes), dtype=torch.int64)
    return _previous_rows(Steps.packed(sizes, batch), reverse).to(device)


empties(_previous_rows_there.cache_clear)


@dataclass
class _PreviousH:
    """h before each step of one recurrence, the other factor of weight_hh's gradient.

    Attributes:
        out: the recurrence's h of all steps, (R, P).
        h_0: (N, P).
    """

    steps: Steps
    reverse: bool
    out: Tensor
    h_0: Tensor
    reset: Tensor | None
    index: Tensor | None = None

    def _index(self) -> Tensor:
        sizes = self.steps.batch_sizes
        if sizes is None or not self.out.is_cuda:
            return _previous_rows(self.steps, self.reverse)
        index = _previous_rows_there(sizes.numpy().tobytes(), self.steps.batch, self.reverse, self.out.device)
        keep_if_captured(index, index.device)
        return index

    def parts(self, t_begin: int, t_end: int) -> list[Tensor]:
        """Return h before each row of steps t_begin .. t_end - 1, in parts that follow one another: (·, P) each."""
        span = self.steps.rows(t_begin, t_end)
        batch = self.steps.batch
        if self.steps.dense:
            # Views of the output, one step off; only the first step of the walk starts from h_0.
            if self.reverse and t_end < self.steps.length:
                parts = [self.out[span.start + batch : span.stop + batch]]
            elif self.reverse:
                parts = [self.out[span.start + batch : span.stop], self.h_0]
            elif t_begin > 0:
                parts = [self.out[span.start - batch : span.stop - batch]]
            else:
                parts = [self.h_0, self.out[span.start : span.stop - batch]]
            if self.reset is None:
                return parts
            # On the device alone, so that a CUDA graph can hold it.
            moved = torch.cat([in_dtype(part, self.out.dtype) for part in parts])
            return [moved.masked_fill_(self.reset[span, None], 0)]
        if self.index is None:
            self.index = self._index()
        index = self.index[span]
        total = self.steps.rows(0, self.steps.length).stop
        if self.out.is_cuda:
            # Without a question of how many rows start, which the host would wait for.
            previous = torch.cat((self.out, in_dtype(self.h_0, self.out.dtype))).index_select(0, index)
            return [previous if self.reset is None else previous.masked_fill_(self.reset[span, None], 0)]
        starts = index >= total
        previous = self.out.index_select(0, index.masked_fill(starts, 0))
        previous[starts] = self.h_0[index[starts] - total].to(previous.dtype)
        if self.reset is not None:
            previous[self.reset[span]] = 0
        return [previous]


class WeightGradients:
    """The gradients of one recurrence's parameters, summed over chunks of time."""

    def __init__(self, layer: Layer, weight: Weights, wanted: Weights, dtype: torch.dtype) -> None:
        self.cell, self.weight, self.wanted, self.dtype = layer.cell, weight, wanted, dtype
        self.product = layer.kernels.weight_gradient
        self.hidden = weight.hh.shape[0] // layer.cell.num_gates
        self.begun = False
        # A recurrent part that stays apart (the GRU's hn) has a gradient of its own for its bias.
        self.apart = layer.cell.apart is not None
        biased = wanted.bias_ih or wanted.bias_hh
        self.ih = self.room(weight.ih.shape) if wanted.ih else None
        self.hh = self.room(weight.hh.shape) if wanted.hh else None
        self.hr = self.room(weight.hr.shape) if wanted.hr and weight.hr is not None else None
        self.bias_x = self.room(weight.hh.shape[:1]) if biased else None
        self.bias_apart = self.room((self.hidden,)) if biased and self.apart else None

    def room(self, shape: Sequence[int]) -> Tensor:
        """Room for the gradient of a parameter of this shape."""
        return empty(shape, self.weight.hh.dtype, self.weight.hh.device)

    def blocks(self, d_gates: Tensor, names: Sequence[str]) -> Tensor:
        """Neighbouring blocks of d_gates."""
        width = len(names) * self.hidden
        if width == d_gates.shape[1]:
            return d_gates
        first = self.cell.d_gates.index(names[0]) * self.hidden
        return d_gates[:, first : first + width]

    def walk(self, d_gates: Tensor, input: Tensor, previous: _PreviousH, t_begin: int, t_end: int, tape: Tensor | None) -> None:
        """Add what steps t_begin .. t_end - 1 contribute.

        Args:
            d_gates: (n, columns) of these steps.
            input: (n, I) of these steps.
            tape: (n, columns) of these steps; read for weight_hr alone, None without.
        """
        add = self.begun
        self.begun = True
        d_gates_x = self.blocks(d_gates, self.cell.gates)
        if self.ih is not None or self.bias_x is not None:
            self.product(d_gates_x, [input], self.ih, self.bias_x, add)
        if self.hh is not None or self.bias_apart is not None:
            inputs = [] if self.hh is None else [in_dtype(part, d_gates.dtype) for part in previous.parts(t_begin, t_end)]
            first = 0
            for part in self.cell.d_hh_groups:
                d_weight = self.hh
                if d_weight is not None and self.apart:
                    d_weight = d_weight.narrow(-2, first, len(part) * self.hidden)
                d_bias = self.bias_apart if part == (self.cell.apart,) else None
                self.product(self.blocks(d_gates, part), inputs, d_weight, d_bias, add)
                first += len(part) * self.hidden
        if self.hr is not None and tape is not None and self.cell.projected is not None:
            before = self.cell.projected(tape.chunk(len(self.cell.tape), dim=1))
            self.product(d_gates[:, len(self.cell.d_gates) * self.hidden :], [before], self.hr, None, add)

    def result(self) -> tuple[Tensor | None, ...]:
        """The gradients in torch's shapes and the parameters' dtype, in the places of ``Weights``."""
        bias_hh = None
        if self.bias_x is not None and self.wanted.bias_hh:
            # A tensor of its own even where the values are the same: two parameters must not share a .grad.
            apart = self.bias_apart
            gates = self.bias_x[..., : -self.hidden]
            bias_hh = self.bias_x.clone() if apart is None else torch.cat((gates, apart), dim=-1)
        grads = (self.ih, self.hh, self.bias_x if self.wanted.bias_ih else None, bias_hh, self.hr)
        if self.weight.ih.dtype == self.dtype:
            return grads
        return tuple(None if grad is None else grad.to(self.dtype) for grad in grads)


def _whole(
    layer: Layer,
    input: Tensor,
    states: States,
    weights: Sequence[Weights],
    reset: Tensor | None,
    out: Tensor,
    tape: Tensor | None,
    d_out: Tensor | None,
    d_ends: Sequence[Tensor | None],
    input_wanted: bool,
    weights_wanted: Sequence[Weights],
    collect: Callable[[Layer, Weights, Weights, torch.dtype], WeightGradients],
) -> Gradients:
    """As ``backward``, with a backend that walks whole layers in the dtype that is stored."""
    cell, steps, recurrences = layer.cell, layer.steps, len(weights)
    flat, out = out, out.view(input.shape[0], recurrences, -1)
    d_cells = d_ends[len(states)] if layer.cell_states else None
    given = (input, states, weights, reset, out, tape, d_out, d_cells, d_ends[: len(states)])
    d_gates, d_states = layer.kernels.whole_backward(cell, steps, layer.reverse, *given)  # type: ignore[misc]
    d_input = torch.empty_like(input) if input_wanted else None
    grads = []
    for d, (weight, wanted) in enumerate(zip(weights, weights_wanted, strict=True)):
        sums = collect(layer, weight, wanted, input.dtype)
        previous = _PreviousH(steps, layer.reverse[d], flat if recurrences == 1 else out[:, d], states[0][d], reset)
        sums.walk(d_gates[:, d], input, previous, 0, steps.length, None if weight.hr is None or tape is None else tape[:, d])
        if d_input is not None:
            layer.kernels.multiply(sums.blocks(d_gates[:, d], cell.gates), weight.ih, d_input, d > 0)
        grads.append(sums.result())
    return Gradients(d_input, d_states, grads)


def backward(
    layer: Layer,
    input: Tensor,
    states: States,
    weights: Sequence[Weights],
    reset: Tensor | None,
    out: Tensor,
    tape: Tensor | None,
    d_out: Tensor | None,
    d_ends: Sequence[Tensor | None],
    input_wanted: bool,
    weights_wanted: Sequence[Weights],
    collect: Callable[[Layer, Weights, Weights, torch.dtype], WeightGradients] = WeightGradients,
) -> Gradients:
    """Compute the gradients of a layer.

    Args:
        input, states, weights, reset: as in ``forward``.
        out: (R, D·P), as ``forward`` returned it; tape likewise, or None where it is the output.
        d_out: (R, D·P), or None for zero.
        d_ends: the gradients of the states after the walk, and with ``layer.cell_states`` that of c of every step, each None
            for zero.
        input_wanted: whether the input's gradient is wanted.
        weights_wanted: for each parameter, whether its gradient is wanted (booleans in the places of the tensors).
        collect: what sums the gradients of one recurrence's parameters.
    """
    if layer.kernels.whole_backward is not None:
        return _whole(layer, input, states, weights, reset, out, tape, d_out, d_ends, input_wanted, weights_wanted, collect)
    cell, steps = layer.cell, layer.steps
    storage, device = input.dtype, input.device
    exact = COMPUTE[storage]
    compute = exact
    rows, recurrences = input.shape[0], len(weights)
    hidden, output = weights[0].hh.shape[0] // cell.num_gates, weights[0].hh.shape[1]
    columns = len(cell.d_gates) * hidden + (0 if weights[0].hr is None else output)

    weights = compute_weights(weights, compute)
    d_cells = d_ends[len(states)] if layer.cell_states else None
    states_0 = tuple([in_dtype(state, exact).contiguous() for state in states])
    d_states = tuple(
        [
            torch.zeros_like(state) if d_end is None else copied((d_end,), exact)[0]
            for state, d_end in zip(states_0, d_ends[: len(states)], strict=True)
        ]
    )
    flat, out = out, out.view(rows, recurrences, output)
    tape = out if tape is None else tape
    if d_out is not None:
        d_out = d_out.resolve_neg().contiguous().view(rows, recurrences, output)
    if d_cells is not None:
        d_cells = d_cells.resolve_neg().contiguous().view(rows, recurrences, hidden)
    d_input = empty(input.shape, compute, device) if input_wanted else None
    sums = [collect(layer, w, wanted, storage) for w, wanted in zip(weights, weights_wanted, strict=True)]

    # The kernels form the input's gradient as they walk, where a single recurrence makes it.
    takes = layer.kernels.takes_input
    takes_input = d_input is not None and recurrences == 1 and takes is not None and takes(steps, weights[0])

    def finish(d: int, d_gates: Tensor, t_begin: int, t_end: int, h: _PreviousH, tape: Tensor | None) -> None:
        """The products of recurrence d after steps t_begin .. t_end - 1; d_gates and tape hold these steps' rows alone."""
        x, d_x = input, d_input
        if t_end - t_begin < steps.length:
            span = steps.rows(t_begin, t_end)
            x, d_x = x[span], None if d_x is None else d_x[span]
        sums[d].walk(d_gates, in_dtype(x, compute), h, t_begin, t_end, tape)
        if d_x is not None and not takes_input:
            d_gates_x = sums[d].blocks(d_gates, cell.gates)
            layer.kernels.multiply(d_gates_x, weights[d].ih, d_x, d > 0)

    previous = [
        _PreviousH(steps, backwards, flat if recurrences == 1 else out[:, d], states_0[0][d], reset)
        for d, backwards in enumerate(layer.reverse)
    ]
    row_bytes = columns * compute.itemsize
    if storage == compute and rows * recurrences * row_bytes <= _CHUNK_BYTES:
        whole = empty((rows, recurrences, columns), compute, device)
        packed = pack(layer, weights, backward=True, with_input=takes_input)
        extra = (d_input,) if takes_input else ()
        layer.kernels.backward(
            whole, d_states, d_out, d_cells, tape, out, states_0, packed, steps, 0, steps.length, layer.reverse, reset, *extra
        )
        for d, h in enumerate(previous):
            finish(d, whole[:, d], 0, steps.length, h, None if weights[d].hr is None else tape[:, d])
    else:
        workspace: Tensor | None = None
        for d, (h, backwards) in enumerate(zip(previous, layer.reverse, strict=True)):
            packed = pack(layer, [weights[d]], backward=True, with_input=takes_input)
            for t_begin, t_end in layer.chunks(_CHUNK_BYTES, _CHUNK_ROWS, row_bytes, backwards=not backwards):
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
                layer.kernels.backward(
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
                    None if reset is None else reset[near],
                    *((d_input[span],) if d_input is not None and takes_input else ()),
                )
                own = slice(span.start - near.start, span.stop - near.start)
                finish(d, workspace[:n, 0], t_begin, t_end, h, tape_near[own, 0])
    if storage != exact:
        d_input = None if d_input is None else d_input.to(storage)
        d_states = tuple([d_state.to(storage) for d_state in d_states])
    return Gradients(d_input, d_states, [each.result() for each in sums])
