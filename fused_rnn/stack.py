"""Layers one after another over rows and steps: states and parameters of each, dropout between, directions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import entry, operators, sequences
from fused_rnn.cells import Cell, Weights
from fused_rnn.steps import Steps

States = tuple[Tensor, ...]


class Options(NamedTuple):
    """The keywords of ``fused_rnn.functional.gru`` and ``lstm``, as given."""

    bidirectional: bool
    batch_first: bool
    dropout: float
    training: bool
    lengths: Tensor | None
    reset: Tensor | PackedSequence | None
    cell_states: bool = False


# Functions, because torch.compile of torch 2.6 knows no properties of a NamedTuple.
def directions_of(options: Options) -> int:
    """D."""
    return 2 if options.bidirectional else 1


def layers(
    cell: Cell,
    rows: Tensor,
    steps: Steps,
    states: States,
    weights: Sequence[Weights],
    reset: Tensor | None,
    options: Options,
) -> tuple[Tensor, States, Tensor | None]:
    """Run a stack of layers.

    Args:
        rows: (R, I).
        states: (L·D, N, ·) each.
        reset: (R,) bool, or None.

    Returns:
        out (R, D·P), the states after the walk, and with ``options.cell_states`` c of the last layer at every step, (R, D·H).
    """
    directions = directions_of(options)
    if reset is not None and steps.dense and steps.length == 1 and directions == 1:
        # An agent's step: with the mask gone, the backend may take it in its own way, without a walk.
        states, reset = tuple(state.masked_fill(reset[:, None], 0) for state in states), None
    resets = None
    if reset is not None:
        by_direction = operators if operators.traced(rows, weights[0].hh) else sequences
        resets = by_direction.resets_by_direction(reset, steps, directions)
    last = len(weights) - directions
    ends: list[States] = []
    cells = None
    for first in range(0, len(weights), directions):
        if first and options.dropout and options.training:
            rows = torch.dropout(rows, options.dropout, True)
        part = slice(first, first + directions)
        before = tuple(state[part] for state in states) if last else states
        wants_cells = options.cell_states and first == last
        rows, end = _directions(cell, rows, steps, before, tuple(weights[part]), resets, wants_cells, options.lengths is None)
        if wants_cells:
            end, cells = end[:-1], end[-1]
        ends.append(end)
    return rows, ends[0] if not last else tuple(torch.cat(parts) for parts in zip(*ends, strict=True)), cells


def _directions(
    cell: Cell,
    rows: Tensor,
    steps: Steps,
    states: States,
    weights: tuple[Weights, ...],
    resets: tuple[Tensor, ...] | None,
    cell_states: bool,
    as_dense: bool,
) -> tuple[Tensor, States]:
    """Run one layer; one call for all directions where they have the same resets. Results as of ``autograd.layer``."""
    reverse = (False, True)[: len(weights)]
    if resets is None or len(resets) == 1:
        reset = None if resets is None else resets[0]
        return entry.layer(cell, rows, steps, states, weights, reverse, reset, cell_states, as_dense=as_dense)
    outs, ends = [], []
    for d, (weight, backwards, reset) in enumerate(zip(weights, reverse, resets, strict=True)):
        before = tuple(state[d : d + 1] for state in states)
        out, end = entry.layer(cell, rows, steps, before, (weight,), (backwards,), reset, cell_states, as_dense=as_dense)
        outs.append(out)
        ends.append(end)
    # States are stacked by direction; c of every step stands side by side, as the output does.
    stacked = tuple(torch.cat(parts, 1 if parts[0].dim() == 2 else 0) for parts in zip(*ends, strict=True))
    return torch.cat(outs, 1), stacked
