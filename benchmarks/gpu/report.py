"""A short table of a GPU run: how many cases, what was wrong, and speed-ups as geometric means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def geometric_mean(values: Sequence[float]) -> float | None:
    """The geometric mean, or None of nothing."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else None


def groups(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by cell, dtype, directions and extra, in the order of their first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["cell"], row["dtype"], row["directions"], row["extra"]), []).append(row)
    return found


def table(results: Mapping[str, Any]) -> Table:
    """Speed-ups against torch.nn: one line for each group of cases, and one for all of them."""
    run = results["run"]
    title = f"{run['device']}, torch {run['torch']}, triton {run.get('triton', '—')}, {run['date'][:10]}"
    made = Table(title=title)
    for heading in ("cell", "dtype", "directions", "extra"):
        made.add_column(heading)
    for heading in ("cases", "forward", "forward+backward", "slowest", "not measured"):
        made.add_column(heading, justify="right")
    for key, rows in groups(results["rows"]).items():
        made.add_row(*(str(part) for part in key), *_cells(rows))
    made.add_section()
    made.add_row("all", "", "", "", *_cells(results["rows"]))
    return made


def _cells(rows: Sequence[Row]) -> list[str]:
    ratios: dict[str, list[float]] = {
        mode: [row["ratio_torch_nn"] for row in rows if row["mode"] == mode and "ratio_torch_nn" in row]
        for mode in ("forward", "training")
    }
    slowest = min(ratios["training"], default=None)
    shown = [geometric_mean(ratios["forward"]), geometric_mean(ratios["training"]), slowest]
    bad = sum(row["status"] != "ok" for row in rows)
    return [
        str(len({row["name"] for row in rows})),
        *("—" if value is None else f"{value:.2f}×" for value in shown),
        str(bad) if bad else "",
    ]


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the table, the barrier's cost and what was left out."""
    run = results["run"]
    if results["rows"]:
        console.print(table(results))
    if "barrier_us" in run:
        costs = ", ".join(f"{count} programs {cost:.2f} µs" for count, cost in run["barrier_us"].items())
        console.print(f"one barrier: {costs}")
    if run.get("left_out"):
        console.print(f"{run['left_out']} cases were left out: the time was used up")
