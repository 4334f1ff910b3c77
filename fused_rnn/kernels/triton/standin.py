"""Gluon without layouts, for Triton's interpreter: the same kernels run on the CPU, so that they are tested without a GPU.

A layout says which thread holds what; the interpreter has one program at a time and no threads. So layouts are dropped, a
matrix instruction is a product, and shared memory is a tensor that is replaced part by part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def __getattr__(name: str) -> Any:
    """All that needs no layout is Triton's own; asked for at each use, because the interpreter replaces it during a launch."""
    return getattr(tl, name)


def NVMMADistributedLayout(*_: Any, **__: Any) -> Any:
    """No layout."""
    return None


BlockedLayout = DistributedLinearLayout = SliceLayout = DotOperandLayout = NVMMADistributedLayout
SwizzledSharedLayout = NVMMADistributedLayout


def arange(start: int, end: int, layout: Any = None) -> Any:
    """``tl.arange``."""
    return tl.arange(start, end)


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Any:
    """``tl.full``."""
    return tl.full(shape, value, dtype)


def load(pointer: Any, mask: Any = None, other: Any = None, cache_modifier: str | None = None) -> Any:
    """``tl.load``."""
    return tl.load(pointer, mask=mask, other=other)


def convert_layout(value: Any, layout: Any) -> Any:
    """The value, which has no layout."""
    return value


class _Shared:
    """A tensor in shared memory, or a part of it. Gluon's is undefined at first; this is NaN, or for integers their like."""

    def __init__(self, dtype: Any, shape: Any, memory: Any = None) -> None:
        self.dtype = dtype
        if memory is None:
            element = tl.full((1,), float("nan"), dtype).handle.data
            memory = np.full([int(size) for size in shape], element[0], element.dtype)
        self.memory = memory

    def index(self, place: Any) -> _Shared:
        return _Shared(self.dtype, None, self.memory[int(place)])

    def slice(self, start: int, length: int, dim: int) -> _Shared:
        cut = [slice(None)] * dim + [slice(start, start + length)]
        return _Shared(self.dtype, None, self.memory[tuple(cut)])

    def store(self, value: Any) -> None:
        self.memory[...] = value.handle.data

    def load(self, layout: Any) -> Any:
        kind = tl.block_type(self.dtype, list(self.memory.shape))
        return tl.tensor(TensorHandle(self.memory.copy(), self.dtype.scalar), kind)


def allocate_shared_memory(dtype: Any, shape: Any, layout: Any = None) -> _Shared:
    """Shared memory of one program."""
    return _Shared(dtype, shape)


def mma(left: Any, right: Any, total: Any) -> Any:
    """Total + left · right in float32."""
    # The interpreter keeps bfloat16 as integers and would multiply those.
    return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")


def narrow(x: Any, dtype: Any) -> Any:
    """``x.to(dtype)`` to the nearest number: the interpreter's own conversion to bfloat16 cuts bits off."""
    if dtype != tl.bfloat16 or x.dtype == tl.bfloat16:
        return x.to(dtype)
    bits = x.to(tl.float32).handle.data.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    special = (bits & 0x7F800000) == 0x7F800000
    rounded = np.where(special, (bits >> 16).astype(np.uint16), rounded)
    return tl.tensor(TensorHandle(rounded, tl.bfloat16), tl.block_type(tl.bfloat16, list(bits.shape)))


def barrier() -> None:
    """The threads of a program meet; here it has one."""
    tl.debug_barrier()


def wait_each(p_counter: Any, needed: Any) -> None:
    """Wait until every counter is as high as needed."""
    while True:
        counted = tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu")
        if bool(np.all(counted.handle.data >= needed.handle.data)):
            return
