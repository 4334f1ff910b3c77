"""Heads: the units of a layer in groups of their own, so that the recurrent weights are blocks on a diagonal.

Each head is a recurrence of H / heads units that reads the whole input and no h but its own. The kernels run all heads of both
directions side by side, as they run two directions.

The rows of a weight and of a bias lie head after head, each with its gates in torch's order; h has the units of a head next to
each other. Source: Pöppel et al. 2025, "FlashRNN", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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


def split_states(states: States, heads: int, units: int) -> States:
    """The states of the heads, (L·D·heads, N, units) each, from those of the layers, (L·D, N, heads·units).

    Raises:
        RuntimeError: if a state has another number of units.
    """
    # (L·D, N, heads, units). No reshape, which would find a place for any units where N is 0.
    return tuple([torch.unflatten(state, -1, (heads, units)).transpose(1, 2).flatten(0, 1) for state in states])


def join_states(states: States, heads: int, recurrences: int) -> States:
    """The states of the L·D layers and directions from those of the heads."""
    # Their number is given: nothing could be told from a state where N is 0.
    return tuple([torch.unflatten(state, 0, (recurrences, heads)).transpose(1, 2).flatten(-2) for state in states])
