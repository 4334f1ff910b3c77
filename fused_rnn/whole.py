"""Whole layers, one call of the backend each way: stacks in one direction over dense steps, as most models have them.

The general way (``fused_rnn.functional``, ``fused_rnn.layer``, ``fused_rnn.gradients``) is made of many calls. A walk pushes
the interpreter out of the caches, and it then takes longer for them than a small layer takes for its kernels. Here is only what
such a layer needs; for what is special about a call, now or in its backward, the general way is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import autocast, autograd, batching, checks, dispatch, functional, operators
from fused_rnn.autograd import Kept
from fused_rnn.cells import Cell, Weights
from fused_rnn.derivatives import transformed
from fused_rnn.dispatch import Kernels
from fused_rnn.layer import Layer
from fused_rnn.stack import Options
from fused_rnn.steps import Steps
from fused_rnn.streaming import is_eager

States = tuple[Tensor, ...]

# Of each layer: ih, hh and the two biases or None.
_EACH = 4


class _Call(NamedTuple):
    """A layer's forward, as ``_Whole`` is told of it."""

    cell: Cell
    kernels: Kernels
    out: Tensor
    ends: States
    tape: Tensor | None


def run(
    cell: Cell, input: Tensor, states: States | None, weights: Sequence[Tensor | None], batch_first: bool, dropout: float
) -> tuple[Tensor, States] | None:
    """Run a stack of layers in one direction.

    Args:
        cell: which cell.
        input: (T, N, I), or with ``batch_first`` (N, T, I).
        states: (L, N, H) each, or None for zero.
        weights: ih, hh and the two biases or None of each of the L layers.
        dropout: the probability of zeroing an output of all layers but the last.

    Returns:
        out (T, N, H) or (N, T, H), and the states after the walk; or None where the call is another, or something is wrong with
        it: then no layer has been recorded and nothing drawn at random.
    """
    if not is_eager(input) or input.dim() != 3:
        return None
    kernels = dispatch.kernels(cell, input.device)
    if kernels.layer_forward is None:
        return None
    layers = len(weights) // _EACH
    if states is not None:
        for state in states:
            if not isinstance(state, Tensor) or state.dim() != 3 or state.shape[0] != layers:
                return None
    rows = input.transpose(0, 1).contiguous() if batch_first else input
    ends: list[States] = []
    for layer in range(layers):
        if layer and dropout:
            rows = torch.dropout(rows, dropout, True)
        before = states
        if states is not None and layers > 1:
            before = tuple([state[layer : layer + 1] for state in states])
        taken = _layer(cell, kernels, rows, before, weights[layer * _EACH : (layer + 1) * _EACH])
        if taken is None and layer == 0:
            return None
        rows, end = taken or _rest(cell, rows, states, weights, layer, dropout)
        ends.append(end)
        if taken is None:
            break
    after = ends[0] if len(ends) == 1 else tuple([torch.cat(parts) for parts in zip(*ends, strict=True)])
    return rows.transpose(0, 1) if batch_first else rows, after


def _rest(
    cell: Cell, rows: Tensor, states: States | None, weights: Sequence[Tensor | None], layer: int, dropout: float
) -> tuple[Tensor, States]:
    """Run the layers from ``layer`` on in the general way: what was drawn for dropout before them must not be drawn again."""
    stacked: list[Any] = [Weights(*weights[i : i + _EACH]) for i in range(0, len(weights), _EACH)]  # type: ignore[arg-type]
    # As of a whole stack: of the rest, the first layer's weights would be taken for the module's.
    checks.check_weights(cell, stacked, 1)
    for weight in stacked:
        checks.check_same(rows, "parameter", weight)
    before = None if states is None else tuple([state[layer:] for state in states])
    options = Options(False, False, dropout, True, None, None)
    out, after, _ = functional.sequence(cell, rows, stacked[layer:], before, options)
    return out, after


def _layer(
    cell: Cell, kernels: Kernels, input: Tensor, states: States | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, States] | None:
    """Run one layer, and record it where gradients are wanted: out (T, N, H) and states (1, N, H)."""
    given = states or (None,) * len(cell.states)
    operands = (input, *given, *weights, None)
    recorded = False
    if torch.is_grad_enabled():
        for operand in operands:
            if operand is not None and operand.requires_grad:
                recorded = True
                break
    try:
        computed = kernels.layer_forward(cell.name, input, states, weights, recorded)  # type: ignore[misc]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        # The checks of every other call say what is wrong, in torch's words; or they mend it, as views with another sign.
        return None
    if computed is None:
        return None
    if not recorded:
        return computed[0], computed[1]
    # As _Whole.apply, without binding the arguments to the forward's signature.
    apply = super(torch.autograd.Function, _Whole).apply
    out, *after = apply(_Call(cell, kernels, *computed), *operands)  # type: ignore[no-untyped-call]
    return out, tuple(after)


class _Whole(torch.autograd.Function):
    """A layer whose forward has been computed: operands are the input, the states or None, and ``Weights``."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *operands: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        tensors = list(operands)
        ctx.cell, ctx.kernels = call.cell, call.kernels
        ctx.kept = kept = Kept(call.out, call.cell, tensors, inside_transform=False)
        for place, _, _ in kept.biases:
            tensors[place] = None
        ctx.save_for_backward(call.out.data, call.tape, *tensors)
        return (call.out, *call.ends)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        # Once: hooks of saved tensors may give each away, and non-reentrant checkpoints refuse to be asked twice.
        saved = ctx.saved_tensors
        out, tape, *tensors = saved
        kept: Kept = ctx.kept
        if torch.is_grad_enabled() or transformed() or kept.output_changed() or operators.traced(out, out):
            return _in_general(ctx, saved, d_outputs)
        for place, bias, _ in kept.biases:
            tensors[place] = bias
        taken = _gradients(ctx, out, tape, tensors, d_outputs)
        return _in_general(ctx, saved, d_outputs) if taken is None else (None, *taken, None)


def _gradients(
    ctx: Any, out: Tensor, tape: Tensor | None, tensors: Sequence[Any], d_outputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...] | None:
    """The gradients of all operands but the projection, or None where the backend has them not in one call."""
    count = len(ctx.cell.states)
    wanted = ctx.needs_input_grad[1:]
    input, weights = tensors[0], tensors[1 + count : 1 + count + _EACH]
    weights_wanted = wanted[1 + count]
    for weight, asked in zip(weights, wanted[1 + count :], strict=False):
        if weight is not None and asked is not weights_wanted:
            # Some of the weights are frozen.
            return None
    states = None if tensors[1] is None else tensors[1 : 1 + count]
    d_out, *d_states = [each if each is None or each.is_contiguous() else each.contiguous() for each in d_outputs]
    try:
        taken: tuple[Tensor | None, ...] | None = ctx.kernels.layer_backward(
            ctx.cell.name,
            input,
            states,
            weights,
            out,
            tape,
            d_out,
            d_states,
            wanted[0],
            any(wanted[1 : 1 + count]),
            weights_wanted,
        )
    except (TypeError, ValueError, RuntimeError):
        return None
    return taken


@autocast.without
def _in_general(ctx: Any, saved: Sequence[Any], d_outputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """As ``_Whole.backward``, for any gradients: by rows, as the general way has them."""

    def mapped(*d_outputs: Tensor | None) -> tuple[Any, ...]:
        return _in_general(ctx, saved, d_outputs)

    through = batching.through_vmap(mapped, d_outputs)
    if through is not None:
        return through
    out, tape, input, *tensors = saved
    length, batch, _ = input.shape
    count = len(ctx.cell.states)
    for i in range(count):
        if tensors[i] is None:
            tensors[i] = out.new_zeros((1, batch, out.shape[2]))
    d_out, *d_states = d_outputs
    d_rows = None if d_out is None else d_out.flatten(0, 1)
    call = Layer(ctx.cell, ctx.kernels, Steps(length, batch), (False,))
    d_input, *rest = autograd.layer_backward(
        call,
        ctx.kept,
        None,
        out.flatten(0, 1),
        tape,
        [input.flatten(0, 1), *tensors],
        (d_rows, *d_states),
        ctx.needs_input_grad[1:],
    )
    return (None, None if d_input is None else d_input.view(input.shape), *rest)
