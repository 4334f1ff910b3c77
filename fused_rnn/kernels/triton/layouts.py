"""Which thread holds what in the fragment kernels: the layouts that a plan's numbers imply, as constants of a launch."""

from __future__ import annotations

import functools
from typing import Any

from fused_rnn.kernels.triton.language import gl

# Consecutive k of a thread: one load of 16 bytes from global memory; from shared memory ldmatrix brings pairs.
_FROM_MEMORY, _FROM_SHARED = 8, 2


@functools.cache
def layouts(alone: bool, units: int, batch: int, warps: int) -> dict[str, Any]:
    """MMA, LEFT, RIGHT, POINT, TURN, SUMS, NOTHING, ROWS and TAIL of ``fragments``."""
    if alone:
        mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])
        width = _FROM_SHARED
        # A step's sums are where its pointwise part wants them: a thread has rows r and r + 8 of its warp's 16. With these for
        # neighbouring units (``fragments.in_units``), it reads and writes two numbers at once.
        point = gl.DistributedLinearLayout(
            [[1, 0], [0, 1]] + [[0, 8 << i] for i in range((batch // 8).bit_length() - 1)],
            [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
            [[16 << i, 0] for i in range(warps.bit_length() - 1)],
            [],
            [units, batch],
        )
        across = min(32, units // 8)
        turn = gl.BlockedLayout([8, 1], [across, 32 // across], [1, warps], [0, 1])
        rows = gl.SwizzledSharedLayout(8, max(1, 64 // units), min(8, units // 8), [0, 1])
        tail = gl.SwizzledSharedLayout(8, max(1, 64 // units), min(8, units // 8), [1, 0])
    else:
        mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])
        width = _FROM_MEMORY
        point = gl.BlockedLayout([1, max(1, units * batch // (32 * warps))], [units, 32 // units], [1, warps], [0, 1])
        turn = gl.BlockedLayout([1, 8, 1], [1, 2, 16], [warps, 1, 1], [1, 2, 0])
        rows = None
        tail = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    return {
        "MMA": mma,
        "LEFT": gl.DotOperandLayout(0, mma, width),
        "RIGHT": gl.DotOperandLayout(1, mma, width),
        "POINT": point,
        "TURN": turn,
        "SUMS": gl.SwizzledSharedLayout(2, 2, 8, [1, 0]),
        "NOTHING": gl.SwizzledSharedLayout(1, 1, 1, [0]),
        "ROWS": rows,
        "TAIL": tail,
    }
