"""The LSTM whose forget gate is what the input gate leaves: CIFG, the reduced-gate LSTM.

Source: Greff et al. 2017; ONNX's LSTM with input_forget=1. torch.nn has no such cell.
"""

from __future__ import annotations

from typing import Any

from fused_rnn.cells.definition import Row, built_in
from fused_rnn.cells.language import sigmoid, tanh


@built_in(Row("lstm_coupled", "LSTM_COUPLED", projects=True), gates="i g o", states="h c")
def lstm_coupled(x: Any, W: Any, h: Any, c: Any) -> Any:
    """One step; h is before a projection."""
    i = sigmoid(x.i + W.i(h))  # (1) i, o = σ(W_ih x + b_ih + W_hh h₋ + b_hh)
    o = sigmoid(x.o + W.o(h))
    g = tanh(x.g + W.g(h))  # (2) g = tanh(W_ih x + b_ih + W_hh h₋ + b_hh)
    c = c + i * (g - c)  #    (3) c = (1 − i) ⊙ c₋ + i ⊙ g
    h = o * tanh(c)  #        (4) h = o ⊙ tanh(c)
    return h, c


LSTM_COUPLED = lstm_coupled.row
