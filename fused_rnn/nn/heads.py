"""Heads: the units of a layer in groups of their own, so that the recurrent weights are blocks on a diagonal.

Each head is a recurrence of H / heads units that reads the whole input and no h but its own. The kernels run all heads of both
directions side by side, as they run two directions.

The rows of a weight and of a bias lie head after head, each with its gates in torch's order; h has the units of a head next to
each other. Source: Pöppel et al. 2025, "FlashRNN", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps
from fused_rnn.graph.autograd import Outputs
from fused_rnn.kernels.protocol import States

__all__ = ["run_heads", "split_weights"]


def split_weights(weights: Sequence[Weights], heads: int) -> list[Weights]:
    """The parameters of each head of each layer and direction, from those of the layers and directions: views of them.

    Raises:
        RuntimeError: if there are rows that the heads cannot share.
    """
    found = []
    for weight in weights:
        for field, tensor in zip(Weights._fields, weight, strict=True):
            if tensor is not None and tensor.shape[0] % heads:
                name = field if field.startswith("bias") else f"weight_{field}"
                raise RuntimeError(
                    f"{name} with num_heads={heads}: expected as many rows for each head, got {tensor.shape[0]} rows"
                )
        parts = [[None] * heads if tensor is None else tensor.chunk(heads) for tensor in weight]
        found += [Weights(*part) for part in zip(*parts, strict=True)]
    return found


def run_heads(
    layers: Callable[..., Outputs],
    heads: int,
    cell: Cell,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    dropout: float,
    cell_states: bool,
    connection: Any,
    backend: Any,
    rows: Tensor,
    steps: Steps,
    states: States | None,
    *others: Any,
    **keywords: Any,
) -> Outputs:
    """Call ``layers`` (``fused_rnn.nn.calls``), which has the weights and the states of each head, with those of the layers."""
    if states is not None:
        states = _split_states(states, heads, weights[0].hh.shape[1])
    given = (cell, weights, reverse, dropout, cell_states, connection, backend, rows, steps, states)
    out, after, cells = layers(*given, *others, **keywords)
    return out, _join_states(after, heads, len(weights) // heads), cells


def _split_states(states: States, heads: int, units: int) -> States:
    """The states of the heads, (L·D·heads, N, units) each, from those of the layers, (L·D, N, heads·units).

    Raises:
        RuntimeError: if a state has another number of units.
    """
    # (L·D, N, heads, units). No reshape, which would find a place for any units where N is 0.
    return tuple([torch.unflatten(state, -1, (heads, units)).transpose(1, 2).flatten(0, 1) for state in states])


def _join_states(states: States, heads: int, recurrences: int) -> States:
    """The states of the L·D layers and directions from those of the heads."""
    # Their number is given: nothing could be told from a state where N is 0.
    return tuple([torch.unflatten(state, 0, (recurrences, heads)).transpose(1, 2).flatten(-2) for state in states])
