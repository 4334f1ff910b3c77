"""What a training job leaves behind: a table for the terminal and JSON rows."""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.results import commit, cores, cpu_model
from benchmarks.training.trainer import Contender, speed_up, total_speed_up

# Single steps are noisy: the training loss is the mean of the last ones.
LAST_STEPS = 50


@dataclass(frozen=True)
class Measure:
    """A figure of a job's quality.

    Attributes:
        key: its name in ``Row.measures`` and in the JSON.
        label: its line in the table.
        form: how it is written, a format specification.
        agrees: how far apart the two trainings' figures may be for the job to call them the same; None: not compared.
    """

    key: str
    label: str
    form: str = ".4f"
    agrees: float | None = None


@dataclass
class Row:
    """What is known of one provider; None is what was not measured, because it does not apply or the job was stopped.

    Attributes:
        provider: torch.nn, fused_rnn, or the yardstick.
        seconds: wall time of every training step.
        losses: training loss of every step.
        items_per_step: how many items a training step sees.
        speed_up: median step time of torch.nn over this one's.
        total_speed_up: time of all steps of torch.nn over this one's.
        rnn_seconds: of the median step, spent in the recurrent layers.
        other_seconds: of the median step, spent elsewhere (embedding, linear, loss, clipping, Adam).
        measures: the figures of quality, by key.
        items: what is counted, in the plural.
    """

    provider: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    items_per_step: int = 0
    speed_up: float | None = None
    total_speed_up: float | None = None
    rnn_seconds: float | None = None
    other_seconds: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    items: str = "characters"

    @property
    def rate(self) -> float | None:
        """Items per second of training."""
        return len(self.seconds) * self.items_per_step / sum(self.seconds) if self.seconds else None

    @property
    def median_seconds(self) -> float | None:
        """The median training step."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def training_loss(self) -> float | None:
        """Mean training loss of the last steps."""
        last = self.losses[-LAST_STEPS:]
        return sum(last) / len(last) if last else None


def contender_row(contender: Contender, base: Contender, items_per_step: int, items: str = "characters") -> Row:
    """Say what a training took; its quality is filled in later."""
    row = Row(
        contender.name,
        contender.seconds,
        contender.losses,
        items_per_step,
        speed_up(base, contender),
        total_speed_up(base, contender),
        items=items,
    )
    if row.median_seconds is not None:
        row.rnn_seconds = statistics.median(contender.rnn_seconds)
        # A difference, so that the two parts add up to the median step in the table.
        row.other_seconds = row.median_seconds - row.rnn_seconds
    return row


def print_table(rows: Sequence[Row], title: str, measures: Sequence[Measure] = ()) -> None:
    """Print the rows as columns, one line per figure; a figure that no row has is left out."""
    items = rows[0].items
    lines: list[tuple[str, list[str]]] = [
        ("training steps", [f"{len(row.losses):,}" if row.losses else "–" for row in rows]),
        ("time in training steps, s", [_number(sum(row.seconds) or None, ".1f") for row in rows]),
        (f"{items} per second", [_number(row.rate, ",.0f") for row in rows]),
        ("median step, ms", [_milliseconds(row.median_seconds) for row in rows]),
        ("  in the recurrent layers", [_milliseconds(row.rnn_seconds) for row in rows]),
        ("  everything else", [_milliseconds(row.other_seconds) for row in rows]),
        ("speed-up, median step", [_number(row.speed_up, ".2f", "×") for row in rows]),
        ("speed-up, total time", [_number(row.total_speed_up, ".2f", "×") for row in rows]),
        (f"training loss, last {LAST_STEPS} steps", [_number(row.training_loss, ".4f") for row in rows]),
        *((measure.label, [_number(row.measures.get(measure.key), measure.form) for row in rows]) for measure in measures),
    ]
    table = Table()
    table.add_column("")
    for row in rows:
        table.add_column(row.provider, justify="right")
    for name, cells in lines:
        if any(cell != "–" for cell in cells):
            table.add_row(name, *cells)
    print_wide(title, style="bold")
    print_wide(table)


def print_wide(what: Any, style: str | None = None) -> None:
    """Print something of rich's to standard output."""
    console = Console(file=sys.stdout, highlight=False)
    # Into a pipe or a file, a narrow default would cut the figures.
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=100)
    console.print(what, style=style)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _milliseconds(seconds: float | None) -> str:
    return _number(None if seconds is None else seconds * 1e3, ".1f")


def json_rows(rows: Sequence[Row], measures: Sequence[Measure], common: dict[str, Any]) -> list[dict[str, Any]]:
    """Make one JSON object per row, each with the derived figures and everything in ``common``."""
    made = []
    for row in rows:
        known = asdict(row)
        figures = known.pop("measures")
        made.append(
            {
                **known,
                f"{row.items}_per_second": row.rate,
                "median_seconds": row.median_seconds,
                "training_loss": row.training_loss,
                **{measure.key: figures.get(measure.key) for measure in measures},
                **common,
            }
        )
    return made


def environment() -> dict[str, Any]:
    """Device, CPU, instruction set, threads, versions, commit and date."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        versions["fused_rnn"] = metadata.version("fused_rnn")
    except metadata.PackageNotFoundError:
        versions["fused_rnn"] = "not installed (run from its source)"
    return {
        "device": "cpu",
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
