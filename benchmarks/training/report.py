"""What a training job leaves behind: a table for the terminal and JSON rows."""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.results import cpu_model

# Single steps are noisy: the training loss is the mean of the last ones.
_LAST_STEPS = 50


@dataclass
class Row:
    """What is known of one provider; None is what was not measured, because it does not apply or the job was stopped.

    Attributes:
        provider: torch.nn, fused_rnn, or the yardstick.
        seconds: wall time of every training step.
        losses: training loss of every step, nats per character.
        characters_per_step: of training text.
        speed_up: median step time of torch.nn over this one's.
        total_speed_up: time of all steps of torch.nn over this one's.
        rnn_seconds: of one step, spent in the recurrent layers.
        other_seconds: of one step, spent elsewhere (embedding, linear, loss, clipping, Adam).
        held_out_loss: nats per character.
        sampling_rate: characters generated per second, one step each.
    """

    provider: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    characters_per_step: int = 0
    speed_up: float | None = None
    total_speed_up: float | None = None
    rnn_seconds: float | None = None
    other_seconds: float | None = None
    held_out_loss: float | None = None
    sampling_rate: float | None = None

    @property
    def rate(self) -> float | None:
        """Characters per second of training."""
        return len(self.seconds) * self.characters_per_step / sum(self.seconds) if self.seconds else None

    @property
    def median_seconds(self) -> float | None:
        """The median training step."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def training_loss(self) -> float | None:
        """Mean training loss of the last steps."""
        last = self.losses[-_LAST_STEPS:]
        return sum(last) / len(last) if last else None

    @property
    def perplexity(self) -> float | None:
        """Held-out perplexity, per character."""
        # A diverged model's loss has an infinite exponential, which is no reason to lose the table.
        return None if self.held_out_loss is None else math.exp(min(self.held_out_loss, 700.0))


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print the rows as columns, one line per figure."""
    lines: list[tuple[str, list[str]]] = [
        ("training steps", [f"{len(row.losses):,}" if row.losses else "–" for row in rows]),
        ("time in training steps, s", [_number(sum(row.seconds) or None, ".1f") for row in rows]),
        ("characters per second", [_number(row.rate, ",.0f") for row in rows]),
        ("median step, ms", [_milliseconds(row.median_seconds) for row in rows]),
        ("speed-up, median step", [_number(row.speed_up, ".2f", "×") for row in rows]),
        ("speed-up, total time", [_number(row.total_speed_up, ".2f", "×") for row in rows]),
        ("of one step, ms: recurrent layers", [_milliseconds(row.rnn_seconds) for row in rows]),
        ("of one step, ms: everything else", [_milliseconds(row.other_seconds) for row in rows]),
        (f"training loss, last {_LAST_STEPS} steps", [_number(row.training_loss, ".4f") for row in rows]),
        ("held-out loss", [_number(row.held_out_loss, ".4f") for row in rows]),
        ("held-out perplexity", [_number(row.perplexity, ".3f") for row in rows]),
        ("characters per second, sampling", [_number(row.sampling_rate, ",.0f") for row in rows]),
    ]
    table = Table()
    table.add_column("")
    for row in rows:
        table.add_column(row.provider, justify="right")
    for name, cells in lines:
        if any(cell != "–" for cell in cells):
            table.add_row(name, *cells)
    console = Console(file=sys.stdout, highlight=False)
    # Into a pipe or a file, a narrow default would cut the figures.
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=100)
    console.print(title, style="bold")
    console.print(table)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _milliseconds(seconds: float | None) -> str:
    return _number(None if seconds is None else seconds * 1e3, ".1f")


def write_json(path: Path, rows: Sequence[Row], common: dict[str, Any]) -> None:
    """Write one JSON object per row, each with the derived figures and everything in ``common``."""
    written = [
        {
            **asdict(row),
            "characters_per_second": row.rate,
            "median_seconds": row.median_seconds,
            "training_loss": row.training_loss,
            "perplexity": row.perplexity,
            **common,
        }
        for row in rows
    ]
    # NaN is no JSON: a diverged loss is written as null.
    path.write_text(json.dumps(_finite(written), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Device, threads, versions and date."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        versions["fused_rnn"] = metadata.version("fused_rnn")
    except metadata.PackageNotFoundError:
        versions["fused_rnn"] = "not installed (run from its source)"
    return {
        "device": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
