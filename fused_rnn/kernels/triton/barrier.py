"""A barrier among the programs that share a batch tile: one counter for every step, which each program raises once.

Every counter is used once, so nobody can miss the value that ends his wait. ``tl.debug_barrier`` brings the threads of a
program together before the counter is raised, so that it speaks for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_rnn.kernels.triton.version import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
# Every thread polls for itself: a loop around an atomic operation takes two barriers of the program for each poll.
WAIT = tl.constexpr("{ .reg .pred p; AGAIN: ld.acquire.gpu.global.u32 $0, [$1]; setp.lt.u32 p, $0, $2; @p bra AGAIN; }")


@triton.jit
def arrive(p_counter):
    """Publish all that this program has written."""
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(p_counter, programs):
    """Wait until so many programs have arrived; what they wrote before is visible afterwards."""
    if _INTERPRETED:
        while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < programs:
            pass
    else:
        tl.inline_asm_elementwise(WAIT, "=&r,l,r", [p_counter.to(tl.int64), programs], dtype=tl.int32, is_pure=False, pack=1)
