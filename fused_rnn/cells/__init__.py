"""The cells: one file each, with its numbered equations. The cell's row (``fused_rnn.data.cell``) and its backward follow.

What the rest of the package knows of a cell comes from here, the kernels included. Nothing that is imported here needs torch:
setup.py writes the C++ cells before it is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rnn.cells.definition import DEFINED, cell
from fused_rnn.cells.gru import GRU, gru
from fused_rnn.cells.gru_reset_before import GRU_RESET_BEFORE, gru_reset_before
from fused_rnn.cells.language import relu, sigmoid, tanh
from fused_rnn.cells.lstm import LSTM, lstm
from fused_rnn.cells.lstm_coupled import LSTM_COUPLED, lstm_coupled
from fused_rnn.cells.mgu import MGU, mgu
from fused_rnn.cells.rnn import RNN_RELU, RNN_TANH, rnn_relu, rnn_tanh
from fused_rnn.data.cell import Cell

if TYPE_CHECKING:
    from fused_rnn.data.equations import Equations

__all__ = [
    "BUILT_IN",
    "CELLS",
    "GRU",
    "GRU_RESET_BEFORE",
    "LSTM",
    "LSTM_COUPLED",
    "MGU",
    "RNN_RELU",
    "RNN_TANH",
    "cell",
    "equations_of",
    "gru",
    "gru_reset_before",
    "lstm",
    "lstm_coupled",
    "mgu",
    "named",
    "relu",
    "rnn_relu",
    "rnn_tanh",
    "sigmoid",
    "tanh",
]

# Those that every backend has, by their names, in the order in which the C++ kernels number them.
BUILT_IN = {each.row.name: each for each in (rnn_tanh, rnn_relu, lstm, gru, gru_reset_before, lstm_coupled, mgu)}
CELLS: dict[str, Cell] = {name: each.row for name, each in BUILT_IN.items()}


def named(name: str) -> Cell:
    """The cell with this name, built in or defined by ``cell``."""
    return DEFINED[name].row


def equations_of(cell: Cell) -> Equations:
    """The equations of a cell, built in or defined."""
    return DEFINED[cell.name].equations
