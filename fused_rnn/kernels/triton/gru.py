"""The GRU's pointwise parts and its kernels (``fused_rnn.kernels.by_walk.walk``).

The numbers are those of the equations in ``fused_rnn.cells.gru``.
"""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 — the interpreter looks for it beside what it runs

from fused_rnn.cells import GRU
from fused_rnn.kernels.triton.activations import sigmoid, tanh
from fused_rnn.kernels.triton.contract import contract
from fused_rnn.kernels.triton.recurrence import Recurrence


@triton.jit
def gru_step(x, product, bias, h):
    """Take one step: (h, the new carry, which is h in full precision, the tape r, z, n, hn)."""
    r = sigmoid(x[0] + bias[0] + product[0])  # (1)
    z = sigmoid(x[1] + bias[1] + product[1])  # (2)
    hn = bias[3] + product[2]
    n = tanh(x[2] + bias[2] + r * hn)  #        (3)
    h = n + z * (h - n)  #                      (4)
    return h, h, (r, z, n, hn)


@triton.jit
def gru_step_backward(tape, h_before, d_h, d_carry):
    """Differentiate one step: (d_gates hn, r, z, n, what reaches h₋ past the product, no other carry)."""
    r, z, n, hn = tape
    d_n = d_h * (1.0 - z) * (1.0 - n * n)  #           (4), (3)
    d_z = d_h * (h_before - n) * z * (1.0 - z)  #      (4), (2)
    d_r = d_n * hn * r * (1.0 - r)  #                  (3), (1)
    return (d_n * r, d_r, d_z, d_n), d_h * z, d_carry


gru_pack, gru_forward, gru_backward = contract(Recurrence(GRU, gru_step, gru_step_backward))
