"""The reference: the equations of every cell (``fused_rnn.cells``), walked over time in plain torch.

It is what the fused kernels are judged against, what a second derivative is taken of, and a backend of its own that runs
wherever torch does, slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_rnn.cells import CELLS, equations_of
from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.protocol import Backend
from fused_rnn.kernels.reference import recurrence

__all__ = ["describe", "layer", "load", "unavailable"]


def unavailable() -> str | None:
    """Why the backend cannot run here: never the case."""
    return None


def load() -> Backend:
    """The backend."""
    from fused_rnn.kernels.by_walk import WalkBackend

    return WalkBackend("reference", CELLS, lambda cell: recurrence.walk(equations_of(cell)), derives=True)


def describe() -> str:
    """What the backend runs on."""
    return f"plain torch {torch.__version__}"


def layer(
    cell: Cell,
    input: Tensor,
    steps: Steps,
    states: tuple[Tensor, ...],
    weights: tuple[Weights, ...],
    reverse: tuple[bool, ...],
    reset: Tensor | None = None,
    cell_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute one layer in plain torch: any floating dtype, differentiable any number of times, inside torch.func too.

    Args:
        cell: which equations.
        input: the rows of all steps, (R, I).
        steps: which rows a step works on.
        states: the states before the walk, h (D, N, P) and for the LSTM c (D, N, H).
        weights: the parameters of each of the D directions.
        reverse: for each direction, whether it walks from the last step to the first.
        reset: (D, R) bool: where set, the row's states are zero before that step of the walk. None for nowhere.
        cell_states: whether c of every step is wanted; for a cell that has one.

    Returns:
        out (R, D·P), zero in rows that no step works on, and the states after the walk, in the shapes of ``states``. A
        sequence that has no step keeps its state. With ``cell_states``, c of every step, (R, D·H), zero in rows that no step
        works on, follows the states.
    """
    return recurrence.layer(equations_of(cell), input, steps, states, weights, reverse, reset, cell_states)
