"""What a layer computes in under ``torch.autocast``: the dtypes of torch.nn, decided once for all cells.

Gates and states are computed in float32 whatever the dtype: the kernels store in it, and compute in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fused_rnn.data import torch_private
from fused_rnn.data.cell import Cell, Weights

P = ParamSpec("P")
R = TypeVar("R")

# What autocast converts. float64 it leaves alone, as torch's does: who asks for that many digits wants them.
_CONVERTED = frozenset((torch.float32, torch.bfloat16, torch.float16))


def _on(device: torch.device) -> bool:
    # torch knows no autocast for meta tensors and raises when asked.
    return torch_private.any_autocast() and device.type != "meta" and torch.is_autocast_enabled(device.type)


def converts(*tensors: Tensor) -> bool:
    """Whether autocast is on for the first tensor's device and converts all of these."""
    return _on(tensors[0].device) and all(tensor.dtype in _CONVERTED for tensor in tensors)


def dtypes_of(
    cell: Cell, input: Tensor, states: Sequence[Tensor], weights: Sequence[Weights], dense: bool
) -> tuple[torch.dtype, ...] | None:
    """The dtypes of a layer's h and other states under autocast, or None where autocast has no say.

    On CUDA, and for the simple recurrence, they are autocast's own. On the CPU, torch.nn computes the gates in autocast's dtype
    and mixes the old state into them; the wider of the two is what the caller sees: a float32 state stays one. A projection is
    one more product, so what it gives has autocast's dtype. And the dense LSTM without one runs in one piece (oneDNN), in
    autocast's dtype throughout.

    Args:
        cell: which cell.
        input: the rows of the layer.
        states: the states before the walk; where the caller gave none, they have the dtype of the module's input.
        weights: the parameters.
        dense: whether this is a layer over a dense batch, not over a packed one and not a single step of a cell.

    Source: the dtypes that torch.nn shows under torch.autocast, torch 2.13.
    """
    if not _on(input.device):
        return None
    if not converts(input, *states, *(tensor for weight in weights for tensor in weight if tensor is not None)):
        return None
    lower = torch.get_autocast_dtype(input.device.type)
    projected = weights[0].hr is not None
    in_one_piece = dense and cell.in_one_piece and not projected
    # Where the new states are functions of the gates alone, no old one is mixed in; else it is the last state that is.
    alone = cell.cell_state is None and not cell.direct
    wider = lower if input.device.type != "cpu" or alone or in_one_piece else torch.promote_types(lower, states[-1].dtype)
    return (lower if projected else wider, wider)[: len(states)]


def cast(weights: Sequence[Weights], dtype: torch.dtype) -> tuple[Weights, ...]:
    """The parameters in another dtype; their gradients come back in their own."""

    def one(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(dtype)

    # Not by `_make`, which Dynamo of torch 2.6 does not trace.
    return tuple(Weights(*[one(tensor) for tensor in weight]) for weight in weights)


def without(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` with autocast off, as torch runs a backward in the dtypes of its forward wherever it is called."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch_private.any_autocast():
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return outside
