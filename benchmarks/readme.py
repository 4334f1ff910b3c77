"""The README's block and the page of the results folder, in Markdown, only from results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import jobs
from benchmarks.cases import CELLS
from benchmarks.goals import by_case, figure, goal_rows, ratio
from benchmarks.peers import OURS
from benchmarks.report import case_label, format_ms, machine, summary, times, title
from benchmarks.results import ResultsError
from benchmarks.scaling import sweeps

BEGIN, END = "<!-- speedup:begin -->", "<!-- speedup:end -->"

# The case of two directions that a run without options measures. No goal speaks of it, so no mean has it.
DIRECTIONS = "32x100x256", ("bidirectional",)

# What recurrent PPO code does with resets: the case that the README names.
RESETS = "64x128x128", ("resets=32",)

Results = Mapping[str, Any]
Jobs = Mapping[str, Sequence[Mapping[str, Any]]]


def readme_block(results: Results, picture: str | None = None, trained: Jobs | None = None, more: str | None = None) -> str:
    """The README's block: speed-ups per shape, geometric means, machine, whole jobs.

    Args:
        picture: address of the picture, relative to the README.
        trained: rows of the training jobs, by name.
        more: address of the results' page, relative to the README.
    """
    everything, results = results, {**results, "rows": goal_rows(results)}
    modes = [mode for mode in ("training", "inference") if any(row["mode"] == mode for row in results["rows"])]
    columns = [(mode, cell) for mode in modes for cell in CELLS if by_case(results["rows"], mode, cell)]
    if not columns:
        raise ResultsError("these results hold neither training nor inference: nothing for the README")
    cases = {column: {_shape(rows)["name"]: rows for rows in by_case(results["rows"], *column)} for column in columns}
    names = list(dict.fromkeys(name for column in columns for name in cases[column]))
    lines = ["Times as fast as `torch.nn`, same weights, same results (float32):", ""]
    lines.append("| B × T × H | " + " | ".join(f"{CELLS[cell][0]} {mode}" for mode, cell in columns) + " |")
    lines.append("|---|" + "---:|" * len(columns))
    for name in names:
        shown = [_markdown_cell(cases[column].get(name, {})) for column in columns]
        lines.append(f"| {name.replace('x', ' × ')} | " + " | ".join(shown) + " |")
    means = [summary(results, mode, cell, "torch", statistics.geometric_mean) for mode, cell in columns]
    lines.append("| **geometric mean** | " + " | ".join(f"**{_markdown_ratio(mean)}**" for mean in means) + " |")
    lines += _directions_line(everything, columns)
    noisy = any("\\*" in line for line in lines)
    remark = "\\* The spread between rounds is too wide for this figure to mean much." if noisy else ""
    for sentence in (remark, _streaming_sentence(results), _onnx_sentence(results), _resets_sentence(everything)):
        lines += ["", sentence] if sentence else []
    lines += ["", f"Measured with `python -m benchmarks` on {machine(results)}."]
    lines += ["", f"![Speed-up over torch.nn for each shape and cell]({picture})"] if picture else []
    rows = jobs.table(trained or {})
    lines += (
        ["", "Whole trainings, the same weights and batches with both, quality on held-out data:", "", *rows] if rows else []
    )
    lines += ["", f"All figures, how time grows with each size, and the pictures: [{more}]({more})."] if more else []
    return "\n".join(lines)


def _directions_line(results: Results, columns: Sequence[tuple[str, str]]) -> list[str]:
    rows = [row for row in goal_rows(results, DIRECTIONS[1]) if row["shape"]["name"] == DIRECTIONS[0]]
    found = [by_case(rows, *column) for column in columns]
    shown = [_markdown_cell(case[0]) if case else "–" for case in found]
    label = f"{DIRECTIONS[0].replace('x', ' × ')}, two directions"
    return [f"| {label} | {' | '.join(shown)} |"] if rows else []


def _shape(rows: Mapping[str, Any]) -> Mapping[str, Any]:
    shape: Mapping[str, Any] = next(iter(rows.values()))["shape"]
    return shape


def _markdown_cell(rows: Mapping[str, Any]) -> str:
    value = ratio(rows.get("torch"), rows.get(OURS))
    noisy = value is not None and rows["torch"].get("noisy")
    return _markdown_ratio(value) + ("\\*" if noisy else "")


def _markdown_ratio(value: float | None) -> str:
    return "–" if value is None else f"{times(value)}×"


def _streaming_sentence(results: Results) -> str:
    parts = []
    for cell, (class_name, _) in CELLS.items():
        value = summary(results, "streaming", cell, "torch", min)
        parts += [f"{class_name} {times(value)}×"] if value is not None else []
    return f"One streaming step (B = T = 1, H = 512): {', '.join(parts)}." if parts else ""


def _onnx_sentence(results: Results) -> str:
    parts = []
    for cell, (class_name, _) in CELLS.items():
        mean = summary(results, "inference", cell, "onnxruntime", statistics.geometric_mean)
        least = summary(results, "inference", cell, "onnxruntime", min)
        parts += [f"{class_name} {times(mean)}× (least {times(least)}×)"] if mean is not None else []
    return f"Inference against ONNX Runtime, geometric mean: {', '.join(parts)}." if parts else ""


def _resets_cases(results: Results, mode: str) -> dict[str, Mapping[str, Any]]:
    """Cell -> rows by provider of the case in ``RESETS``."""
    rows = [row for row in goal_rows(results, RESETS[1]) if row["shape"]["name"] == RESETS[0]]
    return {cell: found[0] for cell in CELLS if (found := by_case(rows, mode, cell))}


def _resets_sentence(results: Results) -> str:
    parts = []
    for mode in ("training", "inference"):
        values = {cell: ratio(rows.get("torch"), rows.get(OURS)) for cell, rows in _resets_cases(results, mode).items()}
        cells = [f"{CELLS[cell][0]} {times(value)}×" for cell, value in values.items() if value is not None]
        parts += [f"{mode} {', '.join(cells)}"] if cells else []
    if not parts:
        return ""
    return (
        "With `reset=`, whole sequences against `torch.nn` one call a step as recurrent PPO code writes it "
        f"(B = 64, T = 128, H = 128): {'; '.join(parts)}."
    )


def write_between_markers(path: Path, block: str) -> None:
    """Replace what stands between the markers of a Markdown file.

    Raises:
        ResultsError: if the file cannot be read or written, or has not exactly one pair of markers.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultsError(f"{path}: expected one {BEGIN} and one {END} after it")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    try:
        path.write_text(f"{head}\n{block}\n{tail}")
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}") from error


def results_page(
    results: Results, trained: Jobs, pictures: Mapping[str, Sequence[tuple[str, str]]], sources: Sequence[tuple[str, str]]
) -> str:
    """The page of the results folder.

    Args:
        trained: rows of the training jobs, by name.
        pictures: heading -> (address relative to the page, caption).
        sources: (link to a results file, where it comes from).
    """
    lines = ["# Results of one machine", "", f"{machine(results)}."]
    lines += ["", "`python -m benchmarks readme` writes this page and its pictures from the JSON files beside it:", ""]
    lines += [f"- {source}: {origin}" for source, origin in sources]
    for heading, found in pictures.items():
        lines += ["", f"## {heading}", ""]
        # Three in a row on a wide screen, one on a phone.
        lines += [" ".join(f'<img src="{address}" alt="{caption}" width="400">' for address, caption in found)]
        if heading == "Scaling":
            lines += ["", *_slopes(results)]
    lines += _section("States that are reset within a sequence", _resets_table(results))
    lines += _section("Whole trainings", jobs.table(trained))
    return "\n".join(lines) + "\n"


def _section(heading: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {heading}", "", *lines] if lines else []


def _slopes(results: Results) -> list[str]:
    """Time ∝ size to this power; without the ± of ``Sweep.power`` where two points leave no error."""
    found = sweeps(results)
    lines = ["Time grows as the axis to this power, with the standard error of the fit:", ""]
    lines += ["| axis | mode | cell | ours | torch.nn | the rest |", "|---|---|---|---:|---:|---|"]
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for sweep in found:
        groups.setdefault((sweep.axis, sweep.mode, sweep.cell), {})[sweep.provider] = sweep
    for (axis, mode, cell), of in groups.items():
        powers = [of[name].power if name in of else "–" for name in (OURS, "torch")]
        points = " ".join(f"{x:.0f}" for x, _ in next(iter(of.values())).points)
        fixed = next(iter(of.values())).fixed
        lines.append(f"| {axis} = {points} | {mode} | {CELLS[cell][0]} | {powers[0]} | {powers[1]} | {fixed} |")
    return lines


def _resets_table(results: Results) -> list[str]:
    lines = []
    for mode in ("training", "inference"):
        for cell, rows in _resets_cases(results, mode).items():
            ours = rows.get(OURS)
            floor = figure(ours, "floor_ms")
            others = [name for name in results["run"]["providers"] if name != OURS and figure(rows.get(name), "ms")]
            shown = [
                f"{title(name)} {format_ms(figure(rows[name], 'ms'))} ({times(ratio(rows[name], ours))}×)" for name in others
            ]
            figures = (format_ms(figure(ours, "ms")), format_ms(floor), times(figure(ours, "x_floor")))
            label = f"{CELLS[cell][0]} {mode} {case_label(next(iter(rows.values())))}"
            lines.append(f"| {label} | {' | '.join(figures)} | {', '.join(shown)} |")
    head = ["| case | ms ours | GEMM floor, ms | × floor | ms of others, one call a step (their time / ours) |"]
    return [*head, "|---|---:|---:|---:|---|", *lines] if lines else []
