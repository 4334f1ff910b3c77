"""What a GPU run shows: speed-ups as geometric means with the least of each, every case that is slower, and what was wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

# Times of calls as they are made, and of what the device does for them.
COLUMNS = {"call": "ratio_torch_nn", "graph": "ratio_graph_torch_nn"}
MODES = {"forward": "forward", "training": "forward+backward"}
_RATIO = "ratio_"


def geometric_mean(values: Sequence[float]) -> float | None:
    """The geometric mean, or None of nothing."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else None


def groups(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by cell and dtype, in the order of their first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["cell"], row["dtype"]), []).append(row)
    return found


def table(results: Mapping[str, Any]) -> Table:
    """Speed-ups against torch.nn, mean and least: one line for each group of cases, and one for all of them."""
    run = results["run"]
    title = f"{run['device']}, torch {run['torch']}, triton {run.get('triton', '—')}, {run['date'][:10]}"
    made = Table(title=title, caption="times faster than torch.nn: geometric mean, least")
    for heading in ("cell", "dtype"):
        made.add_column(heading)
    made.add_column("cases", justify="right")
    for mode in MODES.values():
        for column in COLUMNS:
            made.add_column(f"{mode}, {column}", justify="right")
    made.add_column("not measured", justify="right")
    for key, rows in groups(results["rows"]).items():
        made.add_row(*(str(part) for part in key), *_cells(rows))
    made.add_section()
    made.add_row("all", "", *_cells(results["rows"]))
    return made


def _cells(rows: Sequence[Row]) -> list[str]:
    bad = sum(row["status"] != "ok" for row in rows)
    shown = []
    for mode in MODES:
        for name in COLUMNS.values():
            ratios = [row[name] for row in rows if row["mode"] == mode and name in row]
            mean = geometric_mean(ratios)
            shown.append("—" if mean is None else f"{mean:.2f}×, {min(ratios):.2f}×")
    return [str(len({row["name"] for row in rows})), *shown, str(bad) if bad else ""]


def slower(rows: Sequence[Row]) -> list[str]:
    """A line for every row in which anybody is faster than ours by either kind of time, the worst first."""
    found = []
    for row in rows:
        behind = {name: value for name, value in row.items() if name.startswith(_RATIO) and value < 1.0}
        if behind:
            listed = ", ".join(f"{_who(name)} {value:.2f}×" for name, value in sorted(behind.items(), key=lambda item: item[1]))
            regime = f" ({row['regime']})" if row.get("regime") else ""
            found.append((min(behind.values()), f"{row['name']} {MODES[row['mode']]}{regime}: {listed}"))
    return [text for _, text in sorted(found)]


def _who(name: str) -> str:
    name = name.removeprefix(_RATIO)
    return f"{name.removeprefix('graph_')} as a graph" if name.startswith("graph_") else name


def problems(results: Mapping[str, Any]) -> Iterator[str]:
    """A line for whatever else a reader must know: what is wrong, failed, not captured or not there."""
    run = results["run"]
    for verdict in results["gate"]:
        if not verdict["passed"]:
            why = verdict.get("failure") or f"{verdict['worst']}: error {verdict['error']:.1e}, allowed {verdict['bound']:.1e}"
            yield f"not right: {verdict['what']}: {why}"
    for row in results["rows"]:
        if row["status"].startswith("failed"):
            yield f"{row['name']}: {row['status']}"
    red = [row for row in results["rows"] if "regime_gate" in row]
    if red:
        yield f"{len(red)} rows are of a regime that was not right on its own problems: their times are no claim"
    notes: dict[str, list[str]] = {}
    for row in results["rows"]:
        for name, value in row.items():
            if name != "status" and isinstance(value, str) and value.startswith(("failed", "wrong", "not tried")):
                # One of each kind; a row that was not tried names the one that was.
                notes.setdefault(f"{name} {value.split(', in ')[0]}", []).append(row["name"])
    for note, names in notes.items():
        yield f"{note} ({len(names)} rows, the first {names[0]})"
    for name, why in run.get("missing", {}).items():
        yield f"without {name}: {why}"
    if "stopped" in run:
        yield f"stopped: {run['stopped']}"
    if run.get("left_out"):
        yield f"{run['left_out']} cases were left out: the time was used up"


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the table, the cases that are slower, the barrier's cost and what was wrong or left out."""
    run = results["run"]

    def told(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    if results["rows"]:
        console.print(table(results))
    lines = slower(results["rows"])
    measured = len({row["name"] for row in results["rows"] if row["status"] == "ok"})
    told(f"rows in which another is faster, of {measured} cases:{'' if lines else ' none'}")
    for text in lines:
        told(f"  {text}")
    if "barrier_us" in run:
        costs = ", ".join(f"{count} programs {cost:.2f} µs" for count, cost in run["barrier_us"].items())
        told(f"one barrier: {costs}")
    for text in problems(results):
        told(text)
