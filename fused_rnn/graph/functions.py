"""The autograd Functions of a layer, for every cell and backend: what the forward keeps, and the ways back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_rnn.data import torch_private
from fused_rnn.graph import autocast, batching, derivatives, saved
from fused_rnn.graph.batch_first import turned_back
from fused_rnn.graph.batching import BackwardCall
from fused_rnn.graph.derivatives import transformed
from fused_rnn.graph.gradients import cut, gradients, unwrapped
from fused_rnn.graph.kept import Kept
from fused_rnn.graph.loops import Loop
from fused_rnn.kernels.protocol import (
    Backend,
    GateBackend,
    Layer,
    LayerCall,
    LayerResult,
    OutputGradients,
    StepOperands,
)
from fused_rnn.kernels.weight_gradients import operand_of


def applied(function: type[torch.autograd.Function], call: Layer | BackwardCall, *operands: Tensor | None) -> tuple[Any, ...]:
    """As ``function.apply``; a tensor may have left a transform that has ended."""
    if not torch_private.transforms_active():
        operands = tuple([None if each is None else torch_private.inner_if_dead(each) for each in operands])
    results: tuple[Any, ...] = function.apply(call, *operands)  # type: ignore[no-untyped-call]
    return results


class Recorded(torch.autograd.Function):
    """A layer that an eager call has computed: what its backward needs is kept, and the results join the graph."""

    @staticmethod
    def forward(
        ctx: Any, computed: tuple[Layer, LayerResult, bool, Tensor | None], *operands: Tensor | None
    ) -> tuple[Any, ...]:
        """Keep what the backward needs, and give the results to the graph."""
        layer, (out, states, cells, tape), ctx.batch_first, reset = computed
        _keep(ctx, layer, reset, operands, out, tape, inside_transform=False)
        return (out, *states) if cells is None else (out, *states, cells)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        """The gradients of the operands."""
        return (None, *_back(ctx, d_outputs, ctx.needs_input_grad[1:], ctx.batch_first))


class RecordedStep(torch.autograd.Function):
    """A step of a loop that an eager call has computed, as ``Recorded``; the loop's node stands for the weights.

    The weights are the loop's to keep. Each step would save them anew, and a graph of many small steps is slow to build by what
    it saves.
    """

    @staticmethod
    def forward(ctx: Any, computed: tuple[Layer, LayerResult, bool, Loop], token: Tensor, *operands: Tensor) -> tuple[Any, ...]:
        """Keep what the backward needs, and give the results to the graph."""
        # The loop lives as long as one of its steps.
        ctx.layer, (out, states, _, tape), ctx.batch_first, ctx.loop = computed
        ctx.set_materialize_grads(False)
        ctx.kept = kept = Kept(out, ctx.layer.cell, operands, inside_transform=False)
        needed = operands if tape is None else (*operands, tape)
        if not kept.whole:
            needed = (*needed, out.data)
        ctx.save_for_backward(*needed)
        return (out, *states)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        """The gradients of the operands."""
        weights_wanted, *wanted = ctx.needs_input_grad[1:]
        layer, kept, left = ctx.layer, ctx.kept, ctx.loop.left
        # Once, as in `_back`.
        operands = [*ctx.saved_tensors]
        out = kept.changes if kept.whole else operands.pop()
        tape = None if layer.cell.tape_is_out else operands.pop()
        weights = left.unchanged_weights()
        if ctx.batch_first:
            tensors = [None, out]
            d_outputs = tuple(turned_back(ctx, tensors, d_outputs))
            out = tensors[1]
        if _is_special(ctx, d_outputs):
            left.check_biases()
            asked = (*wanted, *(each and weights_wanted for each in left.wanted))
            grads = _back_in_general(ctx, [None, out, tape, *operands, *weights], d_outputs, asked)
            if weights_wanted:
                left.of_this_run().add(grads[len(wanted) :])
            return (None, None, *grads[: len(wanted)])
        input, *states = operands
        call = tuple.__new__(LayerCall, (layer, input, states, left.without_biases, None))
        backend: GateBackend = layer.backend
        grads, d_gates = backend.step_backward(call, out, tape, d_outputs, wanted)
        if weights_wanted:
            h = states[0]
            if not layer.step:
                # Of a layer with T = 1: (1, N, ·).
                input, h = input.view(-1, input.shape[-1]), h[0]
            operand = None
            if layer.cell.later:
                assert tape is not None
                operand = operand_of(layer.cell, tape[:, 0])
            # As the class does it, in half the time.
            left.of_this_run().add_step(tuple.__new__(StepOperands, (d_gates, input, h, operand)), layer.steps.batch)
        return (None, None, *grads)


class TransformedLayer(torch.autograd.Function):
    """A layer under a transform: mapped by ``batching``, with the tangents of ``derivatives``. The tape is an output too."""

    @staticmethod
    def forward(layer: Layer, reset: Tensor | None, *operands: Tensor | None) -> tuple[Any, ...]:
        """Keep what the backward needs, and give the results to the graph."""
        out, ends, cells, tape = layer.backend.forward(LayerCall.of(layer, operands, reset), True)
        return (out, *ends, *((cells,) if layer.cell_states else ()), tape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Keep what the backward needs."""
        layer, reset, *operands = inputs
        tape = output[-1]
        if tape is not None:
            ctx.mark_non_differentiable(tape)
        inside_transform = transformed()
        if inside_transform:
            ctx.save_for_forward(reset, *operands)
        _keep(ctx, layer, reset, operands, output[0], tape, inside_transform)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        """The gradients of the operands."""
        return (None, None, *_back(ctx, d_outputs[:-1], ctx.needs_input_grad[2:]))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        """The tangents of the results."""
        reset, *operands = ctx.saved_tensors
        return derivatives.tangents(lambda: (*derivatives.layer(ctx.layer, reset, operands), None), operands[0].dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], layer: Layer, *operands: Any) -> tuple[Any, Any]:
        """The results for all members."""
        return batching.layer_rule(TransformedLayer.apply, info.batch_size, in_dims, layer, operands)


def _keep(
    ctx: Any,
    layer: Layer,
    reset: Tensor | None,
    operands: Sequence[Tensor | None],
    out: Tensor,
    tape: Tensor | None,
    inside_transform: bool,
) -> None:
    """Keep what the backward needs."""
    # Absent gradients stay None: a zero tensor the size of the output would be read for nothing.
    ctx.set_materialize_grads(False)
    ctx.layer = layer
    ctx.kept = kept = Kept(out, layer.cell, operands, inside_transform)
    # The data alone: without a graph, and without the output's count of changes.
    needed = [reset, out.data, tape, *operands]
    for place, _, _ in kept.biases:
        needed[3 + place] = None
    saved.save(ctx, needed)


def _back(
    ctx: Any, d_outputs: Sequence[Tensor | None], wanted: tuple[bool, ...], batch_first: bool = False
) -> Sequence[Tensor | None]:
    """The gradients of a layer's operands, with a graph where one is asked for.

    Args:
        d_outputs: the gradients of out and of what comes after it, but for the tape.
        wanted: for each of the operands, whether its gradient is.
        batch_first: whether out and c of every step have N before T.
    """
    # Once: hooks of saved tensors may give each away, and non-reentrant checkpoints refuse to be asked twice.
    tensors = saved.tensors(ctx)
    if batch_first:
        d_outputs = turned_back(ctx, tensors, d_outputs)
    if _is_special(ctx, d_outputs):
        return _back_in_general(ctx, tensors, d_outputs, wanted)
    # As `gradients`, in line: of a small layer's backward a third is Python.
    layer, (reset, out, tape, *operands), (d_out, *d_states) = ctx.layer, tensors, d_outputs
    d_cells = d_states.pop() if layer.cell_states else None
    of_results = tuple.__new__(OutputGradients, (d_out, d_states, d_cells))
    backend: Backend = layer.backend
    return backend.backward(LayerCall.of(layer, operands, reset), out, tape, of_results, wanted)


def _is_special(ctx: Any, d_outputs: Sequence[Tensor | None]) -> bool:
    """Whether a backward needs more than the kernels of the backend."""
    kept: Kept = ctx.kept
    return (
        torch.is_grad_enabled()
        or kept.inside_transform
        or kept.changes._version != kept.version
        # `transformed`, in line.
        or torch_private.transforms_active()
        or torch_private.forward_ad._current_level >= 0
        or torch_private.any_autocast()
        or batching.mapped_by_autograd(d_outputs)
    )


@autocast.without
def _back_in_general(
    ctx: Any, tensors: Sequence[Any], d_outputs: Sequence[Tensor | None], wanted: tuple[bool, ...]
) -> Sequence[Tensor | None]:
    mapped = batching.through_vmap(lambda *grads: _back_in_general(ctx, tensors, grads, wanted), d_outputs)
    if mapped is not None:
        return mapped
    layer, kept = ctx.layer, ctx.kept
    reset, out, tape, *operands = tensors
    changed, differentiable = kept.output_changed(), torch.is_grad_enabled() or transformed()
    if changed or differentiable:
        kept.put_biases(operands)
    if changed:
        with torch.no_grad():
            out, *_ = applied(TransformedLayer, layer, reset, *operands)
    if differentiable:
        return applied(_Backward, BackwardCall(layer, wanted), reset, out, tape, *d_outputs, *operands)
    if kept.inside_transform:
        # A pullback of torch.func.vjp that is called after it holds wrappers of a transform that has ended.
        reset, out, tape, *operands = unwrapped((reset, out, tape, *operands))
    return gradients(layer, wanted, None, reset, out, tape, unwrapped(d_outputs), operands)


class _Backward(torch.autograd.Function):
    """The backward of a layer, as a function of the gradients of its results and of what the layer is a function of.

    ``out`` and ``tape`` are arguments because the kernels read them. They have no gradient of their own: they are what
    ``tensors`` make of them, and the derivatives are those of the whole.
    """

    @staticmethod
    def forward(
        call: BackwardCall, reset: Tensor | None, out: Tensor, tape: Tensor | None, *rest: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(gradients(call.layer, call.wanted, call.groups, reset, out, tape, *cut(call, rest)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, reset, _, _, *rest = inputs
        ctx.set_materialize_grads(False)
        ctx.call = call
        if transformed():
            ctx.save_for_forward(reset, *rest)
        saved.save(ctx, (reset, *rest))

    @staticmethod
    @autocast.without
    def backward(ctx: Any, *d_grads: Tensor | None) -> tuple[Any, ...]:
        mapped = batching.through_vmap(partial(_Backward.backward, ctx), d_grads)
        if mapped is not None:
            return mapped
        reset, *rest = saved.tensors(ctx)
        wanted = ctx.needs_input_grad[4:]
        return (None, None, None, None, *derivatives.second_backward(ctx.call, reset, *cut(ctx.call, rest), d_grads, wanted))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        reset, *rest = ctx.saved_tensors
        d_outputs, tensors = cut(ctx.call, rest)
        return derivatives.tangents(lambda: derivatives.backward(ctx.call, reset, d_outputs, tensors), tensors[0].dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: BackwardCall, *operands: Any) -> tuple[Any, Any]:
        return batching.backward_rule(_Backward.apply, info.batch_size, in_dims, call, operands)
