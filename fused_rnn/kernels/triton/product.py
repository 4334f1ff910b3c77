"""What the products of both walks share."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_rnn.kernels.triton.version import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)

# Chunks of K under way while one is multiplied (``heuristic.STREAM_STAGES``).
STAGES = tl.constexpr(4)


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """X as a product in TF32 wants it: to the nearest number, where the chip itself would cut bits off."""
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # A NaN of all ones would become a zero.
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """Total + left · right in float32."""
    if _INTERPRETED:
        # The interpreter keeps bfloat16 as integers and would multiply those.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)
