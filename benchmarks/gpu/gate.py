"""The correctness gate: every regime on small problems, and each case at a few steps, before anything is timed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.gate import FLOOR_EPS, TIMES_TORCH
from benchmarks.gpu import problem as problems
from benchmarks.gpu.cases import CELLS, DTYPES, EXTRAS, Case

# Steps of the problems that results are judged on: enough for every buffer to be used again.
STEPS = 6

# Sizes that no tile divides, and enough units and rows that several programs share the work and meet in each step.
REGIMES = {"resident": (41, 35), "cooperative": (200, 35), "streamed": (200, 35), "library": (200, 35)}

# Rounding errors of a sum in float32, in units of eps × √(its length) × the root of the mean square of such sums. Measured: of
# 200,000 sums of 96 to 6,144 products of normal numbers, one product after the other, the worst erred by 1.54 of these units.
SUM_EPS = 2.0

# Cases that are judged before the regimes are: those that a run is made for.
FIRST = 24


@dataclass(frozen=True)
class Job:
    """A problem to judge: a case of ``STEPS`` steps, in the regime that the plan picks or in one that is forced."""

    case: Case
    regime: str = ""

    @property
    def name(self) -> str:
        """The case's, after that of the regime."""
        return f"{self.regime} {self.case.name}".strip()


@dataclass(frozen=True)
class Verdict:
    """What the gate found: whether all results are within their bounds, and the one nearest to its bound or farthest beyond.

    failure: why there is no result, where there is none.
    """

    what: str
    passed: bool
    worst: str
    error: float
    bound: float
    failure: str = ""

    @property
    def status(self) -> str:
        """``ok``, or what is wrong."""
        if self.failure:
            return f"failed: {self.failure}"
        return "ok" if self.passed else f"wrong: {self.worst}: error {self.error:.1e}, allowed {self.bound:.1e}"


def failed(job: Job, why: str) -> Verdict:
    """The verdict on a problem without a result."""
    return Verdict(job.name, False, "", 0.0, 0.0, why)


def judge(case: Case, device: torch.device, backend: str | None) -> Verdict:
    """Compare with the float64 reference: error ≤ 2 × that of a yardstick in the same dtype + a floor.

    Results without a graph are judged too: they come from other kernels.
    """
    problem = problems.make(case, device, STEPS)
    truth = _truth(problem)
    yardstick = yardstick_errors(problem, truth)
    side = problems.ours(problem, backend)
    found = [("", side(True)), ("inference ", side(False))]
    worst, ratio, error, bound = "", -1.0, 0.0, 0.0
    for (kind, results), (name, value) in itertools.product(found, truth.items()):
        if kind and name not in results:
            continue
        off = (results[name].double() - value).abs().max().item()
        allowed = TIMES_TORCH * yardstick[name] + floor(problem, value)
        # A NaN is the worst of errors.
        now = off / allowed if off == off else float("inf")
        if now > ratio:
            worst, ratio, error, bound = kind + name, now, off, allowed
    return Verdict(case.name, ratio <= 1.0, worst, error, bound)


def yardstick_errors(problem: problems.Problem, truth: problems.Results) -> dict[str, float]:
    """The errors of who computes a problem in the same dtype, result by result.

    That is plain torch, whose products in float32 are exact unless a user says otherwise. But where cuDNN may round the factors
    of a product to TF32, it is cuDNN: with resets, on the same problem without them.
    """
    if not _rounds_to_tf32(problem):
        found = problems.ours(problem, "reference")(True)
    else:
        if problem.reset is not None:
            problem = problems.make(dataclasses.replace(problem.case, extra="plain"), problem.input.device, STEPS)
            truth = _truth(problem)
        cudnn = problems.torch_nn(problem)
        assert cudnn is not None
        found = cudnn(True)
    return {name: (found[name].double() - value).abs().max().item() for name, value in truth.items()}


def floor(problem: problems.Problem, value: torch.Tensor) -> float:
    """What a result may err even where the yardstick is exact: some units of its largest element, and in float32 of its sums.

    A sum of n products, one after the other, errs by √n units of its own size: see ``SUM_EPS``. The yardstick's library adds in
    another order and may err by much less. In 16 bits the products' results are rounded anyway, which is more.
    """
    eps = torch.finfo(problem.input.dtype).eps
    allowed = FLOOR_EPS * eps * value.abs().max().item()
    if problem.input.dtype != torch.float32 or _rounds_to_tf32(problem):
        return allowed
    case = problem.case
    # Of the gates: I and H. Of what goes back to a step: G·H. Of a weight's gradient: all rows.
    longest = max(2 * case.hidden, case.gates * case.hidden, len(problem.input))
    return allowed + SUM_EPS * eps * longest**0.5 * value.square().mean().sqrt().item()


def _truth(problem: problems.Problem) -> problems.Results:
    return problems.ours(problem.to(torch.float64), "reference")(True)


def _rounds_to_tf32(problem: problems.Problem) -> bool:
    return problem.input.dtype == torch.float32 and problem.input.device.type == "cuda" and allows_tf32()


def allows_tf32() -> bool:
    """Whether torch lets cuDNN round the factors of an RNN's products to TF32."""
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if hasattr(rnn, "fp32_precision"):
        return bool(rnn.fp32_precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


def forbid_tf32() -> None:
    """Let nobody in this process round to TF32."""
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if hasattr(rnn, "fp32_precision"):
        rnn.fp32_precision = "ieee"
    else:
        torch.backends.cudnn.allow_tf32 = False


def answer(job: Job, device: torch.device, backend: str | None, ieee: bool = False) -> Verdict:
    """Judge a problem; what is raised is a verdict too. ieee: without TF32, from now on in this process."""
    if ieee:
        forbid_tf32()
    try:
        with _force(job.regime):
            verdict = judge(job.case, device, backend)
    except Exception as error:
        return failed(job, f"{type(error).__name__}: {error}")
    return dataclasses.replace(verdict, what=job.name)


def job_of(case: Case) -> Job:
    """The problem that a case is judged by; cases that differ in T alone share it, because T is no part of what is compiled."""
    return Job(dataclasses.replace(case, steps=STEPS))


def jobs(cases: Iterable[Case], backend: str | None, quick: bool) -> list[Job]:
    """All problems, without repeating one: the first cases, every regime, the other cases."""
    of_cases = list(dict.fromkeys(job_of(case) for case in cases))
    return [*of_cases[:FIRST], *regime_jobs(backend, quick), *of_cases[FIRST:]]


def regime_jobs(backend: str | None, quick: bool) -> list[Job]:
    """All cells × dtypes × extras in every regime of the Triton backend; another backend has one.

    Plain problems are left to the cases. quick: bfloat16 with resets alone, because each of them compiles kernels of its own.
    """
    dtypes, extras = (("bfloat16",), ("reset",)) if quick else (DTYPES, EXTRAS[1:])
    regimes = REGIMES if backend in (None, "triton") else {"": (41, 7)}
    return [
        Job(Case(cell, hidden, batch, STEPS, dtype, 2, extra), regime)
        for (regime, (hidden, batch)), cell, dtype, extra in itertools.product(regimes.items(), CELLS, dtypes, extras)
    ]


def every_regime(device: torch.device, backend: str | None, quick: bool) -> Iterator[Verdict]:
    """The verdicts on ``regime_jobs``, one after the other in this process."""
    for job in regime_jobs(backend, quick):
        yield answer(job, device, backend)


def _force(regime: str) -> contextlib.AbstractContextManager[None]:
    if not regime:
        return contextlib.nullcontext()
    from fused_rnn.kernels.triton import plan

    return plan.force(regime=regime)
