"""A whole layer on this backend, each way: few launches, because at short sequences the host is what takes the time.

The forward is the input's product and a walk; the backward a walk and the products of the gradients. States, biases and their
gradients are read and written by the walk as they are, where its kernels can (``recurrence``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.cells import CELLS, Cell, Weights, summed_biases
from fused_rnn.kernels.triton import products
from fused_rnn.kernels.triton.launch import DTYPES
from fused_rnn.kernels.triton.recurrence import RECURRENCES, Bias, Packed, Recurrence, compute_dtype
from fused_rnn.steps import Steps

States = tuple[Tensor, ...]


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
    recurrence = RECURRENCES[cell.name]
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
    recurrence = RECURRENCES[cell.name]
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


def _is_plain(cell: Cell, input: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor | None]) -> bool:
    """Whether a call is what the short way takes: plain tensors of one dtype on one device, in the sizes that fit."""
    ih, hh = weights[0], weights[1]
    if ih is None or hh is None or input.dtype not in DTYPES or input.dim() != 3 or ih.dim() != 2 or hh.dim() != 2:
        return False
    length, batch, features = input.shape
    gates, hidden = hh.shape
    if gates != cell.num_gates * hidden or tuple(ih.shape) != (gates, features) or 0 in (length, batch, features, hidden):
        return False
    for bias in weights[2:]:
        if bias is not None and tuple(bias.shape) != (gates,):
            return False
    for state in states or ():
        if tuple(state.shape) != (1, batch, hidden):
            return False
    for tensor in (*weights, *(states or ())):
        if tensor is None:
            continue
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype == input.dtype and tensor.device == input.device
        if not plain or tensor.is_neg():
            return False
    return not input.is_neg()


def dense_forward(
    cell_name: str, input: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor | None], keep: bool
) -> tuple[Tensor, States, Tensor | None] | None:
    """Compute a layer in one direction over dense steps; as a backend's ``layer_forward`` (``fused_rnn.kernels``)."""
    cell = CELLS[cell_name]
    if not _is_plain(cell, input, states, weights):
        return None
    length, batch, features = input.shape
    out = input.new_empty((length, batch, weights[1].shape[1]))  # type: ignore[union-attr]
    whole = Weights(*weights)  # type: ignore[arg-type]
    before = None if states is None else tuple(states)
    # The graph is recorded by the caller: here products have an ``out``, which autograd refuses.
    with torch.no_grad():
        rows, steps = input.reshape(length * batch, features), Steps(length, batch)
        ends, tape = walk_forward(cell, steps, (False,), rows, before, [whole], None, keep, out)
    return out, ends, tape if keep and not cell.tape_is_out else None


def dense_backward(
    cell_name: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor | None],
    out: Tensor,
    tape: Tensor | None,
    d_out: Tensor | None,
    d_states: Sequence[Tensor | None],
    input_wanted: bool,
    states_wanted: bool,
    weights_wanted: bool,
) -> tuple[Tensor | None, ...] | None:
    """The gradients of such a layer; as a backend's ``layer_backward`` (``fused_rnn.kernels``)."""
    cell = CELLS[cell_name]
    if not _is_plain(cell, input, states, weights):
        return None
    length, batch, features = input.shape
    steps = Steps(length, batch)
    whole = Weights(*weights)  # type: ignore[arg-type]
    x, hidden = input.reshape(length * batch, features), out.shape[2]
    before = None if states is None else tuple(states)
    rows = out.view(length * batch, 1, hidden)
    d_gates, d_before = walk_backward(cell, steps, (False,), x, before, [whole], None, rows, tape, d_out, None, d_states)
    d_gates = d_gates[:, 0]
    gates = d_gates[:, -cell.num_gates * hidden :]
    d_input = None
    if input_wanted:
        d_input = torch.empty_like(input, memory_format=torch.contiguous_format)
        products.multiply(gates, whole.ih, out=d_input.view(length * batch, features))
    d_weights: tuple[Tensor | None, ...] = (None,) * 4
    if weights_wanted:
        d_weights = _weight_gradients(cell, whole, x, before, rows[:, 0], d_gates, batch)
    return (d_input, *(d_before if states_wanted else (None,) * len(cell.states)), *d_weights)


def _weight_gradients(
    cell: Cell, weights: Weights, input: Tensor, states: States | None, out: Tensor, d_gates: Tensor, batch: int
) -> tuple[Tensor | None, ...]:
    """The gradients of ih, hh and the biases over dense steps in one direction."""
    hidden = out.shape[1]
    gates = d_gates[:, -cell.num_gates * hidden :]
    d_ih, d_hh = torch.empty_like(weights.ih), torch.empty_like(weights.hh)
    products.multiply(gates.t(), input, out=d_ih)
    # h before each step is the output of the step before; the first step has h_0, or zero.
    groups, first = [], 0
    for names in cell.d_hh_groups:
        begin, rows = cell.d_gates.index(names[0]) * hidden, len(names) * hidden
        groups.append((d_gates[:, begin : begin + rows], d_hh[first : first + rows]))
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
    if weights.bias_ih is not None or weights.bias_hh is not None:
        if cell.apart is not None and weights.bias_hh is not None:
            sums = d_gates.sum(0)
            d_bias_ih = sums[hidden:]
            d_bias_hh = torch.cat((sums[hidden:-hidden], sums[:hidden]))
        else:
            d_bias_ih = gates.sum(0)
            # A tensor of its own even where the values are the same: two parameters must not share a .grad.
            d_bias_hh = d_bias_ih.clone()
    return (
        d_ih, d_hh, d_bias_ih if weights.bias_ih is not None else None, d_bias_hh if weights.bias_hh is not None else None,
    )  # fmt: skip
