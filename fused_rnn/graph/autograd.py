"""Which way a layer goes: to the kernels with or without a record of it, to operators, or to plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from fused_rnn.data import torch_private
from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps
from fused_rnn.graph import autocast, derivatives, operators
from fused_rnn.graph.derivatives import transformed
from fused_rnn.graph.functions import Recorded, RecordedStep, TransformedLayer, applied
from fused_rnn.graph.loops import loop_of
from fused_rnn.kernels import dispatch
from fused_rnn.kernels.protocol import (
    Backend,
    Layer,
    LayerCall,
    States,
)

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
    if torch_private.forward_mode() and torch_private.dispatch_modes() > 0:
        # torch.func.linearize traces the tangents: it has to see operations of torch.
        return derivatives.plain(cell, input, steps, states, weights, reverse, reset, cell_states, step)
    if operators.traced(input, weight):
        return operators.layer(cell, input, steps, states, weights, reverse, reset, cell_states, step)
    if input.is_meta or input.numel() == 0 or weight.numel() == 0:
        # Shapes alone, or no row, no feature, no hidden unit: nothing for a kernel, but a graph that gradients flow through.
        return derivatives.plain(cell, input, steps, states, weights, reverse, reset, cell_states, step)
    backend = dispatch.choose(input.device, cell)
    if _functionalized():
        # It has a rule for operators, and none for an autograd Function.
        return operators.layer(cell, input, steps, states, weights, reverse, reset, cell_states, step)
    if not transformed():
        return eager_layer(backend, cell, input, steps, states, weights, reverse, reset, cell_states, step)
    call = LayerCall(Layer(cell, backend, steps, reverse, cell_states, step), input, states, weights, reset)
    dispatch.check_supported(call)
    out, *rest, _ = applied(TransformedLayer, call.layer, reset, *call.operands())
    cells = rest.pop() if cell_states else None
    return out, tuple(rest), cells


def _functionalized() -> bool:
    """Whether torch.func.functionalize is one of the transforms of this call."""
    if not torch_private.transforms_active():
        return False
    functionalize = torch_private.Transform.Functionalize
    return any(each.key() == functionalize for each in torch_private.interpreter_stack() or ())


def eager_backend(cell: Cell, input: Tensor, weight: Tensor) -> Backend | None:
    """The backend of a call that nothing but its kernels is to see, and that has work for them; None for any other."""
    # `operators.traced` and `transformed` once more: here each frame of Python is a part of a small layer's call.
    if (
        torch_private.dynamo_compiling()
        or torch_private.dispatch_modes()
        or type(input).__torch_dispatch__ is not torch_private.plain_dispatch
        or type(weight).__torch_dispatch__ is not torch_private.plain_dispatch
        or torch_private.jit_tracing()
        or torch_private.transforms_active()
        or torch_private.forward_ad._current_level >= 0
        or torch_private.any_autocast()
        or input.is_meta
        or input.numel() == 0
        or weight.numel() == 0
    ):
        return None
    return dispatch.choose(input.device, cell)


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
    batch_first: bool = False,
) -> Outputs:
    """Run the kernels of a backend that ``eager_backend`` found, and record the call where a gradient is to flow through it.

    Args:
        batch_first: as in ``fused_rnn.kernels.protocol.Backend.forward``.
    """
    if has_torch_function_unary(input) or has_torch_function(weights[0]) or (states and has_torch_function(states)):
        tensors = [input, *(states or ()), *(each for one in weights for each in one if each is not None)]
        # Of subclasses alone: a mode sees what torch computes around the kernels.
        if any(overrides(tensor) for tensor in tensors):
            arguments = (backend, cell, input, steps, states, weights, reverse, reset, cell_states, step, batch_first)
            results: Outputs = handle_torch_function(eager_layer, tensors, *arguments)
            return results
    # As the classes do it, in a third of the time.
    layer = tuple.__new__(Layer, (cell, backend, steps, reverse, cell_states, step))
    call = tuple.__new__(LayerCall, (layer, input, states, weights, reset))
    if not backend.checks:
        dispatch.check_supported(call)
    if torch.is_grad_enabled():
        operands = call.operands()
        for operand in operands:
            if operand is not None and operand.requires_grad:
                result = backend.forward(call, True, batch_first)
                loop = loop_of(call)
                # As apply of the class itself, without binding the arguments to the forward's signature: all come by position.
                if loop is None:
                    apply = super(torch.autograd.Function, Recorded).apply
                    out, *rest = apply((layer, result, batch_first, reset), *operands)  # type: ignore[no-untyped-call]
                else:
                    apply = super(torch.autograd.Function, RecordedStep).apply
                    given = operands[: 1 + len(cell.states)]
                    out, *rest = apply((layer, result, batch_first, loop), loop.token, *given)  # type: ignore[no-untyped-call]
                cells = rest.pop() if layer.cell_states else None
                return out, tuple(rest), cells
    return backend.forward(call, False, batch_first)[:3]


def overrides(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that wants to see, or to be the class of, what is computed from it."""
    override = type(tensor).__torch_function__
    return type(tensor) is not Tensor and override is not torch_private.no_torch_function


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
