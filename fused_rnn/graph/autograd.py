"""Eager calls of a layer, and one autograd Function for every cell and backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps, unwrapped
from fused_rnn.graph import autocast, batching, derivatives, operators
from fused_rnn.graph.batching import BackwardCall
from fused_rnn.graph.derivatives import transformed
from fused_rnn.graph.kept import Kept
from fused_rnn.graph.loops import Loop, loop_of
from fused_rnn.kernels import dispatch
from fused_rnn.kernels.protocol import Backend, GateBackend, Layer, LayerCall, LayerResult, OutputGradients, States

# out, the states after the walk, and c of every step where it is asked for.
Outputs = tuple[Tensor, States, Tensor | None]


def layer(
    cell: Cell,
    input: Tensor,
    steps: Steps,
    states: States | None,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    reset: Tensor | None = None,
    cell_states: bool = False,
    step: bool = False,
) -> Outputs:
    """Compute one layer with the fused kernels; by way of operators where torch traces the call (``graph.operators``).

    Args:
        cell, steps, reverse, cell_states, step: as in ``fused_rnn.kernels.protocol.Layer``.
        input, states, weights, reset: as in ``fused_rnn.kernels.protocol.LayerCall``.

    Returns:
        out, the states after the walk, and c of every step or None, as in ``fused_rnn.kernels.protocol.LayerResult``.

    Raises:
        RuntimeError, NotImplementedError: if no backend can run; see ``fused_rnn.kernels.dispatch.choose``.
    """
    weight = weights[0].hh
    if forward_ad._current_level >= 0 and torch._C._len_torch_dispatch_stack() > 0:
        # torch.func.linearize traces the tangents: it has to see operations of torch.
        return derivatives.plain(cell, input, steps, states, weights, reverse, reset, cell_states, step)
    if operators.traced(input, weight):
        return operators.layer(cell, input, steps, states, weights, reverse, reset, cell_states, step)
    if input.is_meta or input.numel() == 0 or weight.numel() == 0:
        # Shapes alone, or no row, no feature, no hidden unit: nothing for a kernel, but a graph that gradients flow through.
        return derivatives.plain(cell, input, steps, states, weights, reverse, reset, cell_states, step)
    backend = dispatch.choose(input.device)
    if _functionalized():
        # It has a rule for operators, and none for an autograd Function.
        return operators.layer(cell, input, steps, states, weights, reverse, reset, cell_states, step)
    if not transformed():
        return eager_layer(backend, cell, input, steps, states, weights, reverse, reset, cell_states, step)
    call = LayerCall(Layer(cell, backend, steps, reverse, cell_states, step), input, states, weights, reset)
    dispatch.check_supported(call)
    out, *rest, _ = _applied(_Layer, call.layer, reset, *call.operands())
    cells = rest.pop() if cell_states else None
    return out, tuple(rest), cells


def _functionalized() -> bool:
    """Whether torch.func.functionalize is one of the transforms of this call."""
    if not torch._C._are_functorch_transforms_active():
        return False
    functionalize = torch._C._functorch.TransformType.Functionalize
    return any(each.key() == functionalize for each in torch._C._functorch.get_interpreter_stack() or ())


def eager_backend(input: Tensor, weight: Tensor) -> Backend | None:
    """The backend of a call that nothing but its kernels is to see, and that has work for them; None for any other."""
    if operators.traced(input, weight) or transformed() or torch._C._is_any_autocast_enabled():
        return None
    if input.is_meta or input.numel() == 0 or weight.numel() == 0:
        return None
    return dispatch.choose(input.device)


def eager_layer(
    backend: Backend,
    cell: Cell,
    input: Tensor,
    steps: Steps,
    states: States | None,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    reset: Tensor | None = None,
    cell_states: bool = False,
    step: bool = False,
) -> Outputs:
    """Run the kernels of a backend that ``eager_backend`` found, and record the call where a gradient is to flow through it."""
    # As the classes do it, in a third of the time.
    layer = tuple.__new__(Layer, (cell, backend, steps, reverse, cell_states, step))
    call = tuple.__new__(LayerCall, (layer, input, states, weights, reset))
    if not backend.checks:
        dispatch.check_supported(call)
    if torch.is_grad_enabled():
        operands = call.operands()
        for operand in operands:
            if operand is not None and operand.requires_grad:
                result = backend.forward(call, True)
                loop = loop_of(call)
                # As apply of the class itself, without binding the arguments to the forward's signature: all come by position.
                if loop is None:
                    apply = super(torch.autograd.Function, _Recorded).apply
                    out, *rest = apply(layer, result, reset, *operands)  # type: ignore[no-untyped-call]
                else:
                    apply = super(torch.autograd.Function, _Step).apply
                    given = operands[: 1 + len(cell.states)]
                    out, *rest = apply(layer, result, weights, loop, loop.token, *given)  # type: ignore[no-untyped-call]
                cells = rest.pop() if layer.cell_states else None
                return out, tuple(rest), cells
    return backend.forward(call, False)[:3]


def layer_in_autocast(
    as_dense: bool,
    cell: Cell,
    rows: Tensor,
    steps: Steps,
    states: States,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    reset: Tensor | None = None,
    cell_states: bool = False,
    step: bool = False,
) -> Outputs:
    """As ``layer``, with the dtypes that torch.nn has under torch.autocast.

    Args:
        as_dense: whether torch.nn would take dense ``steps`` for a dense batch, which it computes in other dtypes: not the step
            of a cell, and not a batch with lengths, whose dtypes must not depend on whether all of them are full.
    """
    dtypes = autocast.dtypes_of(cell, rows, states, weights, steps.dense and as_dense)
    if dtypes is None:
        return layer(cell, rows, steps, states, weights, reverse, reset, cell_states, step)
    wider = dtypes[-1]
    rows, states, weights = rows.to(wider), tuple([state.to(wider) for state in states]), autocast.cast(weights, wider)
    with torch.autocast(rows.device.type, enabled=False):
        out, ends, cells = layer(cell, rows, steps, states, weights, reverse, reset, cell_states, step)
    # c of every step has the last state's dtype already.
    ends = tuple([end.to(dtype) for end, dtype in zip(ends, dtypes[step:], strict=True)])
    return out.to(dtypes[0]), ends, cells


def _applied(function: type[torch.autograd.Function], call: Layer | BackwardCall, *operands: Tensor | None) -> tuple[Any, ...]:
    """As ``function.apply``; a tensor may have left a transform that has ended."""
    if not torch._C._are_functorch_transforms_active():
        operands = tuple([None if each is None else torch._C._functorch.unwrap_if_dead(each) for each in operands])
    results: tuple[Any, ...] = function.apply(call, *operands)  # type: ignore[no-untyped-call]
    return results


class _Recorded(torch.autograd.Function):
    """A layer that an eager call has computed: what its backward needs is kept, and the results join the graph."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, result: LayerResult, reset: Tensor | None, *operands: Tensor | None) -> tuple[Any, ...]:
        _keep(ctx, layer, reset, operands, result.out, result.tape, inside_transform=False)
        if result.cell_states is None:
            return (result.out, *result.states)
        return (result.out, *result.states, result.cell_states)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        return (None, None, None, *_back(ctx, d_outputs, ctx.needs_input_grad[3:]))


class _Step(torch.autograd.Function):
    """A step of a loop that an eager call has computed, as ``_Recorded``; the loop's node stands for the weights."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, result: LayerResult, weights: Sequence[Weights], loop: Loop, token: Tensor, *operands: Tensor
    ) -> tuple[Any, ...]:
        # The loop lives as long as one of its steps.
        ctx.loop = loop
        _keep(ctx, layer, None, (*operands, *weights[0]), result.out, result.tape, inside_transform=False)
        return (result.out, *result.states)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        weights_wanted, *wanted = ctx.needs_input_grad[4:]
        left = ctx.loop.left
        saved, count = ctx.saved_tensors, len(wanted)
        if _is_special(ctx, d_outputs):
            asked = (*wanted, *(each and weights_wanted for each in left.wanted))
            grads = _back_in_general(ctx, saved, d_outputs, asked)
            if weights_wanted:
                left.of_this_run().add(grads[count:])
            return (None, None, None, None, None, *grads[:count])
        _, out, tape, *operands = saved
        call = LayerCall.of(ctx.layer, operands, None)
        d_out, *d_states = d_outputs
        gradients = OutputGradients(d_out, d_states, None)
        backend: GateBackend = ctx.layer.backend
        grads, d_gates = backend.step_backward(call, out, tape, gradients, wanted)
        if weights_wanted:
            input, h = operands[0], operands[1]
            if not call.layer.step:
                # Of a layer with T = 1: (1, N, ·).
                input, h = input.view(-1, input.shape[-1]), h[0]
            left.of_this_run().add_step(d_gates, input, h)
        return (None, None, None, None, None, *grads)


class _Layer(torch.autograd.Function):
    """A layer under a transform: mapped by ``batching``, with the tangents of ``derivatives``. The tape is an output too."""

    @staticmethod
    def forward(layer: Layer, reset: Tensor | None, *operands: Tensor | None) -> tuple[Any, ...]:
        out, ends, cells, tape = layer.backend.forward(LayerCall.of(layer, operands, reset), True)
        return (out, *ends, *((cells,) if layer.cell_states else ()), tape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
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
        return (None, None, *_back(ctx, d_outputs[:-1], ctx.needs_input_grad[2:]))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        reset, *operands = ctx.saved_tensors
        return derivatives.tangents(lambda: (*derivatives.layer(ctx.layer, reset, operands), None), operands[0].dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], layer: Layer, *operands: Any) -> tuple[Any, Any]:
        return batching.layer_rule(_Layer.apply, info.batch_size, in_dims, layer, operands)


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
    saved = list(operands)
    for place, _, _ in kept.biases:
        saved[place] = None
    # The data alone: without a graph, and without the output's count of changes.
    ctx.save_for_backward(reset, out.data, tape, *saved)


def _back(ctx: Any, d_outputs: Sequence[Tensor | None], wanted: tuple[bool, ...]) -> Sequence[Tensor | None]:
    """The gradients of a layer's operands, with a graph where one is asked for.

    Args:
        d_outputs: the gradients of out and of what comes after it, but for the tape.
        wanted: for each of the operands, whether its gradient is.
    """
    # Once: hooks of saved tensors may give each away, and non-reentrant checkpoints refuse to be asked twice.
    saved = ctx.saved_tensors
    if _is_special(ctx, d_outputs):
        return _back_in_general(ctx, saved, d_outputs, wanted)
    reset, out, tape, *operands = saved
    return _gradients(ctx.layer, wanted, None, reset, out, tape, d_outputs, operands)


def _is_special(ctx: Any, d_outputs: Sequence[Tensor | None]) -> bool:
    """Whether a backward needs more than the kernels of the backend."""
    kept: Kept = ctx.kept
    return (
        torch.is_grad_enabled()
        or kept.inside_transform
        or kept.output_changed()
        or transformed()
        or torch._C._is_any_autocast_enabled()
        or batching.mapped_by_autograd(d_outputs)
    )


@autocast.without
def _back_in_general(
    ctx: Any, saved: Sequence[Any], d_outputs: Sequence[Tensor | None], wanted: tuple[bool, ...]
) -> Sequence[Tensor | None]:
    mapped = batching.through_vmap(lambda *grads: _back_in_general(ctx, saved, grads, wanted), d_outputs)
    if mapped is not None:
        return mapped
    layer, kept = ctx.layer, ctx.kept
    reset, out, tape, *operands = saved
    changed, differentiable = kept.output_changed(), torch.is_grad_enabled() or transformed()
    if changed or differentiable:
        kept.put_biases(operands)
    if changed:
        with torch.no_grad():
            out, *_ = _applied(_Layer, layer, reset, *operands)
    if differentiable:
        return _applied(_Backward, BackwardCall(layer, wanted), reset, out, tape, *d_outputs, *operands)
    if kept.inside_transform:
        # A pullback of torch.func.vjp that is called after it holds wrappers of a transform that has ended.
        reset, out, tape, *operands = _unwrapped((reset, out, tape, *operands))
    return _gradients(layer, wanted, None, reset, out, tape, _unwrapped(d_outputs), operands)


class _Backward(torch.autograd.Function):
    """The backward of a layer, as a function of the gradients of its results and of what the layer is a function of.

    ``out`` and ``tape`` are arguments because the kernels read them. They have no gradient of their own: they are what
    ``tensors`` make of them, and the derivatives are those of the whole.
    """

    @staticmethod
    def forward(
        call: BackwardCall, reset: Tensor | None, out: Tensor, tape: Tensor | None, *rest: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(_gradients(call.layer, call.wanted, call.groups, reset, out, tape, *_cut(call, rest)))

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
    layer: Layer,
    wanted: Sequence[bool],
    groups: int | None,
    reset: Tensor | None,
    out: Tensor,
    tape: Tensor | None,
    d_outputs: Sequence[Tensor | None],
    tensors: Sequence[Any],
) -> Sequence[Tensor | None]:
    """The gradients of ``tensors`` that are wanted, by the backend of the forward."""
    d_out, *d_states = d_outputs
    d_cells = d_states.pop() if layer.cell_states else None
    call = LayerCall.of(layer, tensors, reset)
    return layer.backend.backward(call, out, tape, OutputGradients(d_out, d_states, d_cells), wanted, groups)


def _cut(call: BackwardCall, rest: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Cut the operands of ``_Backward`` after ``tape`` into the gradients of the results and the layer's tensors."""
    count = len(rest) - len(call.wanted)
    return rest[:count], rest[count:]
