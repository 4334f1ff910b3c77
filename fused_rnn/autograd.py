"""One autograd Function for every cell and backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_rnn import autocast, batching, derivatives, dispatch, gradients, operators, reference
from fused_rnn import layer as layers
from fused_rnn.batching import BackwardCall
from fused_rnn.cells import Cell, Weights, split
from fused_rnn.derivatives import transformed
from fused_rnn.gradients import WeightGradients
from fused_rnn.layer import Layer, States
from fused_rnn.per_sample import GroupedWeightGradients
from fused_rnn.steps import Steps, unwrapped

# Places of the biases in Weights.
_BIAS_IH, _BIAS_HH = Weights._fields.index("bias_ih"), Weights._fields.index("bias_hh")
_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


def layer(
    cell: Cell,
    input: Tensor,
    steps: Steps,
    states: States,
    weights: tuple[Weights, ...],
    reverse: tuple[bool, ...],
    reset: Tensor | None = None,
    cell_states: bool = False,
) -> tuple[Tensor, States]:
    """Compute one layer with the fused kernels; by way of operators where torch traces the call (``fused_rnn.operators``).

    Args:
        cell: which cell.
        input: the rows of all steps without gaps, (R, I).
        steps: which rows a step works on.
        states: the states before the walk, h (D, N, P) and for the LSTM c (D, N, H).
        weights: the parameters of each of the D directions.
        reverse: for each direction, whether it walks from the last step to the first.
        reset: (R,) bool: where set, the row's states are zero before that step. None for nowhere.
        cell_states: whether c of every step is wanted; for a cell that has one.

    Returns:
        out (R, D·P), and the states after the walk, in the shapes of ``states``. With ``cell_states``, c of every step,
        (R, D·H), follows the states.

    Raises:
        RuntimeError, NotImplementedError: if no backend can run; see ``fused_rnn.dispatch.kernels``.
    """
    if forward_ad._current_level >= 0 and torch._C._len_torch_dispatch_stack() > 0:
        # torch.func.linearize traces the tangents: it has to see operations of torch.
        return reference.layer(cell, input, steps, states, weights, reverse, reset, cell_states)
    if operators.traced(input, weights[0].hh):
        return operators.layer(cell, input, steps, states, weights, reverse, reset, cell_states)
    if input.is_meta or input.numel() == 0 or weights[0].hh.numel() == 0:
        # Shapes alone, or no row, no feature, no hidden unit: nothing for a kernel, but a graph that gradients flow through.
        return reference.layer(cell, input, steps, states, weights, reverse, reset, cell_states)
    call = Layer(cell, dispatch.kernels(cell, input.device), steps, reverse, cell_states)
    tensors: list[Tensor | None] = [input, *states]
    for weight in weights:
        tensors += weight
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if not recorded and not transformed():
        out, ends, _ = layers.forward(call, input, states, weights, reset, keep=False)
        return out, ends
    out, *rest = _applied(_Layer, call, reset, *tensors)
    return out, tuple(rest[: len(states) + cell_states])


def _applied(function: type[torch.autograd.Function], call: Layer | BackwardCall, *operands: Tensor | None) -> tuple[Any, ...]:
    """As ``function.apply``, without binding the arguments to the forward's signature: all of them come by position.

    That takes longer than the kernels of a small layer. Under a transform, where time goes elsewhere, it is left to torch.
    """
    results: tuple[Any, ...]
    if torch._C._are_functorch_transforms_active():
        results = function.apply(call, *operands)  # type: ignore[no-untyped-call]
        return results
    # A tensor may have left a transform that has ended.
    alive = [None if operand is None else torch._C._functorch.unwrap_if_dead(operand) for operand in operands]
    results = super(torch.autograd.Function, function).apply(call, *alive)  # type: ignore[misc]
    return results


class Kept:
    """What a backward needs besides the saved tensors: whether something changed since the forward that it may not read then.

    torch refuses to hand out a saved tensor that was changed in place. Two kinds are not refused here:

    - The output, which torch.nn's users do change in place (a residual, a relu). The backward then computes it once more.
    - Biases, which no first gradient reads. Second gradients do, and so does a backward after a changed output.

    Attributes:
        changes: a tensor that counts the changes of the output. It has no elements: the output's memory belongs to the saved
            tensors alone, which hooks may have moved elsewhere.
        biases: (place among the tensors, bias, its version). The parameters outlive the graph anyway.
        inside_transform: whether the forward ran inside of one, whose wrappers the saved tensors may be.
    """

    __slots__ = ("biases", "changes", "inside_transform", "version")

    def __init__(self, out: Tensor, cell: Cell, tensors: Sequence[Tensor | None], inside_transform: bool) -> None:
        self.version = out._version
        self.changes = out.detach()
        self.biases: list[tuple[int, Tensor, int]] = []
        self.inside_transform = inside_transform
        if inside_transform:
            # No hooks there, and no tensor may be kept but by torch: a transform's wrappers end with it.
            return
        self.changes.data = _NOTHING
        first, each = 1 + len(cell.states), len(Weights._fields)
        for i in range(first, len(tensors), each):
            for place in (i + _BIAS_IH, i + _BIAS_HH):
                bias = tensors[place]
                # torch says what is wrong with one from torch.inference_mode, which counts no versions.
                if bias is not None and not bias.is_inference():
                    self.biases.append((place, bias, bias._version))

    def output_changed(self) -> bool:
        """Whether the output was changed in place since the forward."""
        return self.changes._version != self.version

    def put_biases(self, tensors: list[Any]) -> None:
        """Put the biases where they were among ``tensors``."""
        for place, bias, version in self.biases:
            if bias._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: a bias of "
                    f"shape {tuple(bias.shape)} is at version {bias._version}; expected version {version} instead. A second "
                    "gradient reads it, and so does a backward whose output was changed in place"
                )
            tensors[place] = bias


class _Layer(torch.autograd.Function):
    """A layer: fused in both directions, mapped by ``batching``, with the tangents of ``derivatives``."""

    @staticmethod
    def forward(call: Layer, reset: Tensor | None, *tensors: Tensor | None) -> tuple[Any, ...]:
        input, states, weights = split(call.cell, tensors)
        out, ends, tape = layers.forward(call, input, states, weights, reset, keep=True)
        return (out, *ends, tape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, reset, *tensors = inputs
        out, tape = output[0], output[-1]
        if tape is not None:
            ctx.mark_non_differentiable(tape)
        # Absent gradients stay None: a zero tensor the size of the output would be read for nothing.
        ctx.set_materialize_grads(False)
        ctx.call = call
        inside_transform = transformed()
        if inside_transform:
            ctx.save_for_forward(reset, *tensors)
        ctx.kept = kept = Kept(out, call.cell, tensors, inside_transform)
        for place, _, _ in kept.biases:
            tensors[place] = None
        # The data alone: without a graph, and without the output's count of changes.
        ctx.save_for_backward(reset, out.data, tape, *tensors)

    @staticmethod
    @autocast.without
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        mapped = batching.through_vmap(partial(_Layer.backward, ctx), d_outputs)
        if mapped is not None:
            return mapped
        reset, out, tape, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        return (None, None, *layer_backward(ctx.call, ctx.kept, reset, out, tape, tensors, d_outputs[:-1], wanted))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        reset, *tensors = ctx.saved_tensors
        return derivatives.tangents(lambda: (*derivatives.layer(ctx.call, reset, tensors), None), tensors[0].dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Layer, *operands: Any) -> tuple[Any, Any]:
        return batching.layer_rule(_Layer.apply, info.batch_size, in_dims, call, operands)


def layer_backward(
    call: Layer,
    kept: Kept,
    reset: Tensor | None,
    out: Tensor,
    tape: Tensor | None,
    tensors: list[Any],
    d_outputs: Sequence[Tensor | None],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute a layer's gradients in the backward of an autograd Function, with a graph where one is asked for.

    Args:
        reset, out, tape: as the forward had and left them.
        tensors: input, states and weights; of the biases, only those that ``kept`` has not.
        d_outputs: the gradients of out and of what comes after it.
        wanted: for each of ``tensors``, whether its gradient is.
    """
    changed = kept.output_changed()
    differentiable = torch.is_grad_enabled() or transformed()
    if changed or differentiable:
        kept.put_biases(tensors)
    if changed:
        with torch.no_grad():
            out, *_ = _applied(_Layer, call, reset, *tensors)
    if differentiable:
        return _applied(_Backward, BackwardCall(call, wanted), reset, out, tape, *d_outputs, *tensors)
    if kept.inside_transform:
        # A pullback of torch.func.vjp that is called after it holds wrappers of a transform that has ended.
        reset, out, tape, *tensors = _unwrapped((reset, out, tape, *tensors))
    return _gradients(BackwardCall(call, wanted), reset, out, tape, _unwrapped(d_outputs), tensors)


class _Backward(torch.autograd.Function):
    """The backward of a layer, as a function of the gradients of its results and of what the layer is a function of.

    ``out`` and ``tape`` are arguments because the kernels read them. They have no gradient of their own: they are what
    ``tensors`` make of them, and the derivatives are those of the whole.
    """

    @staticmethod
    def forward(
        call: BackwardCall, reset: Tensor | None, out: Tensor, tape: Tensor | None, *rest: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return _gradients(call, reset, out, tape, *_cut(call, rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, reset, _, _, *rest = inputs
        ctx.set_materialize_grads(False)
        ctx.call = call
        if transformed():
            ctx.save_for_forward(reset, *rest)
        ctx.save_for_backward(reset, *rest)

    @staticmethod
    @autocast.without
    def backward(ctx: Any, *d_grads: Tensor | None) -> tuple[Any, ...]:
        mapped = batching.through_vmap(partial(_Backward.backward, ctx), d_grads)
        if mapped is not None:
            return mapped
        reset, *rest = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        return (None, None, None, None, *derivatives.second_backward(ctx.call, reset, *_cut(ctx.call, rest), d_grads, wanted))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        reset, *rest = ctx.saved_tensors
        d_outputs, tensors = _cut(ctx.call, rest)
        return derivatives.tangents(lambda: derivatives.backward(ctx.call, reset, d_outputs, tensors), tensors[0].dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: BackwardCall, *operands: Any) -> tuple[Any, Any]:
        return batching.backward_rule(_Backward.apply, info.batch_size, in_dims, call, operands)


def _unwrapped(operands: Sequence[Any]) -> list[Any]:
    return [None if operand is None else unwrapped(operand) for operand in operands]


def _gradients(
    call: BackwardCall,
    reset: Tensor | None,
    out: Tensor,
    tape: Tensor | None,
    d_outputs: Sequence[Tensor | None],
    tensors: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """What ``_Backward`` computes: the gradients of ``tensors``, None where they are not wanted."""
    layer, collect = call.layer, WeightGradients if call.groups is None else partial(GroupedWeightGradients, call.groups)
    input, states, weights = split(layer.cell, tensors)
    input_wanted, states_wanted, weights_wanted = split(layer.cell, call.wanted)
    grads = gradients.backward(
        layer, input, states, weights, reset, out, tape, d_outputs[0], d_outputs[1:], input_wanted, weights_wanted, collect
    )
    d_states = [grad if asked else None for grad, asked in zip(grads.states, states_wanted, strict=True)]
    return (grads.input, *d_states, *[grad for weight in grads.weights for grad in weight])


def _cut(call: BackwardCall, rest: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Cut the operands of ``_Backward`` after ``tape`` into the gradients of the results and the layer's tensors."""
    count = len(rest) - len(call.wanted)
    return rest[:count], rest[count:]
