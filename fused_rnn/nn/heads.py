"""Heads: the units of a layer in groups of their own, so that the recurrent weights are blocks on a diagonal.

Each head is a recurrence of H / heads units that reads the whole input and no h but its own. The kernels run all heads of both
directions side by side, as they run two directions.

The rows of a weight and of a bias lie head after head, each with its gates in torch's order; h has the units of a head next to
each other. Source: Pöppel et al. 2025, "FlashRNN", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from fused_rnn.data.cell import Weights
from fused_rnn.kernels.protocol import States

__all__ = ["join_states", "split_states", "split_weights"]


def split_weights(weights: Sequence[Weights], heads: int) -> list[Weights]:
    """The parameters of each head of each layer and direction, from those of the layers and directions: views of them."""
    found = []
    for weight in weights:
        parts = [[None] * heads if tensor is None else tensor.chunk(heads) for tensor in weight]
        found += [Weights(*part) for part in zip(*parts, strict=True)]
    return found


def split_states(states: States, heads: int, hidden: int) -> States:
    """The states of the heads, (L·D·heads, N, H / heads) each, from those of the layers, (L·D, N, H), or both without N.

    Raises:
        RuntimeError: if there are no H units.
    """
    found = []
    for index, state in enumerate(states):
        if state.dim() < 2 or state.shape[-1] != hidden:
            which = "" if len(states) == 1 else f"[{index}]"
            raise RuntimeError(f"Expected hidden{which} size {(*state.shape[:-1], hidden)}, got {list(state.shape)}")
        # (L·D, N, heads, H / heads), N aside.
        parts = state.reshape(*state.shape[:-1], heads, hidden // heads).movedim(-2, 1)
        found.append(parts.flatten(0, 1))
    return tuple(found)


def join_states(states: States, heads: int) -> States:
    """The states of the layers from those of the heads."""
    return tuple([state.reshape(-1, heads, *state.shape[1:]).movedim(1, -2).flatten(-2) for state in states])
