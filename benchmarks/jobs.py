"""What the training jobs left behind, as a table: quality beside speed, with torch.nn and with fused_rnn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import ResultsError

Row = Mapping[str, Any]

# Job -> the pictures beside its rows, and the figure of quality to show: its key, its name, its form.
JOBS: dict[str, tuple[str, str, str]] = {
    "language_model": ("perplexity", "perplexity", ".3f"),
    "deep": ("perplexity", "perplexity", ".3f"),
    "tagger": ("accuracy", "accuracy", ".1%"),
    "classifier": ("accuracy", "accuracy", ".1%"),
    "adding": ("held_out_loss", "squared error", ".1e"),
    "sb3_ppo": ("reward", "reward", ".2f"),
}
_BASE, _OURS = "torch.nn", "fused_rnn"


def load_jobs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the rows of the jobs whose files are in a folder; of a job that was stopped early there is none.

    Raises:
        ResultsError: if a file cannot be read or is not a job's.
    """
    found = {}
    for name in JOBS:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResultsError(f"cannot read {path}: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "job" in row for row in rows):
            raise ResultsError(f"{path} is not a file of the training job {name}")
        found[name] = rows
    return found


def table(jobs: Mapping[str, Sequence[Row]]) -> list[str]:
    """The Markdown lines of a table, a line per training; one on another machine than the first of them says on which."""
    lines = [
        "| job | held out | `torch.nn` | `fused_rnn` | ms a step, `torch.nn` | `fused_rnn` | times as fast "
        "| recurrent layers alone |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    usual = _machine(next((row for rows in jobs.values() for row in rows), {}))
    for name, rows in jobs.items():
        key, words, form = JOBS[name]
        for base, ours in _pairs(rows):
            quality = (_shown(row.get(key), form) for row in (base, ours))
            steps = (_shown(_scaled(row.get("median_seconds")), ".1f") for row in (base, ours))
            alone = _ratio(base.get("rnn_seconds"), ours.get("rnn_seconds"))
            figures = (*quality, *steps, _shown(ours.get("speed_up"), ".2f", "×"), _shown(alone, ".2f", "×"))
            title, here = ours.get("title", name), _machine(ours)
            if here != usual and str(ours.get("cpu")) not in title:
                title += f"; on {here}"
            lines.append(f"| {title} | {words} | " + " | ".join(figures) + " |")
    return lines if len(lines) > 2 else []


def _machine(row: Row) -> str:
    """The processor and the threads of a training: times on another than most rows' have to say so."""
    threads = row.get("threads")
    return f"{row.get('cpu')}, {threads} thread{'' if threads == 1 else 's'}"


def _pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    by_task: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "provider" in row:
            by_task.setdefault(str(row.get("task", "")), {})[row["provider"]] = row
    # A task of fused_rnn alone is one that torch.nn cannot do.
    return [(found.get(_BASE, {}), found[_OURS]) for found in by_task.values() if _OURS in found]


def _scaled(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
