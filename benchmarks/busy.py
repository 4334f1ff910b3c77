"""``python -m benchmarks busy``: calls beside processes that take the cores away, every provider under the same load in turns.

A time slice of the system is some milliseconds and a call often less, so a median of calls would show those that nobody
disturbed. What is measured is the mean over a slice of many calls, which is what a program waits for.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import paged, timing
from benchmarks import peers as peers_module
from benchmarks.arguments import Parser, names, number, positive_seconds
from benchmarks.beside_loader import LOADER, loader_rows
from benchmarks.cases import CELLS, MODES, Case
from benchmarks.gate import Gate
from benchmarks.peers import OURS, Peer, Provider
from benchmarks.problem import Problem
from benchmarks.results import ResultsError, check_writable, default_path, describe_run
from benchmarks.sets import select
from benchmarks.suite import judge_peer, row_of
from benchmarks.timing import quantiles, timed_call

# Busy processes beside a call. The first is what the others are compared with.
LOADS = (0, 1, 2)

# What a call may take beside busy processes: two of them leave it one of two cores.
GOAL = 3.0

# Seconds of one slice: some fifty time slices of the system.
SLICE = 0.25
ROUNDS, QUICK_ROUNDS = 5, 2

# Until the system has spread new processes over the cores.
_SETTLE = 0.1

_QUICK_SHAPES = ("1x100x128", "16x64x128", "32x100x256")
_BUSY = "while True: pass"

_positive_int = number(int, lambda value: value >= 1, "a whole number of 1 or more")


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that compute without a pause, until the block ends, however it ends."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen([sys.executable, "-S", "-c", _BUSY]))
        if count:
            time.sleep(_SETTLE)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def mean_call(provider: Provider, training: bool, seconds: float) -> float:
    """Mean seconds of a call over a slice of at least so long, after a pause and an untimed call."""
    time.sleep(timing.PAUSE)
    with torch.set_grad_enabled(training), provider.scope():
        provider.step()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            times.append(timed_call(provider))
    return statistics.fmean(times)


def measure_case(
    case: Case, peers: Mapping[str, Peer], threads: int, info: Mapping[str, Any], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """The rows of one case: every load, every provider. Who is wrong or refuses has a reason and no time."""
    case = replace(case, threads=threads)
    problem = Problem(case)
    gate = Gate(problem, case.training)
    ready: dict[str, Provider] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        reason = peer.reason(case)
        if reason:
            found[name] = {"status": "missing", "reason": reason}
            continue
        provider, found[name] = judge_peer(peer, gate, problem, case, threads)
        if provider is not None:
            ready[name] = provider
    times: dict[tuple[int, str], list[float]] = {(load, name): [] for load in LOADS for name in ready}
    gc.collect()
    for i in range(rounds):
        for load in LOADS:
            # Whoever always followed the same neighbour would inherit what it leaves behind.
            order = list(ready)[i % len(ready) :] + list(ready)[: i % len(ready)] if ready else []
            with busy_processes(load):
                for name in order:
                    times[load, name].append(mean_call(ready[name], case.training, seconds))
    key = replace(case, threads=None).key
    rows = []
    for load in LOADS:
        for name in peers:
            row = row_of(case, f"{key}/busy={load}", name, info) | {"busy": load} | found[name]
            if name in ready:
                row |= _figures(times, load, name)
            rows.append(row)
    return rows


def _figures(times: Mapping[tuple[int, str], Sequence[float]], load: int, name: str) -> dict[str, Any]:
    own, quiet, ours = times[load, name], times[LOADS[0], name], times.get((load, OURS))
    figures: dict[str, Any] = {"ms": quantiles([seconds * 1e3 for seconds in own]), "rounds": len(own)}
    figures["over_quiet"] = statistics.median(own) / statistics.median(quiet)
    if ours and name != OURS:
        figures["ratio"] = quantiles([a / b for a, b in zip(own, ours, strict=True)])
    return figures


def markdown(rows: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> str:
    """The rows as a page: a line for each case and load."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [
        "# Beside busy processes",
        "",
        f"`{' '.join(info['command'])}` on {info['cpu']}, {info['cores']} cores, {info['threads']} threads, "
        f"{info['date'][:10]}, commit {info['commit']}. Milliseconds of a call: the mean over a slice of many calls, the "
        "median of the slices; in brackets, as a multiple of the same provider's time without busy processes. The last column: "
        "the others' times over ours, slice by slice, in the order of the columns.",
        "",
        "| case | busy | " + " | ".join(providers) + " | over ours |",
        "|---|" + "---:|" * (len(providers) + 2),
    ]
    cases: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["case"].rpartition("/busy=")[0], row["busy"]), {})[row["provider"]] = row
    for (case, busy), found in cases.items():
        cells = [_cell(found.get(name)) for name in providers]
        over = ", ".join(f"{found[name]['ratio']['median']:.2f}" for name in providers if "ratio" in found.get(name, {}))
        lines.append(f"| {case} | {busy} | {' | '.join(cells)} | {over} |")
    return "\n".join([*lines, "", summary(rows), ""])


def _cell(row: Mapping[str, Any] | None) -> str:
    return f"{row['ms']['median']:.3g} ({row['over_quiet']:.1f} ×)" if row and "ms" in row else "-"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """In how many rows under load we are as fast as everybody else, and within the goal of our own quiet time."""
    loaded = [row for row in rows if row["busy"] and "ms" in row]
    ours = [row for row in loaded if row["provider"] == OURS]
    within = sum(row["over_quiet"] <= GOAL for row in ours)
    others = [row for row in loaded if "ratio" in row]
    faster = sum(row["ratio"]["median"] >= 1 for row in others)
    return (
        f"Under load: at most {GOAL:g} × our quiet time in {within} of {len(ours)} rows; "
        f"no slower than another provider in {faster} of {len(others)}."
    )


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks busy", description="Measure calls beside busy processes, and beside a DataLoader."
    )
    parser.add_argument("--threads", type=_positive_int, default=2, help="threads of every provider (default 2)")
    parser.add_argument("--backend", help="backend of fused_rnn (default: its automatic choice)")
    parser.add_argument("--peers", type=names, default=["torch", "onnxruntime"], help="whom to compare with")
    parser.add_argument("--cells", type=names, help=f"some of {','.join(CELLS)}")
    parser.add_argument("--shapes", type=names, help="some of the table's shapes, or your own: BxTxH or BxTxIxH")
    parser.add_argument("--modes", type=names, help=f"some of {','.join(MODES)}")
    parser.add_argument("--quick", action="store_true", help="three shapes, fewer rounds")
    parser.add_argument("--rounds", type=_positive_int, help=f"slices of each (default {ROUNDS}, with --quick {QUICK_ROUNDS})")
    parser.add_argument("--slice", type=positive_seconds, default=SLICE, help=f"seconds of a slice (default {SLICE})")
    parser.add_argument("--no-loader", action="store_true", help="leave out the training step beside a DataLoader")
    parser.add_argument("--json", type=Path, help="results file (default benchmarks/out/<date>.json); a page goes beside it")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The command. Returns the exit code: 0, 1 if a result was wrong, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    path: Path = options.json or default_path()
    known = peers_module.peers(options.backend)
    for name in options.peers:
        if name not in known or name == OURS:
            parser.error(f"--peers: expected some of {','.join(other for other in known if other != OURS)}, got {name!r}")
    try:
        shapes = options.shapes or (list(_QUICK_SHAPES) if options.quick else None)
        cases = [case for case in select(options.cells, shapes, options.modes) if case.plain]
        check_writable(path)
    except (ValueError, ResultsError) as error:
        parser.error(str(error))
    chosen = {name: known[name] for name in dict.fromkeys((OURS, *options.peers))}
    reason = chosen[OURS].unavailable()
    if reason:
        parser.error(f"nothing to measure: {reason}")
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    info = describe_run(chosen, options.backend, options.threads)
    jobs: list[Callable[[], list[dict[str, Any]]]] = [
        lambda case=case: measure_case(case, chosen, options.threads, info, rounds, options.slice)  # type: ignore[misc]
        for case in cases
    ]
    if not options.no_loader:
        jobs.append(lambda: loader_rows(LOADER, options.threads, info, rounds, options.slice))
    return paged.run(jobs, info, path, parser, lambda row: str(row["case"].rpartition("/")[0]), markdown)
