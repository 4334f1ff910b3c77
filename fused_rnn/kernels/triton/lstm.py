"""The LSTM's pointwise parts and its kernels (``fused_rnn.kernels.by_walk.walk``).

The numbers are those of the equations in ``fused_rnn.cells.lstm``.
"""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 — the interpreter looks for it beside what it runs

from fused_rnn.cells import LSTM
from fused_rnn.kernels.triton.activations import sigmoid, tanh
from fused_rnn.kernels.triton.contract import contract
from fused_rnn.kernels.triton.recurrence import Recurrence


@triton.jit
def lstm_step(x, product, bias, c):
    """Take one step: (h, the new carry c, the tape i, f, g, o, c)."""
    i = sigmoid(x[0] + bias[0] + product[0])  # (1)
    f = sigmoid(x[1] + bias[1] + product[1])
    g = tanh(x[2] + bias[2] + product[2])  #    (2)
    o = sigmoid(x[3] + bias[3] + product[3])
    c = f * c + i * g  #                        (3)
    h = o * tanh(c)  #                          (4)
    return h, c, (i, f, g, o, c)


@triton.jit
def lstm_step_backward(tape, c_before, d_h, d_c):
    """Differentiate one step: (d_gates i, f, g, o, what reaches h₋ past the product, d_c₋)."""
    i, f, g, o, c = tape
    tanh_c = tanh(c)
    d_c += d_h * o * (1.0 - tanh_c * tanh_c)  # (4)
    d_o = d_h * tanh_c * o * (1.0 - o)
    d_i = d_c * g * i * (1.0 - i)  #            (3)
    d_f = d_c * c_before * f * (1.0 - f)
    d_g = d_c * i * (1.0 - g * g)
    return (d_i, d_f, d_g, d_o), 0.0, d_c * f


lstm_pack, lstm_forward, lstm_backward = contract(Recurrence(LSTM, lstm_step, lstm_step_backward))
