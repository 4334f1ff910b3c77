"""The simple (Elman) recurrence with tanh or relu: its rows, and the equation of one step in plain torch.

Source: torch.nn.RNN; Elman 1990.
"""

from __future__ import annotations

from torch import Tensor

from fused_rnn.data.cell import Cell
from fused_rnn.data.equations import Equations

RNN_TANH = Cell(
    "rnn_tanh", "RNN_TANH", ("h",), ("h",), ("h",), ("h",), reads_before=None, direct=False, tape_is_out=True, module="rnn"
)
RNN_RELU = Cell(
    "rnn_relu", "RNN_RELU", ("h",), ("h",), ("h",), ("h",), reads_before=None, direct=False, tape_is_out=True, module="rnn"
)


def rnn_tanh_step(gates_x: Tensor, gates_h: Tensor, _: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Take one step.

    Args:
        gates_x: W_ih x + b_ih, (n, H).
        gates_h: W_hh h₋ + b_hh, (n, H).

    Returns:
        the new states (h,), and the tape (h,), (n, H).
    """
    h = (gates_x + gates_h).tanh()  # (1) h = tanh(W_ih x + b_ih + W_hh h₋ + b_hh)
    return (h,), (h,)


def rnn_relu_step(gates_x: Tensor, gates_h: Tensor, _: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Take one step; arguments and results as in ``rnn_tanh_step``."""
    h = (gates_x + gates_h).relu()  # (1) h = max(0, W_ih x + b_ih + W_hh h₋ + b_hh)
    return (h,), (h,)


def rnn_tanh_gates(tape: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The block of a ``gates_x`` and a ``gates_h`` that lead to this tape: (1) turned round."""
    return (tape[0].atanh(),), (tape[0].new_zeros(tape[0].shape),)


def rnn_relu_gates(tape: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As ``rnn_tanh_gates``: where h is zero, any negative sum led to it and relu has the slope of zero."""
    return (tape[0],), (tape[0].new_zeros(tape[0].shape),)


TANH_EQUATIONS = Equations(RNN_TANH, rnn_tanh_step, rnn_tanh_gates)
RELU_EQUATIONS = Equations(RNN_RELU, rnn_relu_step, rnn_relu_gates)
