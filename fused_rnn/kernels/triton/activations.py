"""The nonlinearities, in operations that the interpreter and every Triton version have (no libdevice, no inline assembly)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + e^−x): 0 and 1 at the infinities, because e^−x may overflow to infinity."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """2σ(2x) − 1, and near zero, where that would cancel, the series of tanh.

    The series is right to a unit in the last place of float32 up to 1/4; float64 stays right to its rounding of 1.
    """
    wide = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    if x.dtype == tl.float64:
        return wide
    y = x * x
    near = x + x * y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0))))
    return tl.where(tl.abs(x) < 0.25, near, wide)
