"""The run: every case through gate, clock, floor and memory, into rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import memory
from benchmarks.cases import Case
from benchmarks.floors import Floors
from benchmarks.gate import Gate, Verdict
from benchmarks.peers import OURS, Peer, Provider
from benchmarks.problem import Problem
from benchmarks.timing import Samples, interleave, quantiles

# The GEMM is sampled after a round as long as that costs less than this share of the case's time.
GEMM_SHARE = 0.15

# The measurement of the peaks ends after this share of the run.
PEAKS_SHARE = 0.1

# A ratio whose p80 is this many times its p20 says little: the row is marked.
NOISY_SPREAD = 1.3


@dataclass
class Plan:
    """How much is measured.

    Attributes:
        seconds: time for all cases together; each gets its share by ``Case.weight``.
        min_rounds: rounds that a case gets even beyond its share, as long as there is any of it left after the checks.
        max_rounds: rounds after which more would teach nothing.
        measure_memory: bytes held, the peak of each case and the growth of inference memory.
    """

    seconds: float = 300.0
    min_rounds: int = 3
    max_rounds: int = 30
    measure_memory: bool = True


@dataclass
class Listener:
    """What the run tells whoever shows it."""

    case_begins: Callable[[Case, str], None] = lambda case, what: None
    progress: Callable[[float], None] = lambda done: None
    rows: Callable[[Case, list[dict[str, Any]]], None] = lambda case, rows: None


@dataclass
class _Part:
    """Turns the progress within one case into that of the run."""

    listener: Listener
    done: float
    share: float

    def __call__(self, part: float) -> None:
        self.listener.progress(self.done + part * self.share)


@dataclass
class Suite:
    """One run.

    Attributes:
        peers: by name, ours first.
        results: grows with every finished case; ``run``, ``rows``, ``growth``.
    """

    peers: Mapping[str, Peer]
    threads: int
    run_info: dict[str, Any]
    plan: Plan = field(default_factory=Plan)
    listener: Listener = field(default_factory=Listener)
    floors: Floors = field(default_factory=Floors)
    backend: str | None = None

    def __post_init__(self) -> None:
        self.results: dict[str, Any] = {"run": self.run_info, "rows": [], "growth": []}
        self._peaks: memory.Peaks = {}
        # What peers took to compile; on top of the plan's time.
        self._compiling = 0.0

    def run(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Measure all cases; Ctrl-C ends the run, and what was measured is in the results.

        Returns:
            ``results``; ``results["run"]["complete"]`` says whether it was all.
        """
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        cases = self._distinct(cases)
        # What the growth of memory takes is known only afterwards; the cases share what is left.
        left = sum(case.weight for case in cases)
        total = left
        problem: Problem | None = None
        try:
            if self.plan.measure_memory:
                self._growth(cases)
                self._measure_peaks(cases)
            for case in cases:
                remaining = self.plan.seconds + self._compiling - (time.perf_counter() - begin)
                share = max(0.0, remaining) * case.weight / left
                done = 1 - left / total
                self.listener.progress(done)
                if problem is None or problem.case.data != case.data:
                    problem = None  # frees the old one before the new one is made
                    problem = Problem(case)
                interrupted = self._case(case, problem, share, _Part(self.listener, done, case.weight / total))
                left -= case.weight
                if interrupted:
                    raise KeyboardInterrupt
            self.listener.progress(1.0)
            self.results["run"]["complete"] = True
        except KeyboardInterrupt:
            self.results["run"]["complete"] = False
        finally:
            torch.set_num_threads(self.threads)
            self.results["run"] |= self.floors.summary(self.threads)
            self.results["run"]["seconds"] = round(time.perf_counter() - begin, 1)
        return self.results

    def _distinct(self, cases: Sequence[Case]) -> list[Case]:
        """The cases, each once: one with as many threads as the run has is the case without a number of its own."""
        found: dict[str, Case] = {}
        for case in cases:
            case = replace(case, threads=None) if case.threads == self.threads else case
            found.setdefault(case.key, case)
        return list(found.values())

    def _case(self, case: Case, problem: Problem, seconds: float, progress: Callable[[float], None]) -> bool:
        """Measure one case and append its rows. Returns whether Ctrl-C ended it."""
        begin, compiling = time.perf_counter(), self._compiling
        threads = case.threads or self.threads
        torch.set_num_threads(threads)
        key, case = case.key, replace(case, threads=threads)
        rows = {name: row_of(case, key, name, self.run_info) for name in self.peers}
        self.listener.case_begins(case, "checking")
        gate = Gate(problem, case.training)
        providers = {}
        for name, peer in self.peers.items():
            reason = peer.reason(case)
            if reason:
                rows[name] |= {"status": "missing", "reason": reason}
                continue
            setup_begin = time.perf_counter()
            provider, found = judge_peer(peer, gate, problem, case, threads)
            rows[name] |= found
            if peer.compiles and "gate" in found:
                rows[name]["setup_s"] = time.perf_counter() - setup_begin
                self._compiling += rows[name]["setup_s"]
            if provider is None:
                continue
            providers[name] = provider
            rows[name] |= self._peaks.get((key, name), {})
            if case.training and self.plan.measure_memory and provider.forward:
                rows[name] |= _held(provider)

        self.listener.case_begins(case, "timing")
        gemm = self.floors.gemm(threads, case.dtype)
        self.floors.sample_others(threads, case.dtype)
        first_sample = len(gemm.rates)
        seconds = max(0.0, seconds + self._compiling - compiling - (time.perf_counter() - begin))
        timing_begin, gemm_before = time.perf_counter(), gemm.seconds

        def between(used: float) -> None:
            progress(used)
            spent = gemm.seconds - gemm_before
            if spent <= GEMM_SHARE * (time.perf_counter() - timing_begin):
                gemm.sample()

        # Where the machine is so busy that the checks alone use up the time, one round has to do; its rows are marked.
        min_rounds = self.plan.min_rounds if seconds > 0 else 1
        samples = interleave(providers, case.training, seconds, min_rounds, self.plan.max_rounds, between)
        if not gemm.rates:
            gemm.sample()
        floors = self.floors.of(case, threads, len(gemm.rates) - first_sample)
        for name in providers:
            rows[name] |= _figures(name, samples, floors)
        # A case that was stopped before its first round has nothing to say.
        if samples.num_rounds or not providers:
            done = list(rows.values())
            self.results["rows"] += done
            self.listener.rows(case, done)
        return samples.interrupted

    def _growth(self, cases: Sequence[Case]) -> None:
        cells = list(dict.fromkeys(case.cell for case in cases if case.mode == "inference"))
        if cells:
            self.listener.case_begins(next(c for c in cases if c.mode == "inference"), "memory growth")
            names = self._for_memory()
            self.results["growth"] = memory.growth(names, cells, self.backend, self.threads)

    def _measure_peaks(self, cases: Sequence[Case]) -> None:
        self.listener.case_begins(cases[0], "memory peaks")
        seconds = PEAKS_SHARE * self.plan.seconds
        self._peaks = memory.peaks(self._for_memory(), cases, self.backend, self.threads, seconds)

    def _for_memory(self) -> list[str]:
        """Peers that are worth a second preparation: compiling again would take longer than all the rest."""
        return [name for name, peer in self.peers.items() if not peer.unavailable() and not peer.compiles]


def judge_peer(peer: Peer, gate: Gate, problem: Problem, case: Case, threads: int) -> tuple[Provider | None, dict[str, Any]]:
    """Make a peer ready for a case and judge its results.

    Returns:
        the provider, or None where its results are wrong, and what its row says of it.
    """
    try:
        provider = peer.prepare(problem, case, threads)
        verdict = _judge(peer.gate(problem) if peer.gate else gate, problem, provider, case)
    except Exception as error:  # whatever a peer raises is its row, not the end of the run
        return None, {"status": "wrong", "reason": f"raised {type(error).__name__}: {_first_line(error)}"}
    found: dict[str, Any] = {
        "gate": {
            "worst": verdict.worst,
            # JSON has no infinity.
            "error": min(verdict.error, 1e300),
            "bound": verdict.bound,
            "torch": verdict.torch_error,
        }
    }
    if not verdict.passed:
        return None, found | {"status": "wrong", "reason": f"wrong results, not timed: {verdict}"}
    return provider, found | provider.figures | ({"note": provider.note} if provider.note else {})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def row_of(case: Case, key: str, provider: str, run_info: Mapping[str, Any]) -> dict[str, Any]:
    B, T, I, H = case.shape.sizes  # noqa: E741
    return {
        "case": key,
        "mode": case.mode,
        "cell": case.cell,
        "shape": {"name": case.shape.name, "B": B, "T": T, "I": I, "H": H, "origin": case.shape.origin},
        "dtype": case.dtype,
        "options": list(replace(case, threads=None).options),
        "threads": case.threads,
        "device": run_info.get("device", "cpu"),
        "provider": provider,
        "status": "ok",
    }


def _judge(gate: Gate, problem: Problem, provider: Provider, case: Case) -> Verdict:
    with torch.set_grad_enabled(case.training), provider.scope(), problem.seeded():
        return gate.judge(problem.named(provider.tensors(provider.step())))


def _held(provider: Provider) -> dict[str, Any]:
    reason = memory.unavailable()
    return {"held_bytes": None, "held_reason": reason} if reason else {"held_bytes": memory.held(provider)}


def _figures(name: str, samples: Samples, floors: dict[str, float]) -> dict[str, Any]:
    rounds = samples.rounds[name][: samples.num_rounds]
    if not rounds:
        return {"status": "missing", "reason": "stopped before the first round"}
    ms = quantiles([seconds * 1e3 for seconds in rounds])
    figures: dict[str, Any] = {
        "ms": ms,
        "rounds": len(rounds),
        "calls": samples.calls[name],
        "floor_ms": floors["gemm"],
        "x_floor": ms["median"] / floors["gemm"],
        "floors": floors,
        "reaches": {name: floor / ms["median"] for name, floor in floors.items()},
    }
    ours = samples.rounds.get(OURS)
    if ours and name != OURS:
        # Round by round, so that a drift of the machine that both felt cancels.
        spread = quantiles([mine / our for mine, our in zip(rounds, ours, strict=False)])
        figures["ratio"] = {"p20": spread["p20"], "p80": spread["p80"]}
        figures["noisy"] = len(rounds) < 3 or spread["p80"] > NOISY_SPREAD * spread["p20"]
    return figures
