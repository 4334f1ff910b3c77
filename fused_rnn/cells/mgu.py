"""The minimal gated unit: a GRU with one gate in place of two.

Source: Zhou et al. 2016.
"""

from __future__ import annotations

from typing import Any

from fused_rnn.cells.definition import Row, built_in
from fused_rnn.cells.language import sigmoid, tanh


@built_in(Row("mgu", "MGU"), gates="f n")
def mgu(x: Any, W: Any, h: Any) -> Any:
    """One step, of two stages, for ``fused_rnn.Recurrent``."""
    f = sigmoid(x.f + W.f(h))  #   (1) f = σ(W_if x + b_if + W_hf h₋ + b_hf)
    n = tanh(x.n + W.n(f * h))  #  (2) n = tanh(W_in x + b_in + W_hn (f ⊙ h₋) + b_hn)
    return h + f * (n - h)  #      (3) h = (1 − f) ⊙ h₋ + f ⊙ n


MGU = mgu.row
