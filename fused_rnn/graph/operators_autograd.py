"""The gradients of the operators, and torch.vmap over them: what torch.compile traces a backward from.

Registered by importing this file. Not by torch.library.register_autograd, whose functions torch.func.grad refuses and to which
torch.func.jvp gives tangents that are silently zero. Legend as in ``fused_rnn.kernels.protocol``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from fused_rnn.cells import named
from fused_rnn.data import sequences
from fused_rnn.graph import derivatives, saved
from fused_rnn.graph.batching import BackwardCall
from fused_rnn.graph.operators import library, spread, steps_of
from fused_rnn.kernels import dispatch
from fused_rnn.kernels.protocol import Layer

_forward = torch.ops.fused_rnn.layer_forward
_backward = torch.ops.fused_rnn.layer_backward


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        call: tuple[Any, ...], batch_sizes: Tensor | None, reset: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        cell_name, count, present, reverse, keep, cell_states = call
        input, states, weights = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        # A Function runs its forward without gradients, but an outer transform of torch.func records what happens here.
        outer = torch._C._are_functorch_transforms_active()
        with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(outer):
            return tuple(_forward(cell_name, input, states, weights, present, batch_sizes, reset, reverse, keep, cell_states))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, batch_sizes, reset, *tensors = inputs
        ctx.mark_non_differentiable(output[-1])
        # Absent gradients stay None: a zero tensor the size of the output would be read for nothing.
        ctx.set_materialize_grads(False)
        ctx.call = call
        saved.save(ctx, (batch_sizes, reset, output[0], output[-1], *tensors))

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        cell_name, count, present, reverse, keep, _ = ctx.call
        batch_sizes, reset, out, tape, *tensors = saved.tensors(ctx)
        wanted, d_outputs = ctx.needs_input_grad[3:], d_outputs[:-1]
        input, states, weights = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        if torch.is_grad_enabled():
            return (None, None, None, *_differentiable(ctx.call, batch_sizes, reset, tensors, wanted, d_outputs))
        if not keep:
            # An exported program computes no tape, so that the many that only infer do not pay for it.
            out, *_, tape = _forward(cell_name, input, states, weights, present, batch_sizes, reset, reverse, True, False)
        given = [int(d is not None) for d in d_outputs]
        grads = _backward(
            cell_name,
            input,
            states,
            weights,
            present,
            batch_sizes,
            reset,
            reverse,
            out,
            tape,
            [d for d in d_outputs if d is not None],
            given,
            [int(flag) for flag in wanted],
        )
        return (None, None, None, *spread(grads, wanted))


def _differentiable(
    call: tuple[Any, ...],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    d_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of ``tensors`` where a graph of the backward is asked for, as in eager code."""
    cell_name, count, present, reverse, _, cell_states = call
    cell, input = named(cell_name), tensors[0]
    steps = steps_of(input, tensors[1 : 1 + count], batch_sizes)
    layer = Layer(cell, dispatch.choose(input.device, cell), steps, tuple(map(bool, reverse)), cell_states)
    there = [1] * (1 + count) + present
    flat, asked = spread(tensors, there), tuple(bool(flag) for flag in spread(wanted, there))
    found = derivatives.backward(BackwardCall(layer, asked), reset, d_outputs, flat)
    return [grad for grad, tensor in zip(found, flat, strict=True) if tensor is not None]


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> list[Tensor]:
    """Apply a function below the transforms of torch.func: the dispatcher has run them, and `apply` would start again."""
    with enable_single_level_autograd_function():
        return list(super(torch.autograd.Function, function).apply(*arguments))  # type: ignore[misc]


def _tangent(tensor: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent


def _forward_recorded(
    cell_name: str,
    input: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    present: list[int],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: list[int],
    keep: bool,
    cell_states: bool,
) -> list[Tensor]:
    into = (input, *states, *weights)
    # torch keeps no public count of the levels, and unpack_dual raises outside of one.
    if forward_ad._current_level >= 0 and any(_tangent(tensor) is not None for tensor in into):
        raise NotImplementedError("fused_rnn's operators have no forward mode (jvp); call the module outside of torch.compile")
    call = (cell_name, len(states), present, reverse, keep, cell_states)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in into):
        return _apply(_Forward, call, batch_sizes, reset, *into)
    with torch._C._AutoDispatchBelowAutograd():
        outputs: list[Tensor] = _forward(
            cell_name, input, states, weights, present, batch_sizes, reset, reverse, keep, cell_states
        )
    return outputs


class _Backward(torch.autograd.Function):
    """Has no gradient: where second derivatives are wanted, ``_differentiable`` computes the first."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            "fused_rnn::layer_backward cannot be differentiated; take second derivatives of fused_rnn's modules in eager code"
        )


def _backward_recorded(keyset: Any, *arguments: Any) -> list[Tensor]:
    def call() -> list[Tensor]:
        # Not below autograd as the forward: the reference backend differentiates its equations with it.
        outer = torch._C._are_functorch_transforms_active()
        with torch.set_grad_enabled(outer):
            grads: list[Tensor] = _backward.default.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        return grads

    flat = [leaf for argument in arguments for leaf in (argument if isinstance(argument, list) else [argument])]
    return _apply(_Backward, call, *(leaf for leaf in flat if isinstance(leaf, Tensor)))


def _one(argument: Any, dim: Any, index: int) -> Any:
    """One element of an argument that is mapped over ``dim``, a list of arguments included."""
    if dim is None:
        return argument
    if isinstance(argument, (list, tuple)):
        return [_one(leaf, leaf_dim, index) for leaf, leaf_dim in zip(argument, dim, strict=True)]
    return argument.select(dim, index)


def _mapped(operator: Callable[..., list[Tensor]]) -> Callable[..., Any]:
    """One call per element: right for whatever is mapped over, weights included."""

    def mapped(info: Any, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
        each = [
            operator(*(_one(argument, dim, index) for argument, dim in zip(arguments, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        results = [torch.stack(result) for result in zip(*each, strict=True)]
        return results, [0] * len(results)

    return mapped


def _mapped_ragged(
    info: Any, in_dims: Any, lengths: Tensor, padded: Tensor, batch_first: bool
) -> tuple[tuple[Tensor, ...], tuple[None, ...]]:
    """Of the padded batch only T is read, which all members share."""
    if in_dims[0] is not None:
        raise RuntimeError(sequences.MAPPED_LENGTHS)
    found = torch.ops.fused_rnn.ragged(lengths, padded.select(in_dims[1], 0), batch_first)
    return found, (None,) * len(found)


library.impl("layer_forward", _forward_recorded, "Autograd")
library.impl("layer_backward", _backward_recorded, "Autograd", with_keyset=True)
torch.library.register_vmap("fused_rnn::layer_forward", _mapped(_forward), lib=library)
torch.library.register_vmap("fused_rnn::layer_backward", _mapped(_backward), lib=library)
torch.library.register_vmap("fused_rnn::ragged", _mapped_ragged, lib=library)
