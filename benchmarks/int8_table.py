"""The table of int8 modules: only from results.

``python -m benchmarks.int8_table int8.json`` writes int8.md beside the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import report
from benchmarks.arguments import Parser
from benchmarks.cases import CELLS, MODES
from benchmarks.goals import by_case, figure, ratio
from benchmarks.peers import OURS
from benchmarks.peers.int8 import OURS as INT8
from benchmarks.peers.int8 import TORCH as TORCH_INT8
from benchmarks.results import ResultsError, load

Results = Mapping[str, Any]

TITLE = "Int8 weights: times against our float32 and torch's int8, largest error, bytes of the state_dict in a file"
_NAMES = ("mode", "cell", "B×T×H")
_FIGURES = ("ms", "float32/int8", "torch int8/int8", "error", "of torch int8", "float32", "torch int8", "int8")


def lines(results: Results) -> list[list[str]]:
    """The table's lines: of each case in which our int8 modules were asked for, names and figures."""
    found = []
    for mode in MODES:
        for cell, (class_name, _) in CELLS.items():
            for rows in by_case(results["rows"], mode, cell):
                int8, torch_int8 = rows.get(INT8), rows.get(TORCH_INT8)
                if int8 is None or int8["status"] == "missing":
                    continue
                line = [mode, class_name, report.case_label(int8)]
                if int8["status"] == "wrong":
                    found.append([*line, "WRONG", *[""] * (len(_FIGURES) - 1)])
                    continue
                line += [report.format_ms(figure(int8, "ms")), *map(report.times, _ratios(rows))]
                line += [f"{int8['gate'][name]:.1e}" for name in ("error", "torch")]
                sizes = (figure(int8, "saved_bytes_float32"), figure(torch_int8, "saved_bytes"), figure(int8, "saved_bytes"))
                found.append([*line, *map(report.size, sizes)])
    return found


def _ratios(rows: Mapping[str, Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """The median times of our float32 and of torch's int8 modules over that of our int8 ones."""
    return ratio(rows.get(OURS), rows[INT8]), ratio(rows.get(TORCH_INT8), rows[INT8])


def table(results: Results) -> Table | None:
    """For the terminal; None where our int8 modules were not measured."""
    found = Table(title=TITLE, title_justify="left", header_style="bold", pad_edge=False)
    for name in _NAMES:
        found.add_column(name, no_wrap=True)
    for name in _FIGURES:
        found.add_column(name, justify="right")
    for line in lines(results):
        found.add_row(*line, style="bold red" if "WRONG" in line else "")
    return found if found.row_count else None


def page(results: Results) -> str:
    """A page of Markdown.

    Raises:
        ResultsError: if our int8 modules were not measured.
    """
    found = lines(results)
    if not found:
        raise ResultsError(f"no case of the results has the provider {INT8!r}")
    run = results["run"]
    rule = [*["---"] * len(_NAMES), *["---:"] * len(_FIGURES)]
    rows = ["| " + " | ".join(line) + " |" for line in ([*_NAMES, *_FIGURES], rule, *found)]
    command = " ".join(run.get("command", ("python -m benchmarks",)))
    load = f", load {run['load']:.1f}" if "load" in run else ""
    return "\n".join([f"# {TITLE}", "", report.machine(results), "", f"`{command}`, {run['date']}{load}.", "", *rows, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of a results file."""
    parser: argparse.ArgumentParser = Parser(prog="python -m benchmarks.int8_table", description="Write a page beside a file.")
    parser.add_argument("results", type=Path, help="a file that python -m benchmarks wrote, with --peers torch-int8,int8")
    options = parser.parse_args(arguments)
    path: Path = options.results.with_suffix(".md")
    try:
        path.write_text(page(load(options.results)), encoding="utf-8")
    except (ResultsError, OSError) as error:
        parser.error(str(error))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
