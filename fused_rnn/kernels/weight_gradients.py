"""The products around a walk: gradients of the weights, over the rows of many steps, in plain torch.

Weight gradients are a few large products over all rows of a stretch of time, never one per step and never atomic: the same bits
at every run with the same number of threads. Legend as in ``fused_rnn.kernels.protocol``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps, keep_if_captured
from fused_rnn.kernels.memory import empties, empty
from fused_rnn.kernels.protocol import COMPUTE, LayerCall

# As ``weight_gradient``.
Product = Callable[[Tensor, Sequence[Tensor], Tensor | None, Tensor | None, bool], None]


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes as long as an allocation even where it changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """Write left · right to ``out``, or add it, with torch's matrix product."""
    if add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def weight_gradient(
    d_gates: Tensor, inputs: Sequence[Tensor], d_weight: Tensor | None, d_bias: Tensor | None, add: bool
) -> None:
    """Sum a weight's gradient over the rows of many steps, with torch's matrix product.

    Args:
        d_gates: (n, M): gradients of the gates, contiguous in their columns.
        inputs: what the weight multiplied in these rows, one part after another: n rows of K columns in all.
        d_weight: (M, K), d_gatesᵀ · inputs, or None.
        d_bias: (M,), the sums of the columns of d_gates, or None.
        add: whether the results are added to what is there, or written over it.
    """
    if d_weight is not None:
        row = 0
        for part in inputs:
            rows = d_gates[row : row + part.shape[0]]
            if add or row:
                d_weight.addmm_(rows.t(), part)
            else:
                torch.mm(rows.t(), part, out=d_weight)
            row += part.shape[0]
    if d_bias is not None and add:
        d_bias.add_(d_gates.sum(0))
    elif d_bias is not None:
        torch.sum(d_gates, 0, out=d_bias)


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
class PreviousH:
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


def operand_of(cell: Cell, tape: Tensor) -> Tensor:
    """What the product of the later gates read, (n, H); ``tape`` are the rows of one recurrence, (n, ·)."""
    assert cell.operand is not None
    return tape.chunk(len(cell.tape), dim=1)[cell.tape.index(cell.operand)]


class WeightGradients:
    """The gradients of one recurrence's parameters, summed over chunks of time."""

    def __init__(
        self, cell: Cell, weight: Weights, wanted: Sequence[bool], dtype: torch.dtype, product: Product = weight_gradient
    ) -> None:
        self.cell, self.weight, self.wanted, self.dtype = cell, weight, Weights(*wanted), dtype  # type: ignore[arg-type]
        self.product = product
        self.hidden = weight.hh.shape[0] // cell.num_gates
        self.begun = False
        # A recurrent part that stays apart (the GRU's hn) has a gradient of its own for its bias.
        self.apart = cell.apart is not None
        biased = self.wanted.bias_ih or self.wanted.bias_hh
        self.ih = self.room(weight.ih.shape) if self.wanted.ih else None
        self.hh = self.room(weight.hh.shape) if self.wanted.hh else None
        self.hr = self.room(weight.hr.shape) if self.wanted.hr and weight.hr is not None else None
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

    def walk(self, d_gates: Tensor, input: Tensor, previous: PreviousH, t_begin: int, t_end: int, tape: Tensor | None) -> None:
        """Add what steps t_begin .. t_end - 1 contribute.

        Args:
            d_gates: (n, columns) of these steps.
            input: (n, I) of these steps.
            tape: (n, columns) of these steps; read for weight_hr and for the operand of later gates.
        """
        add = self.begun
        self.begun = True
        d_gates_x = self.blocks(d_gates, self.cell.gates)
        if self.ih is not None or self.bias_x is not None:
            self.product(d_gates_x, [input], self.ih, self.bias_x, add)
        if self.hh is not None or self.bias_apart is not None:
            inputs = [] if self.hh is None else [in_dtype(part, d_gates.dtype) for part in previous.parts(t_begin, t_end)]
            groups = self.cell.d_hh_groups
            first = 0
            for part in groups:
                d_weight = self.hh
                if d_weight is not None and len(groups) > 1:
                    d_weight = d_weight.narrow(-2, first, len(part) * self.hidden)
                d_bias = self.bias_apart if part == (self.cell.apart,) else None
                if part == self.cell.later and d_weight is not None:
                    assert tape is not None
                    inputs = [in_dtype(operand_of(self.cell, tape), d_gates.dtype)]
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


class GroupedWeightGradients(WeightGradients):
    """As ``WeightGradients``, with the groups as the first dimension of every gradient.

    ``torch.func.vmap`` of a gradient asks for them. The rows of a folded batch (``fused_rnn.graph.batching``) belong to groups:
    row r is of group r modulo their number. One backward of the kernels serves all groups; only the products after it are done
    group by group, as one batched product.
    """

    def __init__(self, groups: int, cell: Cell, weight: Weights, wanted: Sequence[bool], dtype: torch.dtype) -> None:
        self.groups = groups
        super().__init__(cell, weight, wanted, dtype, self._product)

    def room(self, shape: Sequence[int]) -> Tensor:
        """Room for the gradients of a parameter of this shape."""
        return super().room((self.groups, *shape))

    def _by_group(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self.groups, rows.shape[1])

    def _product(
        self, d_gates: Tensor, inputs: Sequence[Tensor], d_weight: Tensor | None, d_bias: Tensor | None, add: bool
    ) -> None:
        """As ``weight_gradient``, for each group."""
        row = 0
        for part in inputs if d_weight is not None else ():
            left = self._by_group(d_gates[row : row + part.shape[0]]).permute(1, 2, 0)
            products = torch.bmm(left, self._by_group(part.to(d_gates.dtype)).transpose(0, 1))
            _put(d_weight, products, add or row > 0)
            row += part.shape[0]
        _put(d_bias, self._by_group(d_gates).sum(0), add)


def _put(total: Tensor | None, values: Tensor, add: bool) -> None:
    if total is not None:
        total.add_(values) if add else total.copy_(values)


def grouped(
    call: LayerCall, out: Tensor, tape: Tensor | None, d_gates: Tensor, wanted: Sequence[bool], groups: int
) -> list[Tensor | None]:
    """The gradients of the weights for each group, from those of the gates; arguments as of a backend's backward.

    Args:
        d_gates: (R, D, ·), in the dtype that the kernels compute in.
    """
    cell, steps = call.layer.cell, call.layer.steps
    rows, recurrences, compute = d_gates.shape[0], len(call.weights), COMPUTE[call.input.dtype]
    input = in_dtype(call.input.reshape(rows, call.input.shape[-1]), compute)
    outs = in_dtype(out.reshape(rows, recurrences, out.shape[-1] // recurrences), compute)
    tapes = None if tape is None else in_dtype(tape, compute)
    found: list[Tensor | None] = []
    for d, weights in enumerate(compute_weights(call.weights, compute)):
        asked = wanted[1 + len(cell.states) + 5 * d :][:5]
        sums = GroupedWeightGradients(groups, cell, weights, asked, call.input.dtype)
        previous = previous_h(call, d, outs[:, d])
        sums.walk(d_gates[:, d], input, previous, 0, steps.length, None if tapes is None else tapes[:, d])
        found += sums.result()
    return found


def previous_h(call: LayerCall, d: int, out: Tensor) -> PreviousH:
    """What recurrence d read before each step; ``out`` are its rows, (R, P)."""
    states, steps = call.states, call.layer.steps
    h_0 = out.new_zeros(steps.batch, out.shape[1]) if states is None else states[0].reshape(-1, steps.batch, out.shape[1])[d]
    return PreviousH(steps, call.layer.reverse[d], out, h_0, None if call.reset is None else call.reset[d])


def compute_weights(weights: Sequence[Weights], dtype: torch.dtype) -> list[Weights]:
    """The weights in the dtype that the kernels compute in."""
    return [Weights(*(None if tensor is None else in_dtype(tensor, dtype) for tensor in weight)) for weight in weights]  # type: ignore[arg-type]
