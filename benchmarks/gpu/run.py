"""The measurement: the gate, then case by case until the time is used up; every row is kept as soon as it is there."""

from __future__ import annotations

import datetime
import functools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

import fused_rnn
from benchmarks.gpu import gate, graphs, judging, peers
from benchmarks.gpu.cases import Case
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.floors import Floors, barrier_microseconds
from benchmarks.gpu.timed import DeviceLost, Row, Timer, base_of, line

FORMAT = 2

# Of the time: by when judging ends, and by when timing does. The rest is for counting launches, which comes last, because a
# profiler may slow down what follows it.
JUDGING, TIMING = 0.5, 0.9
# Of the time, for the first calls of each peer: with --peers, and without.
PEER, QUICK_PEER = 0.2, 0.05


@dataclass
class Options:
    """How to measure.

    Attributes:
        device: where.
        backend: of fused_rnn, or None for the automatic choice.
        seconds: for judging, timing and counting together; no case is begun afterwards.
        rounds: turns of each side.
        quick: judge fewer problems before anything is timed.
        workers: processes that judge, or 0 for this one.
        ieee: whether products in float32 are exact, on both sides, instead of TF32 where torch allows that.
        peers: whether peers are measured that take minutes.
    """

    device: torch.device
    backend: str | None = None
    seconds: float = 480.0
    rounds: int = 5
    quick: bool = False
    workers: int = 0
    ieee: bool = False
    peers: bool = False


def describe(options: Options) -> Row:
    """Where and with what a run is made."""
    on_cuda = options.device.type == "cuda"
    run: Row = {
        "format": FORMAT,
        "kind": "gpu",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(options.device) if on_cuda else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_rnn": fused_rnn.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "workers": options.workers,
        "tf32": gate.allows_tf32(),
        "missing": peers.missing(options.peers),
        "complete": False,
    }
    if on_cuda:
        import triton

        properties = torch.cuda.get_device_properties(options.device)
        run["triton"] = triton.__version__
        run["driver"] = _driver()
        run["processors"] = properties.multi_processor_count
        run["memory"] = properties.total_memory
    return run


def _driver() -> str | None:
    """The driver's version, as its own tool gives it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.strip().splitlines()[0] if told.strip() else None


def measure(
    options: Options, cases: Iterable[Case], tell: Callable[[str], None], keep: Callable[[Row], None] = lambda results: None
) -> Row:
    """Judge all cases, then time those that are right.

    Args:
        tell: called with a line for people after every case.
        keep: called with all results so far after every case.

    Returns:
        the results: ``run``, ``gate`` and ``rows``.
    """
    begin = time.perf_counter()
    if options.ieee:
        gate.forbid_tf32()
    cases = list(cases)
    results: Row = {"run": describe(options), "gate": [], "rows": []}
    verdicts = _judged(options, cases, results, tell)
    results["run"]["judging_seconds"] = time.perf_counter() - begin
    keep(results)
    try:
        left_out = _timed(options, cases, verdicts, results, tell, keep, begin)
        _counted(options, cases, results, begin)
    except DeviceLost as lost:
        left_out = len(cases) - len({row["name"] for row in results["rows"]})
        results["run"]["stopped"] = str(lost)
        tell(f"stopped: {lost}")
    results["run"]["left_out"] = left_out
    results["run"]["seconds"] = time.perf_counter() - begin
    results["run"]["complete"] = left_out == 0
    keep(results)
    return results


def _judged(options: Options, cases: list[Case], results: Row, tell: Callable[[str], None]) -> dict[gate.Job, gate.Verdict]:
    """The verdicts, which are kept; a line for each that is red, and one for all."""
    answer = functools.partial(gate.answer, device=options.device, backend=options.backend, ieee=options.ieee)
    jobs = gate.jobs(cases, options.backend, options.quick)
    verdicts: dict[gate.Job, gate.Verdict] = {}
    for job, verdict in judging.run(answer, jobs, options.workers, JUDGING * options.seconds):
        verdicts[job] = verdict
        results["gate"].append(asdict(verdict) | {"regime": job.regime})
        if not verdict.passed:
            tell(f"{verdict.what}: {verdict.status}")
    right = sum(verdict.passed for verdict in verdicts.values())
    missing = f"; no time for {len(jobs) - len(verdicts)} more" if len(verdicts) < len(jobs) else ""
    tell(f"gate: {right} of {len(verdicts)} right{missing}")
    return verdicts


def _timed(
    options: Options,
    cases: list[Case],
    verdicts: dict[gate.Job, gate.Verdict],
    results: Row,
    tell: Callable[[str], None],
    keep: Callable[[Row], None],
    begin: float,
) -> int:
    """Add the rows. Returns how many cases were left out for want of time."""
    clock = Clock(options.device)
    floors = Floors(clock)
    others = peers.Peers(results["run"]["missing"], (PEER if options.peers else QUICK_PEER) * options.seconds)
    timer = Timer(clock, options.backend, options.rounds, others, floors)
    red = {job.regime: verdict.what for job, verdict in verdicts.items() if job.regime and not verdict.passed}
    left_out = 0
    for case in cases:
        verdict = verdicts.get(gate.job_of(case))
        if verdict is None or time.perf_counter() - begin > TIMING * options.seconds:
            left_out += 1
            continue
        lost = None
        if verdict.passed:
            try:
                rows = timer.rows(case)
            except DeviceLost as error:
                rows, lost = error.args[0], DeviceLost(f"the device answers no more after {case.name}")
        else:
            rows = [base_of(case) | {"status": verdict.status}]
        for row in rows:
            if row.get("regime") in red:
                row["regime_gate"] = f"red: {red[row['regime']]}"
            results["rows"].append(row)
            tell(line(row))
        keep(results)
        if lost:
            raise lost
    if options.device.type == "cuda":
        programs = results["run"]["processors"]
        try:
            results["run"]["barrier_us"] = {str(n): barrier_microseconds(clock, n) for n in (8, 32, 64, programs)}
        except Exception as error:
            results["run"]["barrier_failed"] = graphs.told(error)
    return left_out


def _counted(options: Options, cases: list[Case], results: Row, begin: float) -> None:
    """How many launches a call makes, for as many rows as there is time for."""
    if options.device.type != "cuda":
        return
    by_name = {case.name: case for case in cases}
    clock = Clock(options.device)
    timer = Timer(clock, options.backend, options.rounds, peers.Peers({}, 0.0), Floors(clock))
    for row in results["rows"]:
        if time.perf_counter() - begin > options.seconds:
            return
        if row["status"] == "ok":
            row["ours_launches"] = timer.count(by_name[row["name"]], row["mode"] == "training")
