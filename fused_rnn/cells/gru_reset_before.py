"""The GRU with the reset gate before the product.

Source: Cho et al. 2014; ONNX's GRU with linear_before_reset=0, Keras' with reset_after=False. torch.nn has no such cell.
"""

from __future__ import annotations

from typing import Any

from fused_rnn.cells.definition import Row, built_in
from fused_rnn.cells.language import sigmoid, tanh


@built_in(Row("gru_reset_before", "GRU_RESET_BEFORE"), gates="r z n")
def gru_reset_before(x: Any, W: Any, h: Any) -> Any:
    """One step, of two stages: every unit of m is there before the product with W_hn."""
    r = sigmoid(x.r + W.r(h))  # (1) r = σ(W_ir x + b_ir + W_hr h₋ + b_hr)
    m = r * h  #                 (2) m = r ⊙ h₋
    z = sigmoid(x.z + W.z(h))  # (3) z = σ(W_iz x + b_iz + W_hz h₋ + b_hz)
    n = tanh(x.n + W.n(m))  #    (4) n = tanh(W_in x + b_in + W_hn m + b_hn)
    return n + z * (h - n)  #    (5) h = (1 − z) ⊙ n + z ⊙ h₋


GRU_RESET_BEFORE = gru_reset_before.row
