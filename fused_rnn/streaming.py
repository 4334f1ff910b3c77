"""Steps of a few rows without a graph, one call each, as in text generation and an agent's rollout.

Such a step takes as long as reading the weights does, and in a small layer the way through checks, layers and autograd takes
longer still. So what such a call does not need is passed by, where the backend's ``step`` checks its arguments itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn import dispatch, operators
from fused_rnn.cells import Cell
from fused_rnn.derivatives import transformed

States = tuple[Tensor, ...]


def is_eager(input: Tensor) -> bool:
    """Whether nothing stands between a call and the kernels: no trace, mode, transform or autocast, no class of its own."""
    # What torch.compile and the like trace is no eager call.
    if type(input) is not Tensor or operators.traced(input, input) or transformed() or input.is_meta:
        return False
    return not torch._C._is_any_autocast_enabled()


def step(
    cell: Cell, input: Tensor, states: States, weights: Sequence[Tensor | None], batch_first: bool
) -> tuple[Tensor, States] | None:
    """Take one step of a stack of layers in one direction; for calls while gradients are disabled.

    Args:
        cell: which cell.
        input: (1, N, I), or with ``batch_first`` (N, 1, I).
        states: (L, N, H) each.
        weights: ih, hh and the two biases or None of each of the L layers.

    Returns:
        out (1, N, H) or (N, 1, H) and the states after the step; or None, with nothing done, where the call is another or
        something is wrong with it.
    """
    if not is_eager(input):
        return None
    kernel = dispatch.kernels(cell, input.device).step
    if kernel is None:
        return None
    try:
        taken: tuple[Tensor, States] | None = kernel(cell.name, input, states, weights, batch_first)
    except (TypeError, ValueError, RuntimeError):
        # The checks of every other call say what is wrong, in torch's words; or they mend it, as views with another sign.
        return None
    return taken
