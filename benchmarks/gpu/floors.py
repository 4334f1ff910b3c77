"""What the device could do at best, measured in the same run: bytes over bandwidth, operations over the matrix units' rate.

And what a step costs when nothing is computed in it: the barrier among the programs of a cooperative launch.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.cases import Case
from benchmarks.gpu.clock import Clock

_GEMM, _COPY_BYTES = 4096, 256 << 20
_BARRIER_STEPS = 512
BARRIER_OPTIONS = {"num_warps": 4, "launch_cooperative_grid": True, "enable_fp_fusion": True}


def work(case: Case, training: bool) -> tuple[int, int]:
    """(bytes, floating-point operations) that a layer cannot do without.

    Bytes: the input, the output, the gates' tape and their gradients are each written and read once. Operations: the products
    of input and recurrence, in training once more for the gradients of the inputs and once for those of the weights.
    """
    item = 4 if case.dtype == "float32" else 2
    rows, h, d, g = case.steps * case.batch, case.hidden, case.directions, case.gates
    products = 2 * rows * d * g * h * (h + h)
    weights = d * g * h * 2 * h * item
    forward = rows * h * item + rows * d * (2 * g * h + h) * item + weights
    if not training:
        return forward, products
    tape = rows * d * (g + 1) * h * item
    backward = tape + 2 * rows * d * g * h * item + rows * (2 * d * h + 2 * h) * item + 2 * weights
    return forward + tape + backward, 3 * products


class Floors:
    """Rates of the device, and the times that follow."""

    def __init__(self, clock: Clock, size: int = _GEMM, copy_bytes: int = _COPY_BYTES) -> None:
        self._clock, self._size, self._copy_bytes = clock, size, copy_bytes
        self._flops: dict[str, float] = {}
        self._bandwidth = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a large copy, reading and writing counted."""
        if not self._bandwidth:
            source = torch.zeros(self._copy_bytes, dtype=torch.uint8, device=self._clock.device)
            target = torch.empty_like(source)
            self._bandwidth = 2e3 * self._copy_bytes / self._clock.turn(lambda: target.copy_(source))
        return self._bandwidth

    def flops(self, dtype: str) -> float:
        """Operations per second of a large product in this dtype."""
        if dtype not in self._flops:
            # A generator of its own: torch's is of no more use after a capture that failed.
            generator = torch.Generator(self._clock.device).manual_seed(0)
            a = torch.randn(self._size, self._size, device=self._clock.device, generator=generator).to(getattr(torch, dtype))
            self._flops[dtype] = 2e3 * self._size**3 / self._clock.turn(lambda: a @ a)
        return self._flops[dtype]

    def milliseconds(self, case: Case, training: bool) -> dict[str, float]:
        """The two floors of a case."""
        moved, operations = work(case, training)
        return {"floor_bytes_ms": 1e3 * moved / self.bandwidth, "floor_flops_ms": 1e3 * operations / self.flops(case.dtype)}


def barrier_microseconds(clock: Clock, programs: int) -> float:
    """What one barrier among so many programs costs, in a launch that does nothing else."""
    from benchmarks.gpu.barrier import meet

    def launch() -> None:
        counters = torch.zeros(_BARRIER_STEPS, dtype=torch.int32, device=clock.device)
        meet[(programs,)](counters, _BARRIER_STEPS, **BARRIER_OPTIONS)

    with torch.cuda.device(clock.device):
        return 1e3 * clock.turn(launch) / _BARRIER_STEPS
