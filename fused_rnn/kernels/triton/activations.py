"""The nonlinearities. In float32 the chip's own approximations of 2^x and 1/x, right to about two units in the last place."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_rnn.kernels.triton.version import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logistic(x):
    """1 / (1 + e^−x): 0 and 1 at the infinities, because e^−x may overflow to infinity."""
    if _INTERPRETED or x.dtype == tl.float64:
        y = 1.0 / (1.0 + tl.exp(-x))
    else:
        # tl.exp and a division also look after numbers below 2^−126, three instructions each, which add nothing to 1.
        e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -_LOG2_E], tl.float32, True, 1)
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], tl.float32, True, 1)
    return y


@triton.jit
def sigmoid(x):
    """The logistic function, σ(x)."""
    return _logistic(x)


@triton.jit
def tanh(x):
    """2σ(2x) − 1, and near zero, where that would cancel, the series of tanh.

    The series is right to a unit in the last place of float32 up to 1/4; float64 stays right to its rounding of 1.
    """
    wide = 2.0 * _logistic(2.0 * x) - 1.0
    if x.dtype == tl.float64:
        return wide
    y = x * x
    near = x + x * y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0))))
    return tl.where(tl.abs(x) < 0.25, near, wide)


@triton.jit
def where_positive(x, y):
    """Y where x is positive, else zero; where x is NaN, y too, as in the derivative of torch's relu."""
    return tl.where(x <= 0.0, 0.0, y)


@triton.jit
def relu(x):
    """X where positive, else zero; NaN stays NaN."""
    return where_positive(x, x)


@triton.jit
def everywhere(like, number):
    """A number for every unit, in the dtype of ``like``."""
    return (like != like).to(like.dtype) * 0.0 + number
