"""Gluon, Triton's language of explicit layouts, under one set of names for every Triton that is supported.

Under ``TRITON_INTERPRET=1`` a stand-in without layouts takes its place, and the interpreter runs the same kernels on the CPU.
"""

from __future__ import annotations

from typing import Any

import triton

from fused_rnn.kernels.triton.barrier import WAIT
from fused_rnn.kernels.triton.version import INTERPRETED

if INTERPRETED:
    from triton import jit

    from fused_rnn.kernels.triton import standin as gl
    from fused_rnn.kernels.triton.standin import barrier, mma, narrow, wait_each
else:
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2 as mma

    # Renamed after Triton 3.6.
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier

    @triton.jit
    def narrow(x, DTYPE: gl.constexpr):
        """X in a narrower dtype, to the nearest number."""
        return x.to(DTYPE)

    @triton.jit
    def wait_each(p_counter, needed):
        """Wait, each thread for its own element, until a counter is as high as needed."""
        gl.inline_asm_elementwise(WAIT, "=&r,l,r", [p_counter.to(gl.int64), needed], dtype=gl.int32, is_pure=False, pack=1)


def constant(value: int) -> Any:
    """A number that kernels may read from their module."""
    return value if INTERPRETED else triton.language.constexpr(value)


__all__ = ["barrier", "constant", "gl", "jit", "mma", "narrow", "wait_each"]
