"""The pointwise parts of the GRU with the reset gate before the product (``fused_rnn.kernels.by_walk.walk``).

The numbers are those of the equations in ``fused_rnn.cells.gru_reset_before``.
"""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 — the interpreter looks for it beside what it runs

from fused_rnn.cells import GRU_RESET_BEFORE
from fused_rnn.kernels.triton.activations import sigmoid, tanh
from fused_rnn.kernels.triton.contract import contract
from fused_rnn.kernels.triton.recurrence import Later, Recurrence


@triton.jit
def gru_reset_before_step(x, product, bias, h):
    """The first stage of a step: (the operand m, z for the second stage, the tape r, z)."""
    r = sigmoid(x[0] + bias[0] + product[0])  # (1)
    z = sigmoid(x[1] + bias[1] + product[1])  # (3)
    return r * h, z, (r, z)  #                  (2)


@triton.jit
def gru_reset_before_later(z, x, product, bias, h):
    """The second stage: (h, the new carry, which is h in full precision, the tape n)."""
    n = tanh(x[0] + bias[2] + product[0])  # (4)
    h = n + z * (h - n)  #                   (5)
    return h, h, (n,)


@triton.jit
def gru_reset_before_step_backward(tape, h_before, d_h, d_carry):
    """Differentiate the second stage: (d_gates z, n, what reaches h₋ past both products, no other carry)."""
    z, n = tape[1], tape[2]
    d_z = d_h * (h_before - n) * z * (1.0 - z)  # (5), (3)
    d_n = d_h * (1.0 - z) * (1.0 - n * n)  #      (5), (4)
    return (d_z, d_n), d_h * z, d_carry


@triton.jit
def gru_reset_before_later_backward(tape, h_before, d_m):
    """Differentiate the operand: (d_gates r, what reaches h₋ past the product)."""
    r, m = tape[0], tape[3]
    return (d_m * m * (1.0 - r),), d_m * r  # (2), (1): h₋ r = m


gru_reset_before_pack, gru_reset_before_forward, gru_reset_before_backward = contract(
    Recurrence(
        GRU_RESET_BEFORE,
        gru_reset_before_step,
        gru_reset_before_step_backward,
        Later(gru_reset_before_later, gru_reset_before_later_backward, emitted=1),
    )
)
