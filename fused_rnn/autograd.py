"""One autograd Function for every cell and backend."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import autocast, dispatch, gradients, operators, reference
from fused_rnn import layer as layers
from fused_rnn.cells import Cell, Weights
from fused_rnn.layer import Layer, States
from fused_rnn.steps import Steps

_PARAMETERS = len(Weights._fields)


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
    if operators.traced(input, weights[0].hh):
        return operators.layer(cell, input, steps, states, weights, reverse, reset, cell_states)
    if input.device.type == "meta" or input.numel() == 0 or weights[0].hh.numel() == 0:
        # Shapes alone, or no row, no feature, no hidden unit: nothing for a kernel, but a graph that gradients flow through.
        return reference.layer(cell, input, steps, states, weights, reverse, reset, cell_states)
    call = Layer(cell, dispatch.kernels(cell, input.device), steps, reverse, cell_states)
    tensors = [input, *states, *(tensor for weight in weights for tensor in weight)]
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors):
        out, ends, _ = layers.forward(call, input, states, weights, reset, keep=False)
        return out, ends
    out, *rest = _Layer.apply(call, reset, *tensors)  # type: ignore[no-untyped-call]
    return out, tuple(rest[: len(states) + cell_states])


def _parts(call: Layer, tensors: Sequence[Any]) -> tuple[Any, tuple[Any, ...], tuple[Weights, ...]]:
    """Split the flat tensors of a call into input, states and weights."""
    first = 1 + len(call.cell.states)
    rest = tensors[first:]
    groups = range(0, len(rest), _PARAMETERS)
    return tensors[0], tuple(tensors[1:first]), tuple(Weights(*rest[i : i + _PARAMETERS]) for i in groups)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(call: Layer, reset: Tensor | None, *tensors: Tensor | None) -> tuple[Any, ...]:
        input, states, weights = _parts(call, tensors)
        out, ends, tape = layers.forward(call, input, states, weights, reset, keep=True)
        return (out, *ends, tape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, reset, *tensors = inputs
        tape = output[-1]
        if tape is not None:
            ctx.mark_non_differentiable(tape)
        # Absent gradients stay None: a zero tensor the size of the output would be read for nothing.
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(reset, output[0], tape, *tensors)

    @staticmethod
    @autocast.without
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        call: Layer = ctx.call
        reset, out, tape, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        d_out, *d_ends = d_outputs[:-1]
        if torch.is_grad_enabled():
            return (None, None, *_differentiable_backward(call, reset, tensors, wanted, d_out, d_ends))
        input, states, weights = _parts(call, tensors)
        input_wanted, states_wanted, weights_wanted = _parts(call, wanted)
        grads = gradients.backward(call, input, states, weights, reset, out, tape, d_out, d_ends, input_wanted, weights_wanted)
        d_states = (grad if asked else None for grad, asked in zip(grads.states, states_wanted, strict=True))
        return (None, None, grads.input, *d_states, *(grad for weight in grads.weights for grad in weight))


# torch binds the arguments of every call to this signature, and takes longer to find it out than the kernels of a small layer.
_Layer.forward.__signature__ = inspect.signature(_Layer.forward)  # type: ignore[attr-defined]


def _differentiable_backward(
    call: Layer,
    reset: Tensor | None,
    tensors: Sequence[Any],
    wanted: Sequence[bool],
    d_out: Tensor | None,
    d_ends: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of ``tensors`` as functions that can be differentiated again: the reference's, not the kernels'."""
    dtype = layers.COMPUTE[tensors[0].dtype]
    # Views stand in for the tensors, so that a gradient stops here even where one tensor was computed from another.
    stand_ins: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    # Under torch.func.vjp the graph of the forward may be gone by now; what is asked for must require a gradient all the same.
    stand_ins = [
        tensor.detach().requires_grad_() if asked and tensor is not None and not tensor.requires_grad else tensor
        for tensor, asked in zip(stand_ins, wanted, strict=True)
    ]
    computed = [None if tensor is None else tensor.to(dtype) for tensor in stand_ins]
    input, states, weights = _parts(call, computed)
    out, ends = reference.layer(call.cell, input, call.steps, states, weights, call.reverse, reset, call.cell_states)
    given = [(value, grad) for value, grad in zip((out, *ends), (d_out, *d_ends), strict=True) if grad is not None]
    asked = [i for i, flag in enumerate(wanted) if flag]
    grads: list[Tensor | None] = [None] * len(tensors)
    if not given:
        return grads
    found = torch.autograd.grad(
        [value for value, _ in given],
        [stand_ins[i] for i in asked],
        [grad.to(value.dtype) for value, grad in given],
        create_graph=True,
        allow_unused=True,
    )
    for i, grad in zip(asked, found, strict=True):
        grads[i] = grad
    return grads
