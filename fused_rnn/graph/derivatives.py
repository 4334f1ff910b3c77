"""Derivatives that the kernels have not: second ones, and forward mode. They are those of the differentiable reference.

A first gradient is always the kernels'. What is here runs when that gradient is differentiated again, or when a tensor carries
a tangent (``torch.func.jvp``, ``torch.autograd.forward_ad``): one torch operation after another, step by step, with the memory
and the speed of a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_rnn.data import torch_private
from fused_rnn.data.cell import Cell, Weights, initial_states
from fused_rnn.data.steps import Steps
from fused_rnn.graph import batching
from fused_rnn.graph.batching import STATES, WHOLE, BackwardCall, kinds_of, output_kinds, rows_kind
from fused_rnn.kernels import reference
from fused_rnn.kernels.protocol import COMPUTE, Layer, LayerCall, States


def transformed() -> bool:
    """Whether a transform of torch.func is active, or a level of forward-mode differentiation."""
    return torch_private.transforms_active() or torch_private.forward_mode()


def _pull(
    function: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The vector-Jacobian product of ``function`` at ``primals``; it can be differentiated again where they are enabled."""
    if transformed():
        pull = torch.func.vjp(function, *primals)[1]
        pulled: tuple[Tensor, ...] = pull(tuple(cotangents))
        return pulled
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views stand in for the tensors, so that a gradient stops here even where one tensor was computed from another.
        stand_ins = [
            tensor.view_as(tensor) if create_graph and tensor.requires_grad else tensor.detach().requires_grad_()
            for tensor in primals
        ]
        values = function(*stand_ins)
        pairs = [(value, grad) for value, grad in zip(values, cotangents, strict=True) if value.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(tensor) for tensor in primals)
        return torch.autograd.grad(
            [value for value, _ in pairs],
            stand_ins,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            materialize_grads=True,
        )


def _replaced(tensors: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    replaced = list(tensors)
    for place, value in zip(places, values, strict=True):
        replaced[place] = value
    return replaced


def plain(
    cell: Cell,
    input: Tensor,
    steps: Steps,
    states: States | None,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    reset: Tensor | None,
    cell_states: bool,
    step: bool,
) -> tuple[Tensor, States, Tensor | None]:
    """As ``fused_rnn.graph.autograd.layer``, in differentiable torch."""
    if states is None:
        states = initial_states(cell, input, len(weights), steps.batch, weights[0])
    elif step:
        states = tuple(state.unsqueeze(0) for state in states)
    leading = input.shape[:-1]
    rows = input.flatten(0, 1) if len(leading) > 1 else input
    out, ends = reference.layer(cell, rows, steps, states, tuple(weights), reverse, reset, cell_states)
    cells = None
    if cell_states:
        *rest, cells = ends
        ends = tuple(rest)
    if step:
        ends = tuple(end.squeeze(0) for end in ends[1:])
    if len(leading) > 1:
        out = out.view(*leading, out.shape[1])
        cells = None if cells is None else cells.view(*leading, cells.shape[1])
    return out, ends, cells


def layer(call: Layer, reset: Tensor | None, operands: Sequence[Any]) -> tuple[Tensor, ...]:
    """A layer's output and states, and c of every step where it is asked for, in the dtype that the kernels compute in."""
    dtype = COMPUTE[operands[0].dtype]
    computed = [None if tensor is None else tensor.to(dtype) for tensor in operands]
    cell, _, steps, reverse, cell_states, step = call
    _, input, states, weights, _ = LayerCall.of(call, computed, reset)
    out, ends, cells = plain(cell, input, steps, states, weights, reverse, reset, cell_states, step)
    return (out, *ends) if cells is None else (out, *ends, cells)


def backward(
    call: BackwardCall, reset: Tensor | None, d_outputs: Sequence[Tensor | None], tensors: Sequence[Any]
) -> list[Tensor | None]:
    """A layer's gradients as functions of ``d_outputs`` (d_out and those of the states, None for zero) and ``tensors``.

    Returns:
        for each tensor its gradient, None where it is not wanted.
    """
    if call.groups is not None:
        return _grouped(call, reset, d_outputs, tensors)
    dtype = COMPUTE[tensors[0].dtype]
    asked = [i for i, flag in enumerate(call.wanted) if flag]
    given = [i for i, grad in enumerate(d_outputs) if grad is not None]
    cotangents = [grad.to(dtype) for grad in d_outputs if grad is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        results = layer(call.layer, reset, _replaced(tensors, asked, values))
        return tuple(results[i] for i in given)

    grads = _pull(outputs, [tensors[i] for i in asked], cotangents) if given else [torch.zeros_like(tensors[i]) for i in asked]
    return _replaced([None] * len(tensors), asked, grads)


def _grouped(
    call: BackwardCall, reset: Tensor | None, d_outputs: Sequence[Tensor | None], tensors: Sequence[Any]
) -> list[Tensor | None]:
    """``backward`` with the gradients of the weights for each group."""
    groups = call.groups or 1
    single = BackwardCall(call.layer._replace(steps=call.layer.steps.divided(groups)), call.wanted)
    rows = rows_kind(call.layer, tensors[0], False)
    kinds = kinds_of(call.layer, rows, len(tensors))
    operands = [reset, *d_outputs, *tensors]
    operand_kinds = [STATES, *output_kinds(call.layer, rows), *kinds]
    mapped = [i for i, (x, kind) in enumerate(zip(operands, operand_kinds, strict=True)) if x is not None and kind != WHOLE]
    asked = [i for i, flag in enumerate(call.wanted) if flag]

    def one(*values: Tensor) -> tuple[Tensor | None, ...]:
        reset, *rest = _replaced(operands, mapped, values)
        grads = backward(single, reset, rest[: len(d_outputs)], rest[len(d_outputs) :])
        return tuple(grads[i] for i in asked)

    unfolded = [batching.unfold(operands[i], operand_kinds[i], groups) for i in mapped]
    found = torch.func.vmap(one, in_dims=tuple(operand_kinds[i] for i in mapped), out_dims=tuple(kinds[i] for i in asked))(
        *unfolded
    )
    grads = [batching.fold(grad, kinds[i], kinds[i], groups) for i, grad in zip(asked, found, strict=True)]
    return _replaced([None] * len(tensors), asked, grads)


def second_backward(
    call: BackwardCall,
    reset: Tensor | None,
    d_outputs: Sequence[Tensor | None],
    tensors: Sequence[Any],
    d_grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of ``backward``'s ``d_outputs`` and ``tensors``, from those of its results.

    Args:
        d_grads: for each tensor, the gradient of its gradient, or None for zero.
        wanted: for each of d_outputs and tensors, whether its gradient is wanted.
    """
    operands = [*d_outputs, *tensors]
    count = len(d_outputs)
    asked = [i for i, flag in enumerate(wanted) if flag]
    given = [i for i, grad in enumerate(d_grads) if grad is not None]
    if not given:
        return [None] * len(operands)
    narrow = replace(call, wanted=tuple(grad is not None for grad in d_grads))

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        rest = _replaced(operands, asked, values)
        grads = backward(narrow, reset, rest[:count], rest[count:])
        return tuple(grad for grad in grads if grad is not None)

    found = _pull(gradients, [operands[i] for i in asked], [grad for grad in d_grads if grad is not None])
    return _replaced([None] * len(operands), asked, found)


def tangents(function: Callable[[], Sequence[Tensor | None]], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The tangents of what ``function`` returns, computed from tensors that carry tangents of their own; None for no tensor."""
    found: list[Tensor | None] = []
    with forward_ad._set_fwd_grad_enabled(True):
        for value in function():
            if value is None:
                found.append(None)
                continue
            tangent = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
            # torch has none for a value that depends on no tensor with a tangent: the c of one step does not on weight_hr.
            found.append(torch.zeros_like(value, dtype=dtype) if tangent is None else tangent.to(dtype))
    return tuple(found)
