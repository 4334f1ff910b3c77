"""A call as a CUDA graph: what the device needs for it when nobody has to issue its kernels one by one."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.judging import device_usable

# Calls before the capture, so that what is made once (handles, work areas, compiled code) is there.
WARM_UP = 3


def capture(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Record a call as torch's notes on CUDA graphs tell, warm-up on a side stream included. Returns what replays it.

    Raises:
        RuntimeError: if the call does what a graph cannot hold.
    """
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        before.wait_stream(stream)
        torch.cuda.synchronize(device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                # The results' memory belongs to the graph; nobody reads them.
                call()
        except BaseException:
            _end_allocation(device, pool)
            raise
    finally:
        # torch.cuda.graph leaves its stream the current one if the capture does not end well.
        torch.cuda.set_stream(before)
    torch.cuda.synchronize(device)
    return graph.replay


def _end_allocation(device: torch.device, pool: Any) -> None:
    """Take the allocator out of a capture that failed, so that the memory of its pool is given back.

    A graph does so itself where its capture ends; where ending it raises, torch's allocator goes on as if it lasted, and frees
    nothing more when memory is short. There is no public call for it; without this one, a run loses memory and no more.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(Exception):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


def tried(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None] | None, str | None]:
    """The graph's replay, or why there is none.

    Raises:
        RuntimeError: if the device is of no more use after the attempt.
    """
    try:
        replay = capture(call, device)
        # A graph may be made and yet not run.
        replay()
        torch.cuda.synchronize(device)
        return replay, None
    except Exception as error:
        # The error itself does not leave this block: its traceback holds tensors.
        why = f"failed: {told(error)}"
    clear(device)
    if not device_usable():
        raise RuntimeError(f"the device no longer answers after a capture that {why}")
    return None, why


def clear(device: torch.device) -> None:
    """Give back the memory of calls and graphs that are gone."""
    gc.collect()
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return
    # What a failed capture left behind is told once, by the next call. Whether it lasts is asked afterwards.
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize(device)
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def told(error: BaseException) -> str:
    """An error's kind and first line, and those of the one that came before it: ending a capture raises another."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    return _line(error) if first is error else f"{_line(error)} (after {_line(first)})"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
