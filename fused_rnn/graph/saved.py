"""What an autograd Function saves for its backward, of which some may be absent.

torch keeps an absent tensor as None among ``saved_tensors``, where tools that draw a graph or count its memory expect tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Save what is there of ``tensors``."""
    absent, there = [], []
    for place, tensor in enumerate(tensors):
        if tensor is None:
            absent.append(place)
        else:
            there.append(tensor)
    # Bytes, which the garbage collector does not look at: a graph has one for each of its nodes.
    ctx.absent = bytes(absent)
    ctx.save_for_backward(*there)


def tensors(ctx: Any) -> list[Any]:
    """What was given to ``save``."""
    found = [*ctx.saved_tensors]
    for place in ctx.absent:
        found.insert(place, None)
    return found
