"""The GRU, with the reset gate after the product.

Source: torch.nn.GRU and cuDNN; Cho et al. 2014, whose reset gate multiplies h₋ before the product with W_hn.
"""

from __future__ import annotations

from typing import Any

from fused_rnn.cells.definition import Row, built_in
from fused_rnn.cells.language import sigmoid, tanh


@built_in(Row("gru", "GRU"), gates="r z n")
def gru(x: Any, W: Any, h: Any) -> Any:
    """One step."""
    r = sigmoid(x.r + W.r(h))  #   (1) r = σ(W_ir x + b_ir + W_hr h₋ + b_hr)
    z = sigmoid(x.z + W.z(h))  #   (2) z = σ(W_iz x + b_iz + W_hz h₋ + b_hz)
    n = tanh(x.n + r * W.n(h))  #  (3) n = tanh(W_in x + b_in + r ⊙ (W_hn h₋ + b_hn))
    return n + z * (h - n)  #      (4) h = (1 − z) ⊙ n + z ⊙ h₋


GRU = gru.row
