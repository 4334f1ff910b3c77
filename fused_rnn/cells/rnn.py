"""The simple (Elman) recurrence, with tanh or relu.

Source: torch.nn.RNN; Elman 1990.
"""

from __future__ import annotations

from typing import Any

from fused_rnn.cells.definition import Row, built_in
from fused_rnn.cells.language import relu, tanh


@built_in(Row("rnn_tanh", "RNN_TANH"), gates="h")
def rnn_tanh(x: Any, W: Any, h: Any) -> Any:
    """One step."""
    return tanh(x.h + W.h(h))  # (1) h = tanh(W_ih x + b_ih + W_hh h₋ + b_hh)


@built_in(Row("rnn_relu", "RNN_RELU"), gates="h")
def rnn_relu(x: Any, W: Any, h: Any) -> Any:
    """One step."""
    return relu(x.h + W.h(h))  # (1) h = max(0, W_ih x + b_ih + W_hh h₋ + b_hh)


RNN_TANH, RNN_RELU = rnn_tanh.row, rnn_relu.row
