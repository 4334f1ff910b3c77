"""Results with N before T, which no autograd knows of as views: so may they be changed and detached in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def transposed(result: Tensor) -> Tensor:
    """Exchange the first two dimensions of an eager call's result, in place: torch.nn's is no view either."""
    if not result.requires_grad:
        return result.transpose_(0, 1)
    # torch counts it as a change; those of out, a layer's first result, are looked at in its backward.
    kept = getattr(result.grad_fn, "kept", None) if result.output_nr == 0 else None
    result.transpose_(0, 1)
    if kept is not None:
        kept.version += 1
    return result


def turned_back(ctx: Any, tensors: list[Any], d_outputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Put T before N again in what was saved, and in the gradients of out and of c of every step; returns the gradients."""
    tensors[1] = tensors[1].transpose(0, 1)
    turned = list(d_outputs)
    for place in (0, -1) if ctx.layer.cell_states else (0,):
        if (gradient := turned[place]) is not None:
            turned[place] = gradient.transpose(0, 1)
    return turned
