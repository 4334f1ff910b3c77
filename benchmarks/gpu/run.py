"""The measurement: the gate, then case by case until the time is used up; every row is kept as soon as it is there."""

from __future__ import annotations

import datetime
import functools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import fused_rnn
from benchmarks.gpu import gate, problem
from benchmarks.gpu.cases import Case
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.floors import Floors, barrier_microseconds
from benchmarks.gpu.torchrl import torchrl
from benchmarks.timing import quantiles

FORMAT = 1
Row = dict[str, Any]

# A case whose tensors would fill more of the free memory than this is left out: both sides hold theirs at once.
MEMORY_SHARE = 0.25


@dataclass
class Options:
    """How to measure.

    Attributes:
        device: where.
        backend: of fused_rnn, or None for the automatic choice.
        seconds: no case is begun after so many.
        rounds: turns of each side.
        quick: judge fewer problems before anything is timed.
    """

    device: torch.device
    backend: str | None = None
    seconds: float = 480.0
    rounds: int = 5
    quick: bool = False


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
        "torchrl": problem.torchrl_missing() or "measured with resets",
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
    """Run the gate and time the cases.

    Args:
        tell: called with a line for people after every case.
        keep: called with all results so far after every case.

    Returns:
        the results: ``run``, ``gate`` and ``rows``. Nothing is timed if the gate is red.
    """
    begin = time.perf_counter()
    clock = Clock(options.device)
    results: Row = {"run": describe(options), "gate": [], "rows": []}
    for verdict in gate.every_regime(options.device, options.backend, options.quick):
        results["gate"].append(asdict(verdict))
        if not verdict.passed:
            tell(f"WRONG {verdict.what}: {verdict.worst}: error {verdict.error:.1e}, allowed {verdict.bound:.1e}")
    tell(f"gate: {sum(v['passed'] for v in results['gate'])} of {len(results['gate'])} right")
    keep(results)
    if not all(verdict["passed"] for verdict in results["gate"]):
        return results
    floors = Floors(clock)
    if options.device.type == "cuda":
        programs = results["run"]["processors"]
        results["run"]["barrier_us"] = {str(n): barrier_microseconds(clock, n) for n in (8, 32, 64, programs)}
    left_out = 0
    judged: dict[Case, gate.Verdict] = {}
    for case in cases:
        if time.perf_counter() - begin > options.seconds:
            left_out += 1
            continue
        for row in _case(case, options, clock, floors, judged):
            results["rows"].append(row)
            tell(line(row))
        keep(results)
    results["run"]["left_out"] = left_out
    results["run"]["seconds"] = time.perf_counter() - begin
    results["run"]["complete"] = left_out == 0
    keep(results)
    return results


def _case(case: Case, options: Options, clock: Clock, floors: Floors, judged: dict[Case, gate.Verdict]) -> list[Row]:
    """The rows of one case: forward, and forward and backward. judged: verdicts, by the case without its T."""
    base: Row = {**asdict(case), "name": case.name}
    if options.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(options.device)
        if case.training_bytes > MEMORY_SHARE * free:
            return [{**base, "mode": "training", "status": "left out: too large for the memory"}]
    try:
        # T is no part of what is compiled, and the gate takes a few steps of any.
        key = replace(case, steps=0)
        if key not in judged:
            judged[key] = gate.judge(case, options.device, options.backend)
        verdict = judged[key]
        if not verdict.passed:
            what = f"{verdict.worst}: error {verdict.error:.1e}, allowed {verdict.bound:.1e}"
            return [{**base, "mode": "training", "status": f"wrong: {what}"}]
        given = problem.make(case, options.device)
        sides = {"ours": problem.ours(given, options.backend)}
        peer = problem.torch_nn(given)
        if peer is not None:
            sides["torch_nn"] = peer
        note = None
        if case.extra == "reset" and case.directions == 1 and problem.torchrl_missing() is None:
            sides["torchrl"], note = _tried(given)
            if note:
                del sides["torchrl"]
        rows = []
        for mode in ("forward", "training"):
            training = mode == "training"
            calls = {name: functools.partial(side, training) for name, side in sides.items()}
            row = {**base, "mode": mode, "status": "ok", "regime": _regime(case, training, options)}
            row |= _timed(case, calls, clock, options.rounds)
            row |= floors.milliseconds(case, training)
            if note:
                row["torchrl"] = note
            rows.append(row)
        return rows
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return [{**base, "mode": "training", "status": "left out: out of memory"}]
    except Exception as error:  # One case that fails is a row; the others are still measured.
        return [{**base, "mode": "training", "status": f"failed: {type(error).__name__}: {error}"}]


def _tried(given: problem.Problem) -> tuple[Any, str | None]:
    """TorchRL's run of a problem, and why it does not work, or None."""
    try:
        side = torchrl(given)
        side(True)
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {error}"
    return side, None


def _timed(case: Case, calls: dict[str, Callable[[], Any]], clock: Clock, rounds: int) -> Row:
    found = clock.interleave(calls, rounds)
    row: Row = {}
    for name, values in found.items():
        row[f"{name}_ms"] = quantiles(values)
        row[f"{name}_peak_bytes"] = clock.peak(calls[name])
    ours = row["ours_ms"]["median"]
    row["ours_us_per_step"] = 1e3 * ours / case.steps
    for name in found:
        if name != "ours":
            row[f"ratio_{name}"] = row[f"{name}_ms"]["median"] / ours
    return row


def _regime(case: Case, backward: bool, options: Options) -> str | None:
    """Which regime the plan picks, on CUDA."""
    if options.device.type != "cuda" or options.backend not in (None, "triton"):
        return None
    from fused_rnn.cells import CELLS
    from fused_rnn.kernels.triton import heuristic, launch, plan

    dtype = getattr(torch, case.dtype)
    call = plan.Call(CELLS[case.cell], backward, case.hidden, case.batch, case.directions, dtype)
    return heuristic.choose(call, launch.device_of(options.device)).regime


def line(row: Row) -> str:
    """One row, for people."""
    head = f"{row['name']:<44} {row['mode']:<9}"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    text = f"{head} {row['regime'] or '':<12} {row['ours_ms']['median']:9.3f} ms {row['ours_us_per_step']:7.2f} µs/step"
    for name in ("torch_nn", "torchrl"):
        if f"ratio_{name}" in row:
            text += f"   {name} {row[f'{name}_ms']['median']:9.3f} ms ({row[f'ratio_{name}']:.2f}×)"
    return text
