"""The LSTM: its row, and the equations of one step in plain torch.

Source: torch.nn.LSTM; Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000. The projection of h
(Sak et al. 2014) is the same for every cell and stands in ``fused_rnn.kernels.reference.recurrence``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.data.cell import Cell
from fused_rnn.data.equations import Equations


def _lstm_before_projection(tape: Sequence[Tensor]) -> Tensor:
    """The LSTM's o ⊙ tanh(c)."""
    _, _, _, o, c = tape
    return o * c.tanh()


LSTM = Cell(
    "lstm",
    "LSTM",
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    tape=("i", "f", "g", "o", "c"),
    d_gates=("i", "f", "g", "o"),
    reads_before="c",
    direct=False,
    forget="f",
    projected=_lstm_before_projection,
    in_one_piece=True,
)


def lstm_step(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Take one step.

    Args:
        gates_x: W_ih x + b_ih, (n, 4H), gate order i|f|g|o.
        gates_h: W_hh h₋ + b_hh, (n, 4H).
        states: h₋ (n, P), c₋ (n, H).

    Returns:
        the new states (h before a projection, c), and the tape (i, f, g, o, c), all (n, H).
    """
    _, c = states
    i, f, g, o = (gates_x + gates_h).chunk(4, dim=-1)
    i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()  # (1) i, f, o = σ(W_ih x + b_ih + W_hh h₋ + b_hh)
    g = g.tanh()  #                                    (2) g = tanh(W_ih x + b_ih + W_hh h₋ + b_hh)
    c = f * c + i * g  #                               (3) c = f ⊙ c₋ + i ⊙ g
    h = o * c.tanh()  #                                (4) h = o ⊙ tanh(c)
    return (h, c), (i, f, g, o, c)


def lstm_gates(tape: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The blocks of a ``gates_x`` and a ``gates_h`` that lead to this tape: (1) and (2) turned round."""
    i, f, g, o, _ = tape
    zero = i.new_zeros(i.shape)
    return (i.logit(), f.logit(), g.atanh(), o.logit()), (zero, zero, zero, zero)


EQUATIONS = Equations(LSTM, lstm_step, lstm_gates)
