"""The correctness gate: every regime on small problems first, then each case at a few steps before it is timed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gate import FLOOR_EPS, TIMES_TORCH
from benchmarks.gpu import problem as problems
from benchmarks.gpu.cases import DTYPES, EXTRAS, Case

# Steps of the problems that results are judged on: enough for every buffer to be used again.
STEPS = 6

# Sizes that no tile divides, and enough units and rows that several programs share the work and meet in each step.
REGIMES = {"resident": (41, 35), "cooperative": (200, 35), "stepwise": (200, 35), "library": (200, 35)}


@dataclass(frozen=True)
class Verdict:
    """What the gate found: whether all results are within their bounds, and the one nearest to its bound or farthest beyond."""

    what: str
    passed: bool
    worst: str
    error: float
    bound: float


def judge(case: Case, device: torch.device, backend: str | None) -> Verdict:
    """Compare with the float64 reference: error ≤ 2 × that of plain torch in the same dtype + a floor."""
    problem = problems.make(case, device, STEPS)
    exact = problem.to(torch.float64)
    truth = problems.ours(exact, "reference")(True)
    yardstick = problems.ours(problem, "reference")(True)
    found = problems.ours(problem, backend)(True)
    eps = torch.finfo(problem.input.dtype).eps
    worst, ratio, error, bound = "", -1.0, 0.0, 0.0
    for name, value in truth.items():
        off = (found[name].double() - value).abs().max().item()
        allowed = TIMES_TORCH * (yardstick[name].double() - value).abs().max().item()
        allowed += FLOOR_EPS * eps * value.abs().max().item()
        # A NaN is the worst of errors.
        now = off / allowed if off == off else float("inf")
        if now > ratio:
            worst, ratio, error, bound = name, now, off, allowed
    return Verdict(case.name, ratio <= 1.0, worst, error, bound)


def every_regime(device: torch.device, backend: str | None, quick: bool) -> Iterator[Verdict]:
    """All cells × dtypes × extras in every regime of the Triton backend; another backend has one.

    Plain problems are left to the cases. quick: bfloat16 with resets alone, because each of them compiles kernels of its own.
    """
    dtypes, extras = (("bfloat16",), ("reset",)) if quick else (DTYPES, EXTRAS[1:])
    for regime, (hidden, batch) in REGIMES.items() if backend in (None, "triton") else [("", (41, 7))]:
        for cell in ("lstm", "gru"):
            for dtype in dtypes:
                for extra in extras:
                    case = Case(cell, hidden, batch, STEPS, dtype, 2, extra)
                    with _force(regime):
                        verdict = judge(case, device, backend)
                    yield dataclasses.replace(verdict, what=f"{regime} {verdict.what}".strip())


def _force(regime: str) -> contextlib.AbstractContextManager[None]:
    if not regime:
        return contextlib.nullcontext()
    from fused_rnn.kernels.triton import plan

    return plan.force(regime=regime)
