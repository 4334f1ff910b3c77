"""The page: one self-contained HTML file with the pictures and tables, and the pictures as files beside it."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import rc_context

from benchmarks import figures
from benchmarks.cases import CELLS, MODES
from benchmarks.goals import by_case, evaluate, figure, ratio
from benchmarks.peers import OURS
from benchmarks.png import save_png
from benchmarks.report import case_label, compared, format_ms, machine, size, summary, times, title
from benchmarks.results import ResultsError
from benchmarks.scaling import sweeps

Results = Mapping[str, Any]
_TEMPLATE = Path(__file__).with_name("page.html.j2")


def write(results: Results, folder: Path) -> list[Path]:
    """Draw the pictures and write them and ``index.html``.

    Returns:
        the files, the page last.

    Raises:
        ResultsError: if there is nothing to show, or the folder cannot be written.
    """
    if not results["rows"]:
        raise ResultsError("these results hold no rows: nothing to show")
    drawn = figures.pictures(results)
    written = []
    sections: dict[str, list[dict[str, str]]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in drawn:
            vector = io.BytesIO()
            with rc_context(figures.STYLE):
                picture.figure.savefig(vector, format="svg", metadata={"Date": None})
            paths = [folder / f"{picture.name}.{kind}" for kind in ("png", "svg")]
            save_png(picture.figure, paths[0], 160)
            paths[1].write_bytes(vector.getvalue())
            written += paths
            address = "data:image/svg+xml;base64," + base64.b64encode(vector.getvalue()).decode()
            sections.setdefault(picture.section, []).append({"address": address, "caption": picture.caption})
        page = folder / "index.html"
        page.write_text(_render(results, sections), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot write to {folder}: {error.strerror or error}") from error
    return [*written, page]


def _render(results: Results, sections: Mapping[str, Any]) -> str:
    # Everything that comes from a file is escaped.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    run = results["run"]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        machine=machine(results),
        run=run,
        rates=_rates(run),
        headlines=_headlines(results),
        sections=sections,
        introductions=figures.INTRODUCTIONS,
        slopes=[_slope(sweep) for sweep in sweeps(results)],
        tables=[table for mode in MODES if (table := _table(results, mode))],
        goals=_goals(results),
        growth=_growth(results),
        missing=_missing(results),
        wrong=[row for row in results["rows"] if row["status"] == "wrong"],
    )


def _rates(run: Mapping[str, Any]) -> list[str]:
    words = (
        ("gemm_gflops", "one large matrix product", "GFLOP/s"),
        ("fma_gflops", "multiply-adds in registers", "GFLOP/s"),
        ("bandwidth_gbs", "memory", "GB/s"),
    )
    return [f"{text} {run[key]['median']:.0f} {unit}" for key, text, unit in words if key in run]


def _headlines(results: Results) -> list[dict[str, Any]]:
    found = []
    for mode in MODES:
        for cell, (class_name, _) in CELLS.items():
            mean = summary(results, mode, cell, "torch", statistics.geometric_mean)
            least = summary(results, mode, cell, "torch", min)
            if mean is not None:
                count = sum(
                    ratio(rows.get("torch"), rows.get(OURS)) is not None for rows in by_case(results["rows"], mode, cell)
                )
                cases = "1 case" if count == 1 else f"{count} cases"
                found.append(
                    {
                        "what": f"{class_name} {mode}",
                        "mean": times(mean),
                        "slower": mean < 1,
                        "count": cases,
                        "least": times(least),
                    }
                )
    return found


def _table(results: Results, mode: str) -> dict[str, Any] | None:
    rows_of_mode = [row for row in results["rows"] if row["mode"] == mode]
    present = {row["provider"] for row in rows_of_mode if row["status"] != "missing"}
    others = [name for name in compared(results) if name in present]
    lines = []
    for cell, (class_name, _) in CELLS.items():
        for rows in by_case(results["rows"], mode, cell):
            first = next(iter(rows.values()))
            ours = rows.get(OURS)
            line = {
                "cell": class_name,
                "case": case_label(first),
                "origin": first["shape"].get("origin", ""),
                "ours": _time(ours),
                "others": [_other(rows.get(name), ours) for name in others],
                "reaches": [f"{ours['reaches'][name] * 100:.0f}" for name in ("gemm", "fma", "bandwidth")]
                if ours is not None and "reaches" in ours
                else ["–"] * 3,
                "memory": [
                    size(figure(rows.get(name), key)) for key in ("held_bytes", "peak_bytes") for name in (OURS, "torch")
                ],
            }
            lines.append(line)
    return {"mode": mode, "meaning": MODES[mode], "others": [title(name) for name in others], "rows": lines} if lines else None


def _time(row: Mapping[str, Any] | None) -> str:
    return "WRONG" if row is not None and row["status"] == "wrong" else format_ms(figure(row, "ms"))


def _other(row: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> dict[str, str]:
    value = ratio(row, ours)
    if value is None or row is None:
        return {"ms": _time(row), "ratio": "", "kind": "", "spread": ""}
    kind = "faster" if value >= 1.05 else "even" if value >= 0.95 else "slower"
    # Two rounds have no middle.
    spread = row.get("ratio") if row.get("rounds", 0) > 2 else None
    return {
        "ms": _time(row),
        "ratio": times(value) + ("~" if row.get("noisy") else ""),
        "kind": kind,
        "spread": f"{times(spread['p20'])} – {times(spread['p80'])}" if spread else "",
    }


def _slope(sweep: Any) -> dict[str, str]:
    return {
        "what": f"{CELLS[sweep.cell][0]} {sweep.mode}",
        "axis": sweep.axis,
        "fixed": sweep.fixed,
        "provider": title(sweep.provider),
        "slope": sweep.power,
        "points": " ".join(f"{x:.0f}" for x, _ in sweep.points),
    }


def _goals(results: Results) -> list[dict[str, Any]]:
    judged = evaluate(results)
    if not any(goal["count"] for goal in judged):
        return []
    for goal in judged:
        in_bytes = goal["mode"] == "growth"
        shown = size if in_bytes else times
        goal["cell"] = CELLS[goal["cell"]][0]
        goal["wanted"] = ("≥ " if goal["at_least"] else "≤ ") + shown(goal["bound"])
        goal["reached"] = shown(goal["value"]) + ("~" if goal["noisy"] else "")
    return judged


def _growth(results: Results) -> list[dict[str, str]]:
    return [
        {
            "cell": CELLS[row["cell"]][0],
            "provider": title(row["provider"]),
            "figures": [size(row[key]) for key in ("peak_bytes", "peak_bytes_long", "growth_bytes")],
        }
        for row in results["growth"]
        if row["status"] == "ok"
    ]


def _missing(results: Results) -> dict[str, list[str]]:
    reasons: dict[str, dict[str, None]] = {}
    for row in [*results["rows"], *results["growth"]]:
        reason = row.get("reason") if row["status"] == "missing" else row.get("note")
        if reason:
            reasons.setdefault(title(row["provider"]), {})[reason] = None
    return {name: sorted(found) for name, found in reasons.items()}
