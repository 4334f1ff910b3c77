"""The cells: one file each, with the cell's row (``fused_rnn.data.cell``) and its numbered equations in plain torch.

What the rest of the package knows of a cell comes from here. A fused kernel has the same numbers beside its lines.
"""

from __future__ import annotations

from fused_rnn.cells import gru, gru_reset_before, lstm, rnn
from fused_rnn.cells.definition import DEFINED, cell
from fused_rnn.cells.gru import GRU
from fused_rnn.cells.gru_reset_before import GRU_RESET_BEFORE
from fused_rnn.cells.language import relu, sigmoid, tanh
from fused_rnn.cells.lstm import LSTM
from fused_rnn.cells.rnn import RNN_RELU, RNN_TANH
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
    "named",
    "relu",
    "sigmoid",
    "tanh",
]

EQUATIONS: dict[str, Equations] = {
    each.cell.name: each
    for each in (rnn.TANH_EQUATIONS, rnn.RELU_EQUATIONS, lstm.EQUATIONS, gru.EQUATIONS, gru_reset_before.EQUATIONS)
}
CELLS: dict[str, Cell] = {name: equations.cell for name, equations in EQUATIONS.items()}


def named(name: str) -> Cell:
    """The cell with this name, built in or defined by ``cell``."""
    return CELLS[name] if name in CELLS else DEFINED[name].row


def equations_of(cell: Cell) -> Equations:
    """The equations of a cell, built in or defined."""
    return DEFINED[cell.name].equations if cell.derived else EQUATIONS[cell.name]
