"""``python -m benchmarks``: measure, or make the README's table and picture from what was measured."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import compare as comparison
from benchmarks import peers as peers_module
from benchmarks.arguments import Parser, names, number, positive_seconds
from benchmarks.cases import CELLS, ITEM_BYTES, MODES, Case
from benchmarks.compare import THRESHOLD
from benchmarks.peers import DEFAULT, OURS, fused
from benchmarks.report import LOAD, print_cases, print_results, rows_line
from benchmarks.results import ResultsError, check_writable, default_path, describe_run, lines, load, merge, save
from benchmarks.sets import ALL, SETS, select
from benchmarks.suite import Listener, Plan, Suite

# For everything but the start of Python and what peers compile: a whole run of the goals stays below 6 minutes, a quick one
# below 60 s. Other cases get time by the same measure.
SECONDS, QUICK_SECONDS = 330.0, 45.0

# Where there is no terminal, lines are wide enough for the tables.
_WIDTH = 150
_ROOT = Path(__file__).resolve().parent.parent


_positive_int = number(int, lambda value: value >= 1, "a whole number of 1 or more")
_factor = number(float, lambda value: value >= 1, "a number of 1 or more")


def _measure_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks",
        description=f"Measure fused_rnn against torch.nn and others. Other commands: {', '.join(COMMANDS)}.",
    )
    parser.add_argument("--threads", type=_positive_int, default=2, help="threads of every provider (default 2)")
    parser.add_argument("--backend", help="backend of fused_rnn (default: its automatic choice)")
    parser.add_argument(
        "--peers",
        type=names,
        default=list(DEFAULT),
        help=f"whom to compare with, of {','.join(list(peers_module.peers())[1:])}; {ALL} for everybody",
    )
    parser.add_argument("--sets", type=names, default=["goals"], help=f"which cases, of {','.join(SETS)}; {ALL} for all")
    parser.add_argument("--cells", type=names, help=f"some of {','.join(CELLS)}")
    parser.add_argument("--shapes", type=names, help="some of the sets' shapes, or your own: BxTxH or BxTxIxH")
    parser.add_argument("--modes", type=names, help=f"some of {','.join(MODES)}")
    parser.add_argument("--dtypes", type=names, help=f"some of {','.join(ITEM_BYTES)}")
    parser.add_argument("--list", action="store_true", help="list the cases and the peers, measure nothing")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds, below a minute")
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        help=f"time for all cases (default for the goals {SECONDS:.0f}, with --quick {QUICK_SECONDS:.0f})",
    )
    parser.add_argument("--no-memory", action="store_true", help="skip bytes held and memory growth")
    parser.add_argument("--json", type=Path, help="results file (default benchmarks/out/<date>.json)")
    return parser


def measure(arguments: Sequence[str]) -> int:
    """The measuring command. Returns the exit code: 0, 1 if a gate was red, 130 after Ctrl-C."""
    parser = _measure_parser()
    options = parser.parse_args(arguments)
    path: Path = options.json or default_path()
    known = peers_module.peers(options.backend)
    if ALL in options.peers:
        options.peers = [name for name in known if name != OURS]
    for name in options.peers:
        if name not in known or name == OURS:
            parser.error(f"--peers: expected some of {','.join(other for other in known if other != OURS)}, got {name!r}")
    try:
        filters = (options.cells, options.shapes, options.modes, options.quick)
        cases = select(*filters, sets=options.sets, dtypes=options.dtypes)
        if options.list:
            print_cases(cases, known, _console())
            return 0
        check_writable(path)
    except (ValueError, ResultsError) as error:
        parser.error(str(error))
    _check_backend(parser, options.backend)
    chosen = {name: known[name] for name in dict.fromkeys((OURS, *options.peers))}
    reason = chosen[OURS].unavailable()
    if reason:
        parser.error(f"nothing to measure: {reason}")

    seconds = options.seconds or _default_seconds(cases, options.quick)
    plan = Plan(seconds, min_rounds=2 if options.quick else 3, measure_memory=not options.no_memory)
    console = _console()
    suite = Suite(
        chosen, options.threads, describe_run(chosen, options.backend, options.threads), plan, backend=options.backend
    )
    if options.threads > (os.cpu_count() or 1):
        console.print(f"[yellow]{options.threads} threads on {os.cpu_count()} cores: they will wait for each other.[/yellow]")
    load = suite.run_info["load"]
    if load > LOAD:
        console.print(f"[yellow]Other programs use this machine (load {load:.1f}): expect wide spreads.[/yellow]")
    try:
        results = _run_with_progress(suite, cases, path, console)
        save(results, path)
    except ResultsError as error:
        # The disk is full, say. The file of the case before is whole.
        parser.error(str(error))
    if results["rows"]:
        print_results(results, console)
    console.print(f"{len(results['rows'])} rows in {path}", soft_wrap=True)
    if not results["run"]["complete"]:
        return 130
    return 1 if any(row["status"] == "wrong" for row in results["rows"]) else 0


def _default_seconds(cases: Sequence[Case], quick: bool) -> float:
    """As much time per weight as the goals get; a quick run stays as quick whatever is measured."""
    share = sum(case.weight for case in cases) / sum(case.weight for case in select(quick=quick))
    return QUICK_SECONDS * min(1.0, max(0.1, share)) if quick else SECONDS * max(0.1, share)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def _check_backend(parser: argparse.ArgumentParser, backend: str | None) -> None:
    """A backend that was asked for and cannot run ends the command before anything is measured."""
    name = backend or os.environ.get("FUSED_RNN_BACKEND")
    if not name:
        return
    source = "--backend" if backend else "FUSED_RNN_BACKEND"
    try:
        with fused.package().backend(name):
            pass
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        parser.error(f"{source}: {error}")


def _run_with_progress(suite: Suite, cases: Sequence[Case], path: Path, console: Console) -> dict[str, Any]:
    columns = (
        TextColumn("{task.description:<42}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=60) as progress:
        task = progress.add_task("", total=1.0)

        def begins(case: Case, what: str) -> None:
            description = what if what.startswith("memory") else f"{case.mode} {case.class_name} {case.shape.name}: {what}"
            progress.update(task, description=description)

        def rows(case: Case, case_rows: list[dict[str, Any]]) -> None:
            # Written after every case: even a kill leaves what was measured.
            save(suite.results, path)
            progress.console.print(rows_line(case_rows))

        suite.listener = Listener(begins, lambda done: progress.update(task, completed=done), rows)
        return suite.run(cases)


def readme(arguments: Sequence[str]) -> int:
    """The command that writes the README's tables, the results' page and the pictures of both."""
    parser = Parser(
        prog="python -m benchmarks readme",
        description="Write the README's tables, the page of the results and the pictures of both from results files.",
    )
    parser.add_argument("results", type=Path, nargs="+", help="files that python -m benchmarks wrote on one machine")
    parser.add_argument("--readme", type=Path, default=_ROOT / "README.md", help="file with the markers (default README.md)")
    parser.add_argument(
        "--pictures", type=Path, default=_ROOT / "benchmarks" / "results", help="folder of the page and the pictures"
    )
    parser.add_argument("--training", type=Path, help="folder of the training jobs' files (default training, beside the page)")
    options = parser.parse_args(arguments)
    # Imported here: measuring needs no matplotlib.
    from benchmarks import readme_files

    try:
        files = {path: load(path) for path in options.results}
        training = options.training or options.pictures / "training"
        written = readme_files.write(files, options.readme, options.pictures, training)
    except ResultsError as error:
        parser.error(str(error))
    for path in written:
        print(path)
    return 0


def show(arguments: Sequence[str]) -> int:
    """The command that prints a results file's tables again."""
    parser = Parser(prog="python -m benchmarks show", description="Print the tables of a results file.")
    parser.add_argument("results", type=Path, help="a file that python -m benchmarks wrote")
    parser.add_argument(
        "--rows", action="store_true", help="one row a line as JSON, with machine and versions, instead of tables"
    )
    options = parser.parse_args(arguments)
    try:
        results = load(options.results)
        if options.rows:
            for line in lines(results):
                print(line)
        else:
            print_results(results, _console())
    except ResultsError as error:
        parser.error(str(error))
    return 0


def report(arguments: Sequence[str]) -> int:
    """The command that makes the pictures and the page."""
    parser = Parser(prog="python -m benchmarks report", description="Make pictures and one self-contained page from results.")
    parser.add_argument("results", type=Path, nargs="+", help="files that python -m benchmarks wrote on one machine")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "out" / "report", help="folder that they go to")
    options = parser.parse_args(arguments)
    # Imported here: measuring needs no matplotlib.
    from benchmarks import page

    try:
        results = merge([load(path) for path in options.results])
        written = page.write(results, options.out)
    except ResultsError as error:
        parser.error(str(error))
    print(f"{len(written) // 2} pictures, as PNG and SVG, and {written[-1]}")
    return 0


def compare(arguments: Sequence[str]) -> int:
    """The command that judges two results files. Returns 1 where something is slower or has become wrong."""
    parser = Parser(
        prog="python -m benchmarks compare",
        description="Say what got faster or slower beyond the noise. Ends with 1 on a regression.",
    )
    parser.add_argument("old", metavar="OLD", type=Path, help="a results file")
    parser.add_argument("new", metavar="NEW", type=Path, help="a later one")
    parser.add_argument("--providers", type=names, default=[OURS], help=f"whose times (default {OURS})")
    parser.add_argument(
        "--threshold", type=_factor, default=THRESHOLD, help=f"smallest change that counts (default {THRESHOLD})"
    )
    parser.add_argument("--all", action="store_true", help="print what stayed the same too")
    options = parser.parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
        changes = comparison.compare(old, new, options.providers, options.threshold)
    except ResultsError as error:
        parser.error(str(error))
    comparison.print_changes(old, new, changes, _console(), options.all)
    return 1 if any(change.regression for change in changes) else 0


def gpu(arguments: Sequence[str]) -> int:
    """The command that measures on a GPU."""
    from benchmarks.gpu.command import main

    return main(arguments)


def compare_versions(arguments: Sequence[str]) -> int:
    """The command that measures two versions of the package in turns."""
    from benchmarks.versions.command import main

    return main(arguments)


def files(arguments: Sequence[str]) -> int:
    """The command that counts the package's files which a call enters."""
    from benchmarks.entered import main

    return main(arguments)


def busy(arguments: Sequence[str]) -> int:
    """The command that measures beside busy processes."""
    from benchmarks.busy import main

    return main(arguments)


def variants(arguments: Sequence[str]) -> int:
    """The command that measures cells that torch.nn lacks."""
    from benchmarks.variants import main

    return main(arguments)


COMMANDS = {
    "busy": busy,
    "variants": variants,
    "readme": readme,
    "show": show,
    "report": report,
    "compare": compare,
    "compare-versions": compare_versions,
    "files": files,
    "gpu": gpu,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; without the name of one, measure."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in COMMANDS:
            print(
                f"python -m benchmarks: unknown command {arguments[0]!r}; expected {', '.join(COMMANDS)} or options",
                file=sys.stderr,
            )
            return 2
        return COMMANDS[arguments[0]](arguments[1:])
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
