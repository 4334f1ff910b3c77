"""A barrier among the programs that share a batch tile: one counter for every step, which each program raises once.

Every counter is used once, so nobody can miss the value that ends his wait. ``tl.debug_barrier`` brings the threads of a
program together: before the counter is raised, so that it speaks for all of them, and after the wait, so that none runs ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_rnn.kernels.triton.version import HAS_POLL

_HAS_POLL = tl.constexpr(HAS_POLL)


@triton.jit
def arrive(p_counter):
    """Publish all that this program has written."""
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(p_counter, programs):
    """Wait until so many programs have arrived; what they wrote before is visible afterwards."""
    if _HAS_POLL:
        tl.atomic_poll(p_counter, programs, sem="acquire", scope="gpu")
    else:
        while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < programs:
            pass
    tl.debug_barrier()
