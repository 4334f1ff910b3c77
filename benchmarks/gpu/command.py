"""``python -m benchmarks gpu``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from benchmarks.arguments import Parser, number, positive_seconds
from benchmarks.results import ResultsError, check_writable, cores, default_path, save

if TYPE_CHECKING:
    from benchmarks.gpu.run import Options

# For everything but the start of Python and the case in hand when the time is up.
SECONDS, QUICK_SECONDS = 480.0, 90.0
# Each takes a CUDA context's part of the device's memory.
MOST_WORKERS = 12
_WIDTH = 150


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks gpu",
        description="Check the Triton kernels on this GPU, then time them against torch.nn (cuDNN). Exit code: 0, 1 if a "
        "result was wrong or a case failed, 2 where nothing can be measured.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, below two minutes")
    parser.add_argument(
        "--seconds", type=positive_seconds, help=f"time (default {SECONDS:.0f}, with --quick {QUICK_SECONDS:.0f})"
    )
    parser.add_argument(
        "--workers",
        type=number(int, lambda value: value >= 0, "a whole number"),
        default=min(cores(), MOST_WORKERS),
        help="processes that check results and compile, 0 for none but this (default %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, choices=range(1, 101), metavar="N", help="turns of each side (default 5, with --quick 3)"
    )
    parser.add_argument("--ieee", action="store_true", help="exact products in float32 on both sides, instead of TF32")
    parser.add_argument("--peers", action="store_true", help="also time those peers that compile for minutes")
    parser.add_argument("--json", type=Path, help="results file (default benchmarks/out/<date>.json)")
    parser.add_argument("--tune", action="store_true", help="write the table of tile sizes instead of measuring the layers")
    parser.add_argument("--table", type=Path, help="the table that --tune writes (default: that of the package)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The command. Returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    from fused_rnn.kernels import triton as backend

    reason = backend.unavailable()
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    if reason is not None:
        parser.exit(2, f"{parser.prog}: nothing to measure: {reason}\n")
    console = Console(width=_WIDTH)
    device = torch.device("cuda", torch.cuda.current_device())
    if options.tune:
        from benchmarks.gpu.tune import tune
        from fused_rnn.kernels.triton import tuned

        path = options.table or tuned.table_path()
        rows = tune(device, seconds, path, lambda text: console.print(text, highlight=False))
        console.print(f"{rows} rows in {path}", soft_wrap=True)
        return 0
    path = options.json or default_path()
    try:
        check_writable(path)
    except ResultsError as error:
        parser.error(str(error))
    from benchmarks.gpu.run import Options

    made = Options(
        device,
        seconds=seconds,
        rounds=3 if options.quick else 5,
        quick=options.quick,
        workers=options.workers,
        ieee=options.ieee,
        peers=options.peers,
    )
    return measure(made, path, console)


def measure(options: Options, path: Path, console: Console) -> int:
    """Measure, keep the rows, print the table."""
    from benchmarks.gpu import cases, report, run

    def tell(text: str) -> None:
        # One line is one line, also where it is wider than the table.
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    chosen = cases.select(options.quick)
    if options.peers:
        first = len(cases.goals())
        chosen = list(dict.fromkeys([*chosen[:first], *cases.unrolled(), *chosen[first:]]))
    results = run.measure(options, chosen, tell, lambda rows: save(rows, path))
    report.show(results, console)
    console.print(f"{len(results['rows'])} rows in {path}", soft_wrap=True)
    return exit_code(results)


def exit_code(results: dict[str, Any]) -> int:
    """1 if anything was wrong or failed."""
    wrong = [row for row in results["rows"] if row["status"].startswith(("wrong", "failed"))]
    return 1 if wrong or not all(verdict["passed"] for verdict in results["gate"]) else 0
