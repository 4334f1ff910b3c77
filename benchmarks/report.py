"""Tables in the terminal, only from results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.cases import CELLS, MODES, Case
from benchmarks.goals import by_case, evaluate, figure, ratio
from benchmarks.peers import OURS, Peer, peers

# A table with more peers than this shows time and ratio in one column.
_APART = 3

# A load average above this, before anything is measured, is worth a warning.
LOAD = 0.5

Results = Mapping[str, Any]


def machine(results: Results) -> str:
    """The machine and the software, in one line."""
    run = results["run"]
    versions = run["versions"]
    names = [f"{name} {versions[name]}" for name in ("fused_rnn", "torch", "onnxruntime", "python") if name in versions]
    backend = run["backend"]
    detail = run["backends"].get(backend, {}).get("detail", "")
    served = f"{backend} backend ({detail})" if detail else f"{backend} backend"
    threads = f"{_count(run['threads'], 'thread')} on {_count(run['cores'], 'core')}"
    return f"{run['cpu']}, {threads}, {served}, {', '.join(names)}, {run['date'][:10]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def compared(results: Results) -> list[str]:
    """The providers other than ours, in the order of the run."""
    return [name for name in results["run"]["providers"] if name != OURS]


def title(provider: str) -> str:
    """What a table calls a provider."""
    known = peers()
    return known[provider].title if provider in known else provider


def format_ms(value: float | None) -> str:
    """Milliseconds for people: three digits."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def times(value: float | None) -> str:
    """A ratio with two digits after the point, cut and not rounded: 1.499 is not 1.5."""
    return "–" if value is None else f"{int(value * 100 + 1e-9) / 100:.2f}"


def size(value: float | None) -> str:
    """Bytes for people."""
    if value is None:
        return "–"
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(value) >= step:
            return f"{value / step:.1f} {unit}"
    return f"{value:.0f} B"


def _shown_ratio(row: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> Text:
    value = ratio(row, ours)
    if value is None or row is None:
        return Text("–", style="dim")
    style = "bold green" if value >= 1.05 else "yellow" if value >= 0.95 else "bold red"
    return Text(times(value) + ("~" if row.get("noisy") else ""), style=style)


def terminal(results: Results) -> RenderableType:
    """Everything that was measured: a table per mode, memory growth, goals, notes."""
    parts: list[RenderableType] = []
    for mode, meaning in MODES.items():
        if any(row["mode"] == mode for row in results["rows"]):
            parts.append(_mode_table(results, mode, meaning))
    # Imported here, because it draws with what is above.
    from benchmarks import int8_table

    int8 = int8_table.table(results)
    if int8 is not None:
        parts.append(int8)
    memory = _memory_table(results)
    if memory is not None:
        parts.append(memory)
    if results["growth"]:
        parts.append(_growth_table(results))
    judged = evaluate(results)
    if any(goal["count"] for goal in judged):
        parts.append(_goals_table(judged))
    parts.append(_notes(results))
    return Group(*parts)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", header_style="bold", pad_edge=False)


def _mode_table(results: Results, mode: str, meaning: str) -> Table:
    # A peer that has no figure in this mode gets no column; the notes say why.
    present = {row["provider"] for row in results["rows"] if row["mode"] == mode and row["status"] != "missing"}
    others = [name for name in compared(results) if name in present]
    table = _table(f"{mode.capitalize()}: {meaning}")
    for name in ("cell", "B×T×H", "ms ours"):
        table.add_column(name, no_wrap=True)
    # Of many peers, time and ratio share a column.
    together = len(others) > _APART
    for name in () if together else others:
        table.add_column(f"ms {title(name)}")
    for name in others:
        table.add_column(f"{title(name)}, ms (/ours)" if together else f"{title(name)}/ours")
    if mode != "streaming":
        table.add_column("× floor")
        table.add_column("% GEMM FMA bus")
    for column in table.columns[2:]:
        column.justify = "right"
    for cell, (class_name, _) in CELLS.items():
        cases = by_case(results["rows"], mode, cell)
        for rows in cases:
            ours = rows.get(OURS)
            shown: list[RenderableType] = [class_name, case_label(next(iter(rows.values()))), _shown_ms(ours)]
            if together:
                shown += [_shown_both(rows.get(name), ours) for name in others]
            else:
                shown += [_shown_ms(rows.get(name)) for name in others]
                shown += [_shown_ratio(rows.get(name), ours) for name in others]
            if mode != "streaming":
                shown += [times(figure(ours, "x_floor")), _shown_reach(ours)]
            table.add_row(*shown)
        if len(cases) > 1:
            for name, values in (("geomean", statistics.geometric_mean), ("min", min)):
                line: list[RenderableType] = [f"{class_name} {name}", "", *[""] * (1 + (0 if together else len(others)))]
                line += [times(summary(results, mode, cell, other, values)) for other in others]
                table.add_row(*line, style="bold" if name == "geomean" else "", end_section=name == "min")
    return table


_MEMORY = {"held_bytes": "held for the backward", "peak_bytes": "peak of a call"}


def _memory_table(results: Results) -> Table | None:
    """Bytes of every provider that has a figure, or None where nothing was measured."""
    columns = [
        (quantity, name)
        for quantity in _MEMORY
        for name in results["run"]["providers"]
        if any(row["provider"] == name and figure(row, quantity) is not None for row in results["rows"])
    ]
    if not columns:
        return None
    table = _table("Memory: " + ", ".join(f"{quantity.removesuffix('_bytes')}: {text}" for quantity, text in _MEMORY.items()))
    for name in ("mode", "cell", "B×T×H"):
        table.add_column(name, no_wrap=True)
    for quantity, name in columns:
        table.add_column(f"{quantity.removesuffix('_bytes')} {title(name)}", justify="right")
    for mode in MODES:
        for cell, (class_name, _) in CELLS.items():
            for rows in by_case(results["rows"], mode, cell):
                shown = [size(figure(rows.get(name), quantity)) for quantity, name in columns]
                table.add_row(mode, class_name, case_label(next(iter(rows.values()))), *shown)
    return table


def case_label(row: Mapping[str, Any]) -> str:
    """The shape, and what sets the case apart: dtype, options, threads."""
    dtype = row.get("dtype", "float32")
    extra = [dtype] if dtype != "float32" else []
    extra += [part for part in row["case"].split("/")[4:] if part]
    return " ".join((row["shape"]["name"].replace("x", "×"), *extra))


def _shown_both(row: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> Text:
    if row is not None and row["status"] == "wrong":
        return Text("WRONG", style="bold red")
    if figure(row, "ms") is None:
        return Text("–", style="dim")
    return Text.assemble(format_ms(figure(row, "ms")), " (", _shown_ratio(row, ours), ")")


def _shown_reach(row: Mapping[str, Any] | None) -> str:
    if row is None or row["status"] != "ok" or "reaches" not in row:
        return "–"
    return " ".join(f"{row['reaches'][name] * 100:3.0f}" for name in ("gemm", "fma", "bandwidth"))


def summary(results: Results, mode: str, cell: str, other: str, statistic: Any) -> float | None:
    """A statistic of ``other / ours`` over the shapes, or None where no shape has both."""
    values = [ratio(rows.get(other), rows.get(OURS)) for rows in by_case(results["rows"], mode, cell)]
    present = [value for value in values if value is not None]
    return float(statistic(present)) if present else None


def _shown_ms(row: Mapping[str, Any] | None) -> RenderableType:
    if row is not None and row["status"] == "wrong":
        return Text("WRONG", style="bold red")
    return format_ms(figure(row, "ms"))


def _growth_table(results: Results) -> Table:
    table = _table("Inference memory beyond the results, at T and 4T")
    for name in ("cell", "provider", "at T", "at 4T", "growth", ""):
        table.add_column(name, justify="right" if name in ("at T", "at 4T", "growth") else "left")
    for row in results["growth"]:
        head = (CELLS[row["cell"]][0], title(row["provider"]))
        if row["status"] == "ok":
            table.add_row(*head, size(row["peak_bytes"]), size(row["peak_bytes_long"]), size(row["growth_bytes"]))
        else:
            table.add_row(*head, "–", "–", "–", Text(row["reason"], style="dim"))
    return table


_VERDICT_STYLE = {"pass": "bold green", "fail": "bold red", "part": "yellow", "not measured": "dim"}


def _goals_table(judged: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("Goals (set for two cores)")
    for name in ("mode", "cell", "figure", "goal", "reached", "shapes", "verdict"):
        table.add_column(name, justify="right" if name in ("goal", "reached", "shapes") else "left")
    for goal in judged:
        in_bytes = "bytes" in goal["goal"] and goal["mode"] == "growth"
        shown = size if in_bytes else times
        value = goal["value"]
        # An upper bound must not be passed by cutting digits either.
        reached = shown(value if value is None or in_bytes or goal["at_least"] else -(-value * 100 // 1) / 100)
        table.add_row(
            goal["mode"],
            CELLS[goal["cell"]][0],
            goal["goal"],
            ("≥ " if goal["at_least"] else "≤ ") + shown(goal["bound"]),
            reached + ("~" if goal["noisy"] else ""),
            f"{goal['count']}/{goal['of']}",
            Text(goal["verdict"], style=_VERDICT_STYLE[goal["verdict"]]),
        )
    return table


def _notes(results: Results) -> Text:
    run = results["run"]
    text = Text(machine(results) + "\n", style="dim")
    if "gemm_gflops" in run:
        rate = run["gemm_gflops"]
        text.append(f"sgemm 2048³: {rate['median']:.0f} GFLOP/s (p20 {rate['p20']:.0f}, p80 {rate['p80']:.0f}). ")
        text.append("× floor: time over that of the same products at this rate.\n")
    if "fma_gflops" in run and "bandwidth_gbs" in run:
        text.append(f"Multiply-adds in registers: {run['fma_gflops']['median']:.0f} GFLOP/s. ")
        text.append(f"Memory: {run['bandwidth_gbs']['median']:.1f} GB/s. ")
        text.append(
            "% GEMM FMA bus: the share of ours' time that its products would take at the two rates, and its inputs and "
        )
        text.append("results at memory's.\n")
    text.append("ms are medians over rounds. ~: p20 and p80 of that ratio lie too far apart, or too few rounds.\n")
    load = run.get("load", 0.0)
    if load > LOAD:
        text.append(f"Other programs kept the machine busy when this began (load {load:.1f}).\n", style="yellow")
    reasons: dict[str, set[str]] = {}
    for row in [*results["rows"], *results["growth"]]:
        if row["status"] == "missing":
            reasons.setdefault(row["provider"], set()).add(row["reason"])
        elif row.get("note"):
            reasons.setdefault(row["provider"], set()).add(row["note"])
    for name, found in reasons.items():
        text.append(f"{title(name)}: {'; '.join(sorted(found))}\n")
    for row in results["rows"]:
        if row["status"] == "wrong":
            text.append(f"WRONG {row['provider']} {row['case']}: {row['reason']}\n", style="bold red")
    if not run["complete"]:
        text.append("Stopped early: this is what was measured so far.\n", style="bold yellow")
    return text


def print_cases(cases: Sequence[Case], known: Mapping[str, Peer], console: Console) -> None:
    """Print what would be measured, and who could be."""
    table = _table("Cases")
    for name in ("mode", "cell", "B×T×H", "dtype", "options", "origin"):
        table.add_column(name)
    for case in cases:
        options = " ".join(case.options)
        name = case.shape.name.replace("x", "×")
        table.add_row(case.mode, case.class_name, name, case.dtype, options, case.shape.origin)
    console.print(table)
    table = _table("Peers (--peers)")
    for name in ("name", "who", "here"):
        table.add_column(name)
    for name, peer in known.items():
        table.add_row(name, peer.title, peer.unavailable() or peer.version())
    console.print(table)


def print_results(results: Results, console: Console) -> None:
    """Print ``terminal(results)``."""
    console.print(terminal(results))


def rows_line(case_rows: Sequence[Mapping[str, Any]]) -> Text:
    """One finished case in one line, for the running display."""
    rows = {row["provider"]: row for row in case_rows}
    first = next(iter(rows.values()))
    ours = rows.get(OURS)
    line = Text(f"{first['mode']:<10}{CELLS[first['cell']][0]:<5}{case_label(first):<12}")
    for name, row in rows.items():
        shown = "WRONG" if row["status"] == "wrong" else format_ms(figure(row, "ms"))
        line.append(f" {title(name)} {shown}", style="bold red" if row["status"] == "wrong" else "")
        if name != OURS and ratio(row, ours) is not None:
            line.append(" (")
            line.append_text(_shown_ratio(row, ours))
            line.append(")")
    return line
