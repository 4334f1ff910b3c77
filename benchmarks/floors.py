"""What the machine could do at best, measured in the same run.

Three floors of a case's time: its matrix products at the rate of one large library product (GEMM), at the rate of nothing but
fused multiply-adds in registers (FMA), and its inputs and results at the speed of memory (bandwidth).

The machine's clock and its neighbours change during a run, so samples are taken all along and a case is held against those
taken beside it. Only of the multiply-adds the fastest sample so far counts: what a busy neighbour hid of a peak is still there.
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.cases import Case
from benchmarks.fma import fma_rate
from benchmarks.timing import PAUSE, quantiles

GEMM_SIZE = 2048
RECENT = 5

# Three arrays of this many floats, several times the size of a last-level cache together.
TRIAD_ELEMENTS = 24 << 20


class Rate:
    """A rate that is sampled again and again."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.seconds = 0.0

    def measure(self) -> float:
        """Measure once. Returns the rate per second."""
        raise NotImplementedError

    def sample(self) -> float:
        """Measure once more, after a pause. Returns the rate per second."""
        start = time.perf_counter()
        time.sleep(PAUSE)
        with torch.no_grad():
            self.rates.append(self.measure())
        self.seconds += time.perf_counter() - start
        return self.rates[-1]

    def recent(self, samples: int = 0) -> float:
        """The median of the last ``samples``, or of the last few where that is more."""
        if not self.rates:
            raise ValueError("no sample was taken")
        return statistics.median(self.rates[-max(samples, RECENT) :])

    def best(self) -> float:
        """The fastest sample so far."""
        return max(self.rates)


class GemmRate(Rate):
    """The rate of one large matrix product (n³, MKL or what torch was built with), in flop/s."""

    def __init__(self, size: int = GEMM_SIZE, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._flops = 2.0 * size**3
        with torch.random.fork_rng(devices=[]):
            self._a, self._b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        self._out = torch.empty(size, size, dtype=dtype)

    def measure(self) -> float:
        """Measure the second of two products."""
        torch.mm(self._a, self._b, out=self._out)
        begin = time.perf_counter()
        torch.mm(self._a, self._b, out=self._out)
        return self._flops / (time.perf_counter() - begin)


class FmaRate(Rate):
    """The rate of fused multiply-adds on registers alone (``benchmarks.fma``), in flop/s: what no product can exceed."""

    def __init__(self, threads: int, bits: int = 32) -> None:
        super().__init__()
        self._threads, self._bits = threads, bits

    def measure(self) -> float:
        """Measure once."""
        return fma_rate(self._threads, self._bits)


class Bandwidth(Rate):
    """The rate of a triad (a = b + s · c over arrays that no cache holds), in bytes/s: two arrays read, one written."""

    def __init__(self, elements: int = TRIAD_ELEMENTS) -> None:
        super().__init__()
        self._a, self._b, self._c = (torch.zeros(elements) for _ in range(3))

    def measure(self) -> float:
        """Measure once."""
        begin = time.perf_counter()
        torch.add(self._b, self._c, alpha=3.0, out=self._a)
        return 3 * self._a.nbytes / (time.perf_counter() - begin)


class Floors:
    """The rates of a run, for each number of threads and dtype that its cases have; torch's threads are set by the caller.

    Args:
        size: of the matrix product.
        elements: of each array of the triad.
    """

    def __init__(self, size: int = GEMM_SIZE, elements: int = TRIAD_ELEMENTS) -> None:
        self._size, self._elements = size, elements
        self.gemms: dict[tuple[int, str], GemmRate] = {}
        self.fmas: dict[tuple[int, str], FmaRate] = {}
        self.bandwidths: dict[int, Bandwidth] = {}

    def gemm(self, threads: int, dtype: str) -> GemmRate:
        """The product's rate. For a half precision that of the dtype or of float32, which is faster here."""
        key = threads, dtype
        if key not in self.gemms:
            rate = GemmRate(self._size, getattr(torch, dtype))
            if dtype in ("bfloat16", "float16"):
                single = self.gemm(threads, "float32")
                rate = rate if rate.sample() > single.sample() else single
            self.gemms[key] = rate
        return self.gemms[key]

    def sample_others(self, threads: int, dtype: str) -> None:
        """Sample the multiply-adds and the bandwidth."""
        wide = "float64" if dtype == "float64" else "float32"
        fma = self.fmas.setdefault((threads, wide), FmaRate(threads, 64 if wide == "float64" else 32))
        # The first cases would be held against a peak that nobody has seen yet.
        for _ in range(1 if fma.rates else RECENT):
            fma.sample()
        if threads not in self.bandwidths:
            self.bandwidths[threads] = Bandwidth(self._elements)
            # The first pass touches the memory.
            self.bandwidths[threads].measure()
        self.bandwidths[threads].sample()

    def of(self, case: Case, threads: int, gemm_samples: int) -> dict[str, float]:
        """The floors of a case in ms: ``gemm``, ``fma``, ``bandwidth``."""
        wide = "float64" if case.dtype == "float64" else "float32"
        return {
            "gemm": case.flops / self.gemm(threads, case.dtype).recent(gemm_samples) * 1e3,
            "fma": case.flops / self.fmas[threads, wide].best() * 1e3,
            "bandwidth": case.traffic / self.bandwidths[threads].recent() * 1e3,
        }

    def summary(self, threads: int) -> dict[str, dict[str, float]]:
        """The float32 rates of the whole run with so many threads: ``gemm_gflops``, ``fma_gflops``, ``bandwidth_gbs``."""
        rates = {
            "gemm_gflops": self.gemms.get((threads, "float32")),
            "fma_gflops": self.fmas.get((threads, "float32")),
            "bandwidth_gbs": self.bandwidths.get(threads),
        }
        return {
            name: quantiles([r / 1e9 for r in rate.rates]) for name, rate in rates.items() if rate is not None and rate.rates
        }
