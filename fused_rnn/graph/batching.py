"""``torch.func.vmap`` over a layer and over its backward: which fused calls serve a mapped call.

- Mapped input, states or gradients, shared weights: the mapped dimension is folded into the batch, one call with N·B
  sequences. Of weights' gradients, which are then asked for per member, see ``GroupedWeightGradients``.
- Mapped weights (an ensemble): one call for each member, with its own weights; each as fast as that member alone.

Nested maps meet these rules one after another. Legend as in ``fused_rnn.kernels.protocol``; B is the size of the mapped
dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_rnn.data import torch_private
from fused_rnn.kernels.protocol import Layer

# What a tensor's dimensions are: ROWS (R, ·), STATES (D, N, ·) or (T, N, ·), and WHOLE for what has no batch.
ROWS, STATES, WHOLE = 1, 2, 0

# A backward for many gradients of one forward reads a copy of what the forward kept for each. Members are taken in slices whose
# copies stay below this.
_COPIED_BYTES = 64 << 20


@dataclass(frozen=True)
class BackwardCall:
    """What a backward of one layer has besides tensors.

    Attributes:
        layer: the layer's call.
        wanted: for each tensor that the layer is a function of, whether its gradient is wanted.
        groups: None, or how many groups the batch consists of: sequence j is of group j modulo ``groups``, and the gradients of
            the weights are those of each group, with the groups as their first dimension.
    """

    layer: Layer
    wanted: tuple[bool, ...]
    groups: int | None = None


def kinds_of(layer: Layer, rows: int, count: int) -> list[int]:
    """What the ``count`` operands are that a layer is a function of.

    Args:
        rows: what the input is, by ``rows_kind``.
    """
    states = len(layer.cell.states)
    return [rows] + [ROWS if layer.step else STATES] * states + [WHOLE] * (count - 1 - states)


def output_kinds(layer: Layer, rows: int) -> list[int]:
    """What the output, the states after the walk and c of every step are."""
    states = len(layer.cell.states) - layer.step
    return [rows] + [ROWS if layer.step else STATES] * states + [rows] * layer.cell_states


def rows_kind(layer: Layer, input: Any, mapped: bool) -> int:
    """What the input is: (R, I), or (T, N, I), laid out as states are; with a dimension more where it is ``mapped``."""
    return STATES if input.dim() - mapped == 3 else ROWS


def fold(tensor: Any, dim: int | None, kind: int, size: int) -> Any:
    """Merge dimension ``dim`` into the batch, as its fastest part; None repeats every sequence ``size`` times."""
    if tensor is None or kind == WHOLE:
        return tensor
    if dim is None:
        tensor = tensor.unsqueeze(kind)
        tensor = tensor.expand(*tensor.shape[:kind], size, *tensor.shape[kind + 1 :])
    else:
        tensor = tensor.movedim(dim, kind)
    return tensor.flatten(kind - 1, kind)


def unfold(tensor: Any, kind: int, size: int) -> Any:
    """Split what ``fold`` merged: the dimension is then at position ``kind``."""
    return None if tensor is None or kind == WHOLE else tensor.unflatten(kind - 1, (-1, size))


def _members(
    apply: Callable[..., tuple[Any, ...]], size: int, call: object, operands: Sequence[Any], dims: Sequence[int | None]
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """One call for each member."""
    each = [
        apply(call, *(x if dim is None else x.select(dim, b) for x, dim in zip(operands, dims, strict=True)))
        for b in range(size)
    ]
    results = tuple(None if values[0] is None else torch.stack(values) for values in zip(*each, strict=True))
    return results, tuple(None if result is None else 0 for result in results)


def layer_rule(
    apply: Callable[..., tuple[Any, ...]], size: int, in_dims: Sequence[Any], call: Layer, operands: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Map ``apply(call, reset, *tensors)`` → (out, states and further rows, tape).

    Args:
        size: B.
        in_dims: the mapped dimension of each argument of ``apply``, None where it is shared.
        call: the layer's call.
        operands: reset and the tensors.

    Returns:
        the results and the mapped dimension of each.
    """
    dims = in_dims[1:]
    rows = rows_kind(call, operands[1], dims[1] is not None)
    kinds = [STATES, *kinds_of(call, rows, len(operands) - 1)]
    if any(dim is not None for dim, kind in zip(dims, kinds, strict=True) if kind == WHOLE):
        return _members(apply, size, call, operands, dims)
    folded = [fold(x, dim, kind, size) for x, dim, kind in zip(operands, dims, kinds, strict=True)]
    results = apply(call._replace(steps=call.steps.times(size)), *folded)
    out_kinds = [*output_kinds(call, rows), ROWS]
    return (
        tuple(unfold(x, kind, size) for x, kind in zip(results, out_kinds, strict=True)),
        tuple(None if x is None else kind for x, kind in zip(results, out_kinds, strict=True)),
    )


def _slices(size: int, dims: Sequence[int | None], kept: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Cut the members into slices, (first, how many), for which the copies of shared rows stay small."""
    copied = sum(x.nbytes for x, dim in zip(kept, dims, strict=True) if x is not None and dim is None)
    most = size if copied == 0 else max(1, _COPIED_BYTES // copied)
    for first in range(0, size, most):
        yield first, min(most, size - first)


def backward_rule(
    apply: Callable[..., tuple[Any, ...]], size: int, in_dims: Sequence[Any], call: BackwardCall, operands: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Map ``apply(call, reset, out, tape, d_out, *d_ends, *tensors)`` → the gradients of ``tensors``.

    Args and returns as in ``layer_rule``.
    """
    dims = in_dims[1:]
    count = len(call.wanted)
    first = len(operands) - count
    row_kind = rows_kind(call.layer, operands[first], dims[first] is not None)
    grad_kinds = kinds_of(call.layer, row_kind, count)
    kinds = [STATES, row_kind, ROWS, *output_kinds(call.layer, row_kind), *grad_kinds]
    if any(dim is not None for dim, kind in zip(dims, kinds, strict=True) if kind == WHOLE):
        return _members(apply, size, call, operands, dims)
    weights_wanted = any(asked for asked, kind in zip(call.wanted, grad_kinds, strict=True) if kind == WHOLE)
    pieces = []
    rows = (1, 2, len(operands) - count)  # out, tape and input
    for first, n in _slices(size, [dims[i] for i in rows], [operands[i] for i in rows]):
        part = [x if dim is None else x.narrow(dim, first, n) for x, dim in zip(operands, dims, strict=True)]
        folded = [fold(x, dim, kind, n) for x, dim, kind in zip(part, dims, kinds, strict=True)]
        groups = (call.groups or 1) * n if weights_wanted or call.groups is not None else None
        layer = call.layer._replace(steps=call.layer.steps.times(n))
        grads = apply(replace(call, layer=layer, groups=groups), *folded)
        split = []
        for grad, kind in zip(grads, grad_kinds, strict=True):
            if kind != WHOLE or grad is None:
                split.append(unfold(grad, kind, n))
            else:
                # The groups of this rule vary fastest, as the sequences do.
                split.append(grad if call.groups is None else grad.unflatten(0, (-1, n)))
        pieces.append(split)
    out_dims = [int(call.groups is not None) if kind == WHOLE else kind for kind in grad_kinds]
    results = tuple(
        None if values[0] is None else values[0] if len(values) == 1 else torch.cat(values, dim)
        for values, dim in zip(zip(*pieces, strict=True), out_dims, strict=True)
    )
    return results, tuple(None if x is None else dim for x, dim in zip(results, out_dims, strict=True))


def mapped_by_autograd(grads: Sequence[Any]) -> bool:
    """Whether ``torch.autograd.grad`` maps a backward, by ``is_grads_batched``: with tensors of an older vmap."""
    for grad in grads:  # noqa: SIM110 — half the time of any()
        if grad is not None and torch_private.is_mapped_by_autograd(grad):
            return True
    return False


def through_vmap(backward: Callable[..., Sequence[Any]], grads: Sequence[Any]) -> tuple[Any, ...] | None:
    """Run ``backward(*grads)`` by ``torch.func.vmap`` where ``torch.autograd.grad`` maps it with ``is_grads_batched``.

    torch.autograd does that with tensors of an older vmap, which no autograd Function has a rule for.

    Returns:
        what ``backward`` returns, or None where nothing of the kind is among ``grads``.
    """
    mapped = [i for i, grad in enumerate(grads) if grad is not None and torch_private.is_mapped_by_autograd(grad)]
    if not mapped:
        return None
    # A thread of the autograd engine does not know the level; maps of this kind are not nested.
    level = max(1, torch_private.enter_map() - 1)
    torch_private.leave_map()
    found: list[int] = []
    count: list[int] = []

    def one(*values: Any) -> tuple[Any, ...]:
        each = list(grads)
        for i, value in zip(mapped, values, strict=True):
            each[i] = value
        results = backward(*each)
        found[:] = [i for i, result in enumerate(results) if result is not None]
        count.append(len(results))
        return tuple(results[i] for i in found)

    plain = [torch_private.remove_map(grads[i], level, 0, 0) for i in mapped]
    results = torch.func.vmap(one)(*plain)
    wrapped: list[Any] = [None] * count[0]
    for i, result in zip(found, results, strict=True):
        wrapped[i] = torch_private.add_map(result, 0, level)
    return tuple(wrapped)
