"""Times on a device: events where it is CUDA, the processor's clock where a test runs on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# A turn repeats a short call until it has lasted about so long, in seconds.
TURN = 0.02
MOST_CALLS = 50
# Calls of which the host's time is the median.
HOST_CALLS = 7


class Clock:
    """Measures milliseconds of a call on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        self.wait()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def host(self, call: Callable[[], Any]) -> float:
        """Milliseconds until a call returns, which need not be when the device has done it: the median of some calls."""
        times = []
        for _ in range(HOST_CALLS):
            self.wait()
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        self.wait()
        return statistics.median(times)

    def turn(self, call: Callable[[], Any]) -> float:
        """The median of some calls, after one that is not counted."""
        estimate = self.once(call)
        calls = max(1, min(MOST_CALLS, int(1e3 * TURN / max(estimate, 1e-3))))
        return statistics.median(self.once(call) for _ in range(calls))

    def interleave(self, calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Time the calls in turn, round by round; whoever begins changes."""
        names = list(calls)
        found: dict[str, list[float]] = {name: [] for name in names}
        for i in range(rounds):
            first = i % max(1, len(names))
            for name in names[first:] + names[:first]:
                found[name].append(self.turn(calls[name]))
        return found

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call takes on the device beyond what is there already; None where nobody counts."""
        if self.device.type != "cuda":
            return None
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return int(torch.cuda.max_memory_allocated(self.device) - before)


def launches(call: Callable[[], Any]) -> int:
    """How many kernels, copies and fills a call puts on the CUDA device, as torch's profiler counts them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())
