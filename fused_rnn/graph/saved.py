"""What an autograd Function saves for its backward, of which some may be absent.

torch keeps an absent tensor as None among ``saved_tensors``, where tools that draw a graph or count its memory expect tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, repeat
from operator import is_not
from typing import Any

from torch import Tensor


def save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Save what is there of ``tensors``."""
    ctx.there = there = tuple(map(is_not, tensors, repeat(None)))
    ctx.save_for_backward(*compress(tensors, there))


def tensors(ctx: Any) -> list[Any]:
    """What was given to ``save``."""
    found = iter(ctx.saved_tensors)
    return [next(found) if there else None for there in ctx.there]
