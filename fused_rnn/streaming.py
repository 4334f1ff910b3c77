"""Steps of a few rows without a graph, one call each, as in text generation and an agent's rollout.

Such a step takes as long as reading the weights does, and in a small layer the way through checks, layers and autograd takes
longer still. So what such a call does not need is passed by, where the backend's ``step`` checks its arguments itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn import dispatch, operators
from fused_rnn.cells import Cell, Weights
from fused_rnn.derivatives import transformed

States = tuple[Tensor, ...]


def step(
    cell: Cell, input: Tensor, states: States | None, weights: Sequence[Weights], batch_first: bool
) -> tuple[Tensor, States] | None:
    """Take one step of a stack of layers in one direction.

    Args:
        cell: which cell.
        input: (1, N, I), or with ``batch_first`` (N, 1, I).
        states: (L, N, ·) each.
        weights: the parameters of the L layers.

    Returns:
        out (1, N, H) or (N, 1, H) and the states after the step; or None, with nothing done, where the call is another or
        something is wrong with it.
    """
    # What torch.compile and the like trace is no eager call; what requires gradients needs the tape.
    if operators.traced(input, weights[0].hh) or torch.is_grad_enabled() or transformed():
        return None
    time = 1 if batch_first else 0
    if states is None or torch._C._is_any_autocast_enabled() or input.dim() != 3 or input.shape[time] != 1:
        return None
    for state in states:
        # The kernel is given the layers' parts and would not see that there are too many.
        if not isinstance(state, Tensor) or state.dim() != 3 or state.shape[0] != len(weights):
            return None
    if input.is_meta or input.numel() == 0:
        return None
    kernel = dispatch.kernels(cell, input.device).step
    if kernel is None:
        return None
    rows = input.select(time, 0)
    ends: list[States] = []
    try:
        for place, weight in enumerate(weights):
            before = states if len(weights) == 1 else tuple([state.narrow(0, place, 1) for state in states])
            taken = kernel(cell.name, rows, before, weight)
            if taken is None:
                return None
            rows, end = taken
            ends.append(end)
    except (TypeError, ValueError, RuntimeError, IndexError):
        # The checks of every other call say what is wrong, in torch's words; or they mend it, as views with another sign.
        return None
    return rows.unsqueeze(time), ends[0] if len(ends) == 1 else tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
