"""The simple recurrence's pointwise parts and its kernels, tanh and relu (``fused_rnn.kernels.by_walk.walk``).

The numbers are those of the equations in ``fused_rnn.cells.rnn``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_rnn.cells import RNN_RELU, RNN_TANH
from fused_rnn.kernels.triton.activations import tanh
from fused_rnn.kernels.triton.contract import contract
from fused_rnn.kernels.triton.recurrence import Recurrence


@triton.jit
def rnn_tanh_step(x, product, bias, carry):
    """Take one step: (h, no carry, the tape h, which is the output)."""
    h = tanh(x[0] + bias[0] + product[0])  # (1)
    return h, carry, (h,)


@triton.jit
def rnn_relu_step(x, product, bias, carry):
    """Take one step, as ``rnn_tanh_step``; NaN stays NaN."""
    h = x[0] + bias[0] + product[0]
    h = tl.where(h <= 0.0, 0.0, h)  # (1)
    return h, carry, (h,)


@triton.jit
def rnn_tanh_step_backward(tape, before, d_h, d_carry):
    """Differentiate one step: (d_gates h, nothing past the product, no carry)."""
    h = tape[0]
    return (d_h * (1.0 - h * h),), 0.0, d_carry


@triton.jit
def rnn_relu_step_backward(tape, before, d_h, d_carry):
    """Differentiate one step, as ``rnn_tanh_step_backward``."""
    return (tl.where(tape[0] > 0.0, d_h, 0.0),), 0.0, d_carry


rnn_tanh_pack, rnn_tanh_forward, rnn_tanh_backward = contract(Recurrence(RNN_TANH, rnn_tanh_step, rnn_tanh_step_backward))
rnn_relu_pack, rnn_relu_forward, rnn_relu_backward = contract(Recurrence(RNN_RELU, rnn_relu_step, rnn_relu_step_backward))
