"""A whole layer on this backend, each way: few launches, because at short sequences the host is what takes the time.

The forward is the input's product and a walk; the backward a walk and the products of the gradients. States, biases and their
gradients are read and written by the walk as they are, where its kernels can (``recurrence``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.data.biases import summed_biases
from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.protocol import COMPUTE, LayerCall, LayerResult, OutputGradients, States
from fused_rnn.kernels.triton import products
from fused_rnn.kernels.triton.derived import recurrence_of
from fused_rnn.kernels.triton.plan import refusal
from fused_rnn.kernels.triton.recurrence import RECURRENCES, Bias, Packed, Recurrence, compute_dtype
from fused_rnn.kernels.weight_gradients import WeightGradients, grouped, operand_of, previous_h


def _packed(recurrence: Recurrence, steps: Steps, weights: Sequence[Weights], backward: bool) -> Packed:
    projections = [weight.hr for weight in weights if weight.hr is not None]
    return recurrence.pack([weight.hh for weight in weights], projections or None, steps, backward)


def _bias(cell: Cell, weights: Sequence[Weights], packed: Packed) -> Bias:
    """The biases as the walk takes them."""
    pairs = []
    for weight in weights:
        if not packed.plan.fragments or weight.bias_ih is None or weight.bias_hh is None:
            return summed_biases(cell, weights, compute_dtype(weights[0].hh.dtype))
        pairs.append((weight.bias_ih.contiguous(), weight.bias_hh.contiguous()))
    return pairs


def walk_forward(
    cell: Cell,
    steps: Steps,
    reverse: Sequence[bool],
    input: Tensor,
    states: States | None,
    weights: Sequence[Weights],
    reset: Tensor | None,
    keep: bool,
    result: Tensor,
) -> tuple[States, Tensor]:
    """Compute a layer into ``result``; as a backend's ``whole_forward``. states: None for zero."""
    rows, recurrences = input.shape[0], len(weights)
    recurrence = RECURRENCES.get(cell.name) or recurrence_of(cell)
    gates, output = weights[0].hh.shape
    hidden = gates // cell.num_gates
    packed = _packed(recurrence, steps, weights, backward=False)
    out = result.view(rows, recurrences, output)
    tape = out if cell.tape_is_out else input.new_empty((rows, recurrences, len(cell.tape) * hidden))
    for d, weight in enumerate(weights):
        products.multiply(input, weight.ih.t(), out=tape[:, d, :gates])
    bias = _bias(cell, weights, packed)
    walk = (packed, bias, steps, reverse, reset, keep)
    if packed.plan.fragments:
        sizes = (recurrences, steps.batch, hidden)
        before = None if states is None else tuple([state.contiguous() for state in states])
        ends = tuple([input.new_empty(sizes) for _ in cell.states])
        recurrence.forward(tape, out, before, ends, *walk)
        if steps.batch_sizes is not None and before is not None:
            _keep_unwalked(steps, before, ends)
        return ends, tape
    exact = compute_dtype(input.dtype)
    if states is None:
        states = tuple(input.new_zeros((recurrences, steps.batch, hidden)) for _ in cell.states)
    ends = tuple(state.to(exact, memory_format=torch.contiguous_format, copy=True) for state in states)
    recurrence.forward(tape, out, ends, ends, *walk)
    return tuple(end.to(input.dtype) for end in ends), tape


def _keep_unwalked(steps: Steps, before: States, after: States) -> None:
    """A sequence without a step keeps its state, which no walk writes."""
    sizes = steps.batch_sizes
    walked = int(sizes[0]) if sizes is not None and len(sizes) else 0
    if walked < steps.batch:
        for state, end in zip(before, after, strict=True):
            end[:, walked:] = state[:, walked:]


def walk_backward(
    cell: Cell,
    steps: Steps,
    reverse: Sequence[bool],
    input: Tensor,
    states: States | None,
    weights: Sequence[Weights],
    reset: Tensor | None,
    out: Tensor,
    tape: Tensor | None,
    d_out: Tensor | None,
    d_cells: Tensor | None,
    d_ends: Sequence[Tensor | None],
) -> tuple[Tensor, States]:
    """Walk a layer back; as a backend's ``whole_backward``. states: None for zero."""
    rows, recurrences = input.shape[0], len(weights)
    recurrence = RECURRENCES.get(cell.name) or recurrence_of(cell)
    hidden, output = weights[0].hh.shape[0] // cell.num_gates, weights[0].hh.shape[1]
    packed = _packed(recurrence, steps, weights, backward=True)
    saved = out if tape is None else tape
    d_out, d_cells, *ends = [None if each is None else each.resolve_neg().contiguous() for each in (d_out, d_cells, *d_ends)]
    d_out = None if d_out is None else d_out.view(rows, recurrences, output)
    d_cells = None if d_cells is None else d_cells.view(rows, recurrences, hidden)
    columns = len(cell.d_gates) * hidden + (0 if weights[0].hr is None else output)
    d_gates = input.new_empty((rows, recurrences, columns))
    before = None if states is None else tuple([state.contiguous() for state in states])
    walked = (packed, steps, 0, steps.length, reverse, reset)
    if packed.plan.fragments:
        d_states = tuple([input.new_empty((recurrences, steps.batch, hidden)) for _ in cell.states])
        recurrence.backward(d_gates, ends, d_states, d_out, d_cells, saved, out, before, *walked)
        return d_gates, d_states
    exact = compute_dtype(input.dtype)
    if before is None:
        before = tuple(input.new_zeros((recurrences, steps.batch, hidden)) for _ in cell.states)
    inner = tuple(
        torch.zeros_like(state, dtype=exact) if d_end is None else d_end.to(exact, copy=True)
        for state, d_end in zip(before, ends, strict=True)
    )
    before = tuple(state.to(exact) for state in before)
    recurrence.backward(d_gates, inner, inner, d_out, d_cells, saved, out, before, *walked)
    return d_gates, tuple(d_state.to(input.dtype) for d_state in inner)


def forward(call: LayerCall, keep: bool, batch_first: bool = False) -> LayerResult:
    """Compute a layer; as a backend's forward (``fused_rnn.kernels.protocol``)."""
    (cell, _, steps, reverse, cell_states, step), input, states, weights, reset = plain(call)
    recurrences, output = len(weights), weights[0].hh.shape[1]
    leading = call.input.shape[:-1]
    out = input.new_empty((*leading, recurrences * output))
    # The caller records the graph: here products have an ``out``, which autograd refuses.
    with torch.no_grad():
        keeps = keep or cell_states
        if reset is None or recurrences == 1:
            mask = None if reset is None else reset[0]
            ends, tape = walk_forward(cell, steps, reverse, input, states, weights, mask, keeps, out)
        else:
            ends, tape = _one_by_one(call, input, out, keeps)
        cells = None
        if cell_states and cell.cell_state is not None:
            # A copy, which the caller may change, in its shape from the start.
            block = _block(cell, tape, cell.cell_state)
            cells = input.new_empty((*leading, block.shape[1] * block.shape[2]))
            cells.view(block.shape).copy_(block)
    if step:
        # h after the step is the output. In place: a view made in an autograd Function cannot be changed in place.
        ends = tuple(end.squeeze_(0) for end in ends[1:])
    if batch_first:
        for each in (out, cells):
            if each is not None:
                each.transpose_(0, 1)
    return LayerResult(out, ends, cells, tape if keep and not cell.tape_is_out else None)


def _one_by_one(call: LayerCall, input: Tensor, out: Tensor, keep: bool) -> tuple[States, Tensor]:
    """The forward of recurrences that differ in their resets: a walk takes one mask."""
    layer, _, states, weights, reset = call
    rows = out.view(input.shape[0], len(weights), -1)
    walked = []
    for d, weight in enumerate(weights):
        mine = torch.empty_like(rows[:, d], memory_format=torch.contiguous_format)
        before = None if states is None else tuple(state[d : d + 1] for state in states)
        mask = None if reset is None else reset[d]
        walked.append(
            walk_forward(layer.cell, layer.steps, layer.reverse[d : d + 1], input, before, [weight], mask, keep, mine)
        )
        rows[:, d] = mine
    ends = tuple(torch.cat(parts) for parts in zip(*(each[0] for each in walked), strict=True))
    return ends, torch.cat([each[1] for each in walked], dim=1)


def _block(cell: Cell, tape: Tensor, name: str) -> Tensor:
    """A block of the tape, (R, D, H)."""
    hidden = tape.shape[2] // len(cell.tape)
    first = cell.tape.index(name) * hidden
    return tape[..., first : first + hidden]


def backward(
    call: LayerCall,
    out: Tensor,
    tape: Tensor | None,
    gradients: OutputGradients,
    wanted: Sequence[bool],
    groups: int | None,
) -> Sequence[Tensor | None]:
    """The gradients of a layer; as a backend's backward."""
    (cell, _, steps, reverse, _, step), input, states, weights, reset = in_rows = plain(call)
    rows, recurrences, count = input.shape[0], len(weights), len(cell.states)
    d_out, d_after, d_cells = gradients
    if step:
        d_after = (None, *(None if each is None else each.unsqueeze(0) for each in d_after))
    # A map over gradients gives one forward to all of its members: of a single row these are views without a stride.
    outs, tape = out.contiguous().view(rows, recurrences, -1), None if tape is None else tape.contiguous()
    with torch.no_grad():
        if reset is None or recurrences == 1:
            mask = None if reset is None else reset[0]
            given = (input, states, weights, mask, outs, tape, d_out, d_cells, d_after)
            d_gates, d_states = walk_backward(cell, steps, reverse, *given)
        else:
            d_gates, d_states = _back_one_by_one(in_rows, outs, tape, d_out, d_cells, d_after)
        hidden = weights[0].hh.shape[0] // cell.num_gates
        first = (len(cell.d_gates) - cell.num_gates) * hidden
        d_input = None
        if wanted[0]:
            d_input = torch.empty_like(call.input, memory_format=torch.contiguous_format)
            for d, weight in enumerate(weights):
                gates = d_gates[:, d, first : first + cell.num_gates * hidden]
                products.multiply(gates, weight.ih, d_input.view(rows, -1), d > 0)
        before = [grad if asked else None for grad, asked in zip(d_states, wanted[1:], strict=False)]
        if step:
            before = [None if grad is None else grad.squeeze(0) for grad in before]
        asked = wanted[1 + count :]
        if not any(asked):
            return (d_input, *before, *(None,) * len(asked))
        if groups is not None:
            return (d_input, *before, *grouped(in_rows, out, tape, d_gates, wanted, groups))
        simple = recurrences == 1 and steps.dense and reset is None and not reverse[0] and weights[0].hr is None
        if simple and asked[0] and asked[1]:
            saved = outs if tape is None else tape
            rows_of_one = (outs[:, 0], saved[:, 0], d_gates[:, 0])
            d_weights = _weight_gradients(cell, weights[0], asked, input, states, *rows_of_one, steps.batch)
            return (d_input, *before, *d_weights)
        found: list[Tensor | None] = []
        for d, weight in enumerate(weights):
            sums = WeightGradients(cell, weight, asked[5 * d :][:5], input.dtype, products.weight_gradient)
            kept = None if tape is None else tape[:, d]
            sums.walk(d_gates[:, d], input, previous_h(in_rows, d, outs[:, d]), 0, steps.length, kept)
            found += sums.result()
        return (d_input, *before, *found)


def _back_one_by_one(
    call: LayerCall,
    out: Tensor,
    tape: Tensor | None,
    d_out: Tensor | None,
    d_cells: Tensor | None,
    d_after: Sequence[Tensor | None],
) -> tuple[Tensor, States]:
    """The backward of recurrences that differ in their resets."""
    layer, input, states, weights, reset = call
    number, rows = len(weights), input.shape[0]

    def own(values: Tensor | None, d: int) -> Tensor | None:
        return None if values is None else values.reshape(rows, number, -1)[:, d : d + 1].contiguous()

    walked = []
    for d, weight in enumerate(weights):
        before = None if states is None else tuple(state[d : d + 1] for state in states)
        after = [None if each is None else each[d : d + 1] for each in d_after]
        mask = None if reset is None else reset[d]
        mine = out[:, d : d + 1].contiguous()
        kept = None if tape is None else tape[:, d : d + 1].contiguous()
        given = (input, before, [weight], mask, mine, kept, own(d_out, d), own(d_cells, d), after)
        walked.append(walk_backward(layer.cell, layer.steps, layer.reverse[d : d + 1], *given))
    d_states = tuple(torch.cat(parts) for parts in zip(*(each[1] for each in walked), strict=True))
    return torch.cat([each[0] for each in walked], dim=1), d_states


def plain(call: LayerCall) -> LayerCall:
    """The same layer with an input (R, I), states (D, N, ·) each, and tensors whose memory holds the numbers."""
    layer, input, states, weights, reset = call
    for tensor in call.operands():
        if tensor is not None and tensor.is_neg():
            input = input.resolve_neg()
            states = None if states is None else tuple(state.resolve_neg() for state in states)
            weights = [Weights(*(None if each is None else each.resolve_neg() for each in one)) for one in weights]  # type: ignore[arg-type]
            break
    if layer.step and states is not None:
        states = tuple(state.unsqueeze(0) for state in states)
    if input.dim() > 2:
        input = input.reshape(-1, input.shape[-1])
    return LayerCall(layer, input, states, weights, reset)


def _weight_gradients(
    cell: Cell,
    weights: Weights,
    wanted: Sequence[bool],
    input: Tensor,
    states: States | None,
    out: Tensor,
    tape: Tensor,
    d_gates: Tensor,
    batch: int,
) -> tuple[Tensor | None, ...]:
    """The gradients of ih, hh and the biases over dense steps in one direction, in few launches."""
    hidden = out.shape[1]
    gates = d_gates[:, -cell.num_gates * hidden :]
    d_ih, d_hh = torch.empty_like(weights.ih), torch.empty_like(weights.hh)
    products.multiply(gates.t(), input, out=d_ih)
    # h before each step is the output of the step before; the first step has h_0, or zero.
    groups: list[tuple[Tensor, Tensor]] = []
    first = 0
    for names in cell.d_hh_groups:
        begin, rows = cell.d_gates.index(names[0]) * hidden, len(names) * hidden
        part, target = d_gates[:, begin : begin + rows], d_hh[first : first + rows]
        if names == cell.later:
            products.multiply(part.t(), operand_of(cell, tape), out=target)
        else:
            groups.append((part, target))
        first += rows
    for part, target in groups:
        later = part[batch:]
        if len(later):
            products.multiply(later.t(), out[:-batch], out=target)
        elif states is None:
            target.zero_()
        if states is not None:
            products.multiply(part[:batch].t(), states[0][0], out=target, add=len(later) > 0)
    d_bias_ih: Tensor | None = None
    d_bias_hh: Tensor | None = None
    if wanted[2] or wanted[3]:
        if cell.apart is not None and wanted[3]:
            sums = d_gates.sum(0)
            d_bias_ih = sums[hidden:]
            d_bias_hh = torch.cat((sums[hidden:-hidden], sums[:hidden]))
        else:
            d_bias_ih = gates.sum(0)
            # A tensor of its own even where the values are the same: two parameters must not share a .grad.
            d_bias_hh = d_bias_ih.clone()
    return d_ih, d_hh, d_bias_ih if wanted[2] else None, d_bias_hh if wanted[3] else None, None


class Triton:
    """The backend (``fused_rnn.kernels.protocol.Backend``)."""

    name = "triton"
    checks = False
    derives = True
    gives_gates = False

    def supports(self, call: LayerCall) -> str | None:
        """It computes every layer of a cell whose states its walks can carry, on a chip that is new enough."""
        reason = refusal(call.layer.cell)
        if reason is not None:
            return reason
        return None if call.input.dtype in COMPUTE else f"it does not compute in {call.input.dtype}"

    def forward(self, call: LayerCall, keep: bool, batch_first: bool = False) -> LayerResult:
        """Compute a layer."""
        return forward(call, keep, batch_first)

    def backward(
        self,
        call: LayerCall,
        out: Tensor,
        tape: Tensor | None,
        gradients: OutputGradients,
        wanted: Sequence[bool],
        groups: int | None = None,
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of a layer."""
        return backward(call, out, tape, gradients, wanted, groups)
