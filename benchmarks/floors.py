"""What the machine could do at best, measured in the same run."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.timing import PAUSE

GEMM_SIZE = 2048
RECENT = 5


class GemmRate:
    """The rate of one large single-precision matrix product (n³, MKL or what torch was built with), in flop/s.

    The machine's clock and its neighbours change during a run, so samples are taken all along and a case is held
    against those taken beside it.
    """

    def __init__(self, size: int = GEMM_SIZE) -> None:
        self._flops = 2.0 * size**3
        with torch.random.fork_rng(devices=[]):
            self._a, self._b = torch.randn(size, size), torch.randn(size, size)
        self._out = torch.empty(size, size)
        self.rates: list[float] = []
        self.seconds = 0.0

    def sample(self) -> float:
        """Measure once more, after a pause and an untimed product. Returns flop/s."""
        start = time.perf_counter()
        time.sleep(PAUSE)
        with torch.no_grad():
            torch.mm(self._a, self._b, out=self._out)
            begin = time.perf_counter()
            torch.mm(self._a, self._b, out=self._out)
            end = time.perf_counter()
        self.rates.append(self._flops / (end - begin))
        self.seconds += time.perf_counter() - start
        return self.rates[-1]

    def recent(self, samples: int = 0) -> float:
        """The median of the last ``samples``, or of the last few where that is more."""
        if not self.rates:
            raise ValueError("no sample was taken")
        return statistics.median(self.rates[-max(samples, RECENT) :])

    def overall(self) -> float:
        """The median of the whole run."""
        return statistics.median(self.rates)
