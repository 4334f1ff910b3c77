"""A kernel that does nothing but meet."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_rnn.kernels.triton.barrier import arrive, wait


@triton.jit(do_not_specialize=["steps"])
def meet(p_counters, steps):
    """Meet the other programs of the launch so many times. p_counters: (steps,) zeros."""
    for s in range(steps):
        arrive(p_counters + s)
        wait(p_counters + s, tl.num_programs(0))
