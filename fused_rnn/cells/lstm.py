"""The LSTM.

Source: torch.nn.LSTM; Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000. The projection of h (Sak et al.
2014) is the walks' affair, not the cell's.
"""

from __future__ import annotations

from typing import Any

from fused_rnn.cells.definition import Row, built_in
from fused_rnn.cells.language import sigmoid, tanh


@built_in(Row("lstm", "LSTM", forget="f", projects=True, in_one_piece=True), gates="i f g o", states="h c")
def lstm(x: Any, W: Any, h: Any, c: Any) -> Any:
    """One step; h is before a projection."""
    i = sigmoid(x.i + W.i(h))  # (1) i, f, o = σ(W_ih x + b_ih + W_hh h₋ + b_hh)
    f = sigmoid(x.f + W.f(h))
    o = sigmoid(x.o + W.o(h))
    g = tanh(x.g + W.g(h))  # (2) g = tanh(W_ih x + b_ih + W_hh h₋ + b_hh)
    c = f * c + i * g  #      (3) c = f ⊙ c₋ + i ⊙ g
    h = o * tanh(c)  #        (4) h = o ⊙ tanh(c)
    return h, c


LSTM = lstm.row
