"""``python -m benchmarks compare-versions``."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.arguments import Parser, names, number, positive_seconds
from benchmarks.cases import CELLS, ITEM_BYTES, MODES, Case
from benchmarks.peers import torch_nn
from benchmarks.results import ResultsError, check_writable, commit, default_path, describe_run, save
from benchmarks.sets import ALL, SETS, select
from benchmarks.versions.processes import WorkerError, has_package
from benchmarks.versions.report import case_verdict, kind, markdown, ratio_of
from benchmarks.versions.run import BEFORE, PROVIDERS, TORCH, Versions

_ROOT = Path(__file__).resolve().parents[2]

# For both sets that are measured without options, and with --quick.
SECONDS, QUICK_SECONDS = 570.0, 80.0

# Seconds between two savings of the results.
_SAVE = 10.0

_positive_int = number(int, lambda value: value >= 1, "a whole number of 1 or more")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks compare-versions",
        description="Measure two versions of fused_rnn and torch.nn in turns, each version in a process of its own. "
        "Ends with 1 where the later one's results are wrong.",
    )
    parser.add_argument(
        "--before", type=Path, required=True, metavar="FOLDER", help="holds the package: a built checkout, or pip's --target"
    )
    parser.add_argument(
        "--after", type=Path, default=_ROOT, metavar="FOLDER", help="the later version (default: this checkout)"
    )
    parser.add_argument(
        "--sets",
        type=names,
        default=["small", "steps"],
        help=f"which cases, of {','.join(SETS)}; {ALL} for all (default small,steps)",
    )
    parser.add_argument("--cells", type=names, help=f"some of {','.join(CELLS)}")
    parser.add_argument("--shapes", type=names, help="some of the sets' shapes, or your own: BxTxH or BxTxIxH")
    parser.add_argument("--modes", type=names, help=f"some of {','.join(MODES)}")
    parser.add_argument("--dtypes", type=names, help=f"some of {','.join(ITEM_BYTES)}")
    parser.add_argument(
        "--kinds", type=names, help="some kinds of call, as the summary names them: plain, lengths, loop=cell, …"
    )
    parser.add_argument("--threads", type=_positive_int, default=2, help="threads where a case does not say (default 2)")
    parser.add_argument("--only-threads", type=_positive_int, help="leave out the cases of another number of threads")
    parser.add_argument("--backend", help="backend of both versions (default: the automatic choice)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, about 90 seconds")
    parser.add_argument(
        "--seconds", type=positive_seconds, help=f"time for all cases (default {SECONDS:.0f}, with --quick {QUICK_SECONDS:.0f})"
    )
    parser.add_argument("--list", action="store_true", help="list the cases, measure nothing")
    parser.add_argument("--json", type=Path, help="results file (default benchmarks/out/<date>.json)")
    parser.add_argument("--markdown", type=Path, help="summary (default: beside the results file)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The command. Returns the exit code: 0, 1 if a result was wrong, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    path: Path = options.json or default_path()
    folders = {"before": options.before, "after": options.after}
    try:
        cases = _cases(options)
        if options.list:
            for case in cases:
                print(case.key)
            return 0
        for name, folder in folders.items():
            if not has_package(folder):
                raise ResultsError(f"--{name}: no package fused_rnn in {folder}")
        folders = {name: folder.resolve() for name, folder in folders.items()}
        check_writable(path)
        summary: Path = options.markdown or path.with_suffix(".md")
        check_writable(summary, "--markdown")
    except (ValueError, ResultsError) as error:
        parser.error(str(error))
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    versions = Versions(folders, options.threads, {}, seconds, backend=options.backend)
    versions.listener = _Progress(versions, path)
    try:
        with versions:
            versions.run_info |= _describe(versions, options.backend, options.threads)
            results = versions.run(cases)
        save(results, path)
        summary.write_text(markdown(results), encoding="utf-8")
    except (ResultsError, WorkerError, OSError) as error:
        parser.error(str(error))
    print(markdown(results, every_case=False), end="")
    print(f"{len(results['rows'])} rows in {path}, every case in {summary}")
    if not results["run"]["complete"]:
        return 130
    return 1 if any(row["status"] == "wrong" and row["provider"] == "ours" for row in results["rows"]) else 0


def _cases(options: Any) -> list[Case]:
    cases = select(options.cells, options.shapes, options.modes, options.quick, options.sets, options.dtypes)
    if options.only_threads:
        cases = [case for case in cases if (case.threads or options.threads) == options.only_threads]
        if not cases:
            raise ValueError(f"--only-threads: no case has {options.only_threads}")
    if options.kinds is None:
        return cases
    known = {case.key: kind({"options": replace(case, threads=None).options, "dtype": case.dtype}) for case in cases}
    for name in options.kinds:
        if name not in known.values():
            raise ValueError(f"--kinds: expected some of {','.join(dict.fromkeys(known.values()))}, got {name!r}")
    return [case for case in cases if known[case.key] in options.kinds]


def _describe(versions: Versions, backend: str | None, threads: int) -> dict[str, Any]:
    info = describe_run({TORCH: torch_nn.PEER}, backend, threads)
    about = {name: process.ask("about", threads=threads) for name, process in versions.processes.items()}
    after = about["after"]
    backends = after["backends"]
    compared = {
        name: {"version": about[name]["version"], "commit": commit(folder) if (folder / ".git").exists() else None}
        for name, folder in versions.folders.items()
    }
    return info | {
        "providers": list(PROVIDERS.values()),
        "backends": backends,
        "backend": info["backend"] or next(name for name, found in backends.items() if found["available"]),
        "versions": info["versions"] | {"fused_rnn": after["version"], BEFORE: about["before"]["version"]},
        "commit": compared["after"]["commit"],
        "compared": compared,
    }


class _Progress:
    """A line after every case, and now and then the file: even a kill leaves what was measured. Nothing runs beside a slice."""

    def __init__(self, versions: Versions, path: Path) -> None:
        self._versions, self._path = versions, path
        self._saved = time.perf_counter()

    def __call__(self, done: float, case: Case, rows: Sequence[Mapping[str, Any]]) -> None:
        if time.perf_counter() - self._saved > _SAVE:
            save(self._versions.results, self._path)
            self._saved = time.perf_counter()
        print(f"{done:4.0%} {_line(case, rows)}", file=sys.stderr, flush=True)


def _line(case: Case, rows: Sequence[Mapping[str, Any]]) -> str:
    found = {row["provider"]: row for row in rows}
    shown = []
    for name, label in ((BEFORE, "before / after"), (TORCH, "torch / after")):
        spread = ratio_of(found, name)
        shown += [f"{label} {spread['median']:.2f}"] if spread else []
    return f"{case.key}: {', '.join([*shown, case_verdict(found)])}"
