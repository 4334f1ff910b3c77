"""The run: every case in both processes, in slices that take turns, into rows as ``benchmarks.suite`` writes them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers import OURS
from benchmarks.suite import NOISY_SPREAD, row_of
from benchmarks.timing import quantiles
from benchmarks.versions.processes import Process, WorkerError

# Seconds of a slice. Short, so that both slices of a pair see the machine in the same state.
SLICE = 0.004

# With fewer rounds than the first number, even if one version won all of them it could be chance (see ``median_range``); more
# than the second would teach nothing.
MIN_ROUNDS, MAX_ROUNDS = 7, 40

# A long case ends after as few as these when it took so many times its share, and never before so many seconds.
FEW_ROUNDS, OVERTIME, SHORT = 3, 2.0, 2.0

# How often a median may lie outside the range that is given for it.
DOUBT = 0.02

# A machine so busy that the run takes this many times its time will not give figures either: the run ends.
PATIENCE = 1.5

BEFORE, TORCH, TORCH_BEFORE = "before", "torch", "torch-before"

# (process, what it calls its peer) -> provider of the row.
PROVIDERS = {
    ("after", OURS): OURS,
    ("before", OURS): BEFORE,
    ("after", TORCH): TORCH,
    ("before", TORCH): TORCH_BEFORE,
}

Rounds = dict[str, list[float]]


@dataclass
class Versions:
    """One run.

    Attributes:
        folders: "before" and "after" -> the folder that holds the package.
        threads: of cases without a number of their own.
        run_info: what the results say of the run.
        seconds: time for all cases together, each by its weight.
        fresh_after: cases after which new processes take over. How a process lies in memory makes it some per cent faster or
            slower for as long as it lives; of several, that averages out.
    """

    folders: Mapping[str, Path]
    threads: int
    run_info: dict[str, Any]
    seconds: float
    fresh_after: int = 50
    backend: str | None = None
    listener: Callable[[float, Case, Sequence[Mapping[str, Any]]], None] = lambda done, case, rows: None
    processes: dict[str, Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.results: dict[str, Any] = {"run": self.run_info, "rows": [], "growth": []}

    def __enter__(self) -> Versions:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        self._stop()
        for name, folder in self.folders.items():
            self.processes[name] = Process(name, folder)

    def _stop(self) -> None:
        for process in self.processes.values():
            process.close()
        self.processes = {}

    def run(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Measure all cases. Ctrl-C ends the run, and so does ``PATIENCE``; what was measured is in the results."""
        begin = time.perf_counter()
        # Two threads on cores that others use wait for each other most of the time. What is left out for that comes last.
        cases = sorted(cases, key=lambda case: case.threads or self.threads)
        left = total = sum(case.weight for case in cases)
        try:
            self.results["run"]["complete"] = False
            for i, case in enumerate(cases):
                if time.perf_counter() - begin > PATIENCE * self.seconds:
                    self.results["run"]["left_out"] = len(cases) - i
                    return self.results
                if (i and i % self.fresh_after == 0) or not all(process.alive for process in self.processes.values()):
                    self._start()
                share = max(0.0, self.seconds - (time.perf_counter() - begin)) * case.weight / left
                rows = self._case(case, share)
                left -= case.weight
                self.results["rows"] += rows
                self.listener(1 - left / total, case, rows)
            self.results["run"]["complete"] = True
        except KeyboardInterrupt:
            pass
        finally:
            self.results["run"]["seconds"] = round(time.perf_counter() - begin, 1)
        return self.results

    def _case(self, case: Case, seconds: float) -> list[dict[str, Any]]:
        begin = time.perf_counter()
        threads = case.threads or self.threads
        key, case = case.key, replace(case, threads=threads)
        # torch.nn has no resets: one call a step, masked, is another job.
        names = [OURS] if case.resets else [OURS, TORCH]
        rows = {
            PROVIDERS[of, name]: row_of(case, key, PROVIDERS[of, name], self.run_info) for of in self.folders for name in names
        }
        ready = self._prepare(case, threads, names, rows)
        if ready is None:
            return _ordered(rows)
        rounds, calls = self._rounds(ready, seconds - (time.perf_counter() - begin), rows)
        for provider, times in rounds.items():
            if rows[provider]["status"] == "ok":
                rows[provider] |= figures(provider, rounds) | {"calls": calls[provider]} if times else _unmeasured()
        return _ordered(rows)

    def _prepare(
        self, case: Case, threads: int, names: Sequence[str], rows: Mapping[str, dict[str, Any]]
    ) -> dict[str, list[str]] | None:
        """Process -> who can be timed there, or None where a process failed."""
        request = {"case": dataclasses.asdict(case), "threads": threads, "names": names, "backend": self.backend}
        ready: dict[str, list[str]] = {}
        failed = False
        # Nothing is timed here, so both may work at once.
        for process in self.processes.values():
            try:
                process.send("prepare", **request)
            except WorkerError:
                continue
        for of, process in self.processes.items():
            try:
                answer = process.receive()
            except WorkerError as error:
                failed = True
                for name in names:
                    rows[PROVIDERS[of, name]] |= {"status": "wrong", "reason": str(error)}
                continue
            for name in names:
                rows[PROVIDERS[of, name]] |= answer[name]
            ready[of] = [name for name in names if rows[PROVIDERS[of, name]]["status"] == "ok"]
        if failed:
            for row in rows.values():
                if row["status"] == "ok":
                    row |= {"status": "missing", "reason": "the other version's process failed"}
        return None if failed else ready

    def _rounds(
        self, ready: Mapping[str, list[str]], seconds: float, rows: Mapping[str, dict[str, Any]]
    ) -> tuple[Rounds, dict[str, int]]:
        rounds: Rounds = {PROVIDERS[of, name]: [] for of in ready for name in ready[of]}
        calls = dict.fromkeys(rounds, 0)
        begin = time.perf_counter()
        for i in range(MAX_ROUNDS):
            row: dict[str, float] = {}
            # A B, B A, A B: each follows itself and the other equally often, and a steady drift cancels over two rounds.
            order = list(ready) if i % 2 == 0 else list(ready)[::-1]
            for of in order:
                try:
                    answer = self.processes[of].ask("slice", names=ready[of] if i % 4 < 2 else ready[of][::-1], length=SLICE)
                except WorkerError as error:
                    for name in ready[of]:
                        rows[PROVIDERS[of, name]] |= {"status": "wrong", "reason": str(error)}
                    return rounds, calls
                for name, (value, count) in answer.items():
                    row[PROVIDERS[of, name]] = value
                    calls[PROVIDERS[of, name]] += count
            for provider, value in row.items():
                rounds[provider].append(value)
            used = time.perf_counter() - begin
            # Behind time, a case still gets the rounds that a verdict takes, unless it is one of seconds.
            enough = i + 1 >= MIN_ROUNDS or (i + 1 >= FEW_ROUNDS and used > max(OVERTIME * seconds, SHORT))
            if enough and used + used / (i + 1) > seconds:
                break
        return rounds, calls


def _ordered(rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[provider] for provider in (OURS, BEFORE, TORCH, TORCH_BEFORE) if provider in rows]


def _unmeasured() -> dict[str, Any]:
    return {"status": "missing", "reason": "stopped before the first round"}


def figures(provider: str, rounds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A row's figures: milliseconds, and for all but ours the time over ours, slice by slice of the same round."""
    own, ours = rounds[provider], rounds.get(OURS, ())
    found: dict[str, Any] = {"ms": quantiles([seconds * 1e3 for seconds in own]), "rounds": len(own)}
    if provider != OURS and ours:
        spread = found["ratio"] = ratio(own, ours)
        found["noisy"] = len(own) < 3 or spread["p80"] > NOISY_SPREAD * spread["p20"]
    if provider == TORCH_BEFORE and rounds.get(TORCH):
        # The same library twice: what this differs from 1 by is the error of the measurement.
        found["twin"] = ratio(own, rounds[TORCH])
    if provider == TORCH_BEFORE and rounds.get(BEFORE):
        found["over_before"] = ratio(own, rounds[BEFORE])
    return found


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """The median of the paired ratios, their p20 and p80, and between what the median lies."""
    ratios = paired(over, under)
    low, high = median_range(ratios)
    return quantiles(ratios) | {"low": low, "high": high}


def median_range(values: Sequence[float]) -> tuple[float, float]:
    """Between what the median of the population lies, from its sample, whatever the distribution.

    Each value is above the median with probability 1/2, so the number of those above is binomial: the k-th smallest and the
    k-th largest enclose the median but for twice the chance that fewer than k lie on one side, which ``DOUBT`` bounds. All of a
    small sample does not enclose it so surely.
    """
    ordered, n = sorted(values), len(values)
    k, below = 0, 1 / 2**n
    while 2 * below <= DOUBT:
        k += 1
        below += math.comb(n, k) / 2**n
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def paired(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The ratio of each pair of slices: a drift of the machine that both felt cancels."""
    return [a / b for a, b in zip(over, under, strict=True)]
