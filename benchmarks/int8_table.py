"""The table of int8 modules: only from results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks import report
from benchmarks.cases import CELLS, MODES
from benchmarks.goals import by_case, figure, ratio
from benchmarks.peers import OURS
from benchmarks.peers.int8 import OURS as INT8
from benchmarks.peers.int8 import TORCH as TORCH_INT8

Results = Mapping[str, Any]


def table(results: Results) -> Table | None:
    """Time, error and size of int8 modules, ours and torch's; None where ours was not measured."""
    found = Table(
        title="Int8 weights: times against our float32 and torch's int8, largest error, bytes of the state_dict in a file",
        title_justify="left",
        header_style="bold",
        pad_edge=False,
    )
    for name in ("mode", "cell", "B×T×H"):
        found.add_column(name, no_wrap=True)
    for name in ("ms", "float32/int8", "torch int8/int8", "error", "of torch int8", "float32", "torch int8", "int8"):
        found.add_column(name, justify="right")
    for mode in MODES:
        for cell, (class_name, _) in CELLS.items():
            for rows in by_case(results["rows"], mode, cell):
                int8, torch_int8 = rows.get(INT8), rows.get(TORCH_INT8)
                if int8 is None or int8["status"] == "missing":
                    continue
                if int8["status"] == "wrong":
                    found.add_row(mode, class_name, report.case_label(int8), Text("WRONG", style="bold red"))
                    continue
                found.add_row(
                    mode,
                    class_name,
                    report.case_label(int8),
                    report.format_ms(figure(int8, "ms")),
                    report.times(ratio(rows.get(OURS), int8)),
                    report.times(ratio(torch_int8, int8)),
                    f"{int8['gate']['error']:.1e}",
                    f"{int8['gate']['torch']:.1e}",
                    report.size(figure(int8, "saved_bytes_float32")),
                    report.size(figure(torch_int8, "saved_bytes")),
                    report.size(figure(int8, "saved_bytes")),
                )
    return found if found.row_count else None
