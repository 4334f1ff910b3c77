"""The cells: one file each, with its numbered equations. The cell's row (``fused_rnn.data.cell``) and its backward follow.

What the rest of the package knows of a cell comes from here. A kernel written by hand has the same numbers beside its lines.
"""

from __future__ import annotations

from fused_rnn.cells.definition import DEFINED, cell
from fused_rnn.cells.gru import GRU, gru
from fused_rnn.cells.gru_reset_before import GRU_RESET_BEFORE, gru_reset_before
from fused_rnn.cells.language import relu, sigmoid, tanh
from fused_rnn.cells.lstm import LSTM, lstm
from fused_rnn.cells.mgu import mgu
from fused_rnn.cells.rnn import RNN_RELU, RNN_TANH, rnn_relu, rnn_tanh
from fused_rnn.data.cell import Cell
from fused_rnn.data.equations import Equations

__all__ = [
    "CELLS",
    "EQUATIONS",
    "GRU",
    "GRU_RESET_BEFORE",
    "LSTM",
    "RNN_RELU",
    "RNN_TANH",
    "cell",
    "equations_of",
    "gru",
    "gru_reset_before",
    "lstm",
    "mgu",
    "named",
    "relu",
    "rnn_relu",
    "rnn_tanh",
    "sigmoid",
    "tanh",
]

CELLS: dict[str, Cell] = {row.name: row for row in (RNN_TANH, RNN_RELU, LSTM, GRU, GRU_RESET_BEFORE)}
EQUATIONS: dict[str, Equations] = {name: DEFINED[name].equations for name in CELLS}


def named(name: str) -> Cell:
    """The cell with this name, built in or defined by ``cell``."""
    return DEFINED[name].row


def equations_of(cell: Cell) -> Equations:
    """The equations of a cell, built in or defined."""
    return DEFINED[cell.name].equations
