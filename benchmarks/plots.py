"""Pictures, only from results."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cases import CELLS
from benchmarks.goals import by_case, goal_rows, ratio
from benchmarks.peers import OURS
from benchmarks.png import save_png
from benchmarks.report import machine, summary, times
from benchmarks.results import ResultsError

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"lstm": "#0072B2", "gru": "#E69F00", "rnn": "#009E73"}
INK, FAINT = "#222222", "#d9d9d9"
_BESIDE: dict[str, Any] = {
    "xytext": (0, 2),
    "textcoords": "offset points",
    "fontsize": 7.5,
    "ha": "right",
    "va": "bottom",
    "color": "#666666",
}
_TITLES = {"training": "Training step (forward and backward)", "inference": "Inference"}


def speedups(results: Mapping[str, Any], folder: Path, name: str = "speedup") -> list[Path]:
    """Draw speed-up over torch.nn per shape and cell, training above inference.

    The axis is logarithmic and bars start at 1×: twice as fast and half as fast are equally long.

    Args:
        results: of a run with torch.nn as a peer.
        folder: where ``name``.png and ``name``.svg go.

    Returns:
        the files.

    Raises:
        ResultsError: if there is nothing to draw, or the folder cannot be written.
    """
    results = {**results, "rows": goal_rows(results)}
    modes = [mode for mode in _TITLES if any(_ratios(results, mode, cell) for cell in CELLS)]
    if not modes:
        raise ResultsError("these results hold no speed-up over torch.nn: nothing to draw")
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "svg.fonttype": "none"}):
        layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08)
        figure, axes = plt.subplots(len(modes), 1, figsize=(11, 1.4 + 3.4 * len(modes)), squeeze=False, layout=layout)
        for axis, mode in zip(axes[:, 0], modes, strict=True):
            _panel(axis, results, mode)
        figure.suptitle("How many times as fast as torch.nn", x=0.012, ha="left", fontsize=15, fontweight="bold")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, fontsize=11)
        note = "Bars: ratio of medians. Whiskers: p20 to p80 over interleaved rounds. float32. " + machine(results)
        figure.supxlabel("\n".join(textwrap.wrap(note, 170)), fontsize=8, color="#666666", x=0.012, ha="left")
        paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_png(figure, paths[0], 160)
            figure.savefig(paths[1], metadata={"Date": None})
        except OSError as error:
            raise ResultsError(f"cannot write to {folder}: {error.strerror or error}") from error
        finally:
            plt.close(figure)
    return paths


def _ratios(results: Mapping[str, Any], mode: str, cell: str) -> dict[str, tuple[float, float, float]]:
    """Shape name -> (ratio, p20, p80)."""
    found = {}
    for rows in by_case(results["rows"], mode, cell):
        value = ratio(rows.get("torch"), rows.get(OURS))
        if value is not None:
            spread = rows["torch"].get("ratio", {"p20": value, "p80": value})
            found[rows["torch"]["shape"]["name"]] = (value, spread["p20"], spread["p80"])
    return found


def _panel(axis: Axes, results: Mapping[str, Any], mode: str) -> None:
    ratios = {cell: found for cell in CELLS if (found := _ratios(results, mode, cell))}
    names = list(dict.fromkeys(name for found in ratios.values() for name in found))
    width = 0.8 / len(ratios)
    for place, (cell, found) in enumerate(ratios.items()):
        mean = summary(results, mode, cell, "torch", statistics.geometric_mean)
        offset = (place - (len(ratios) - 1) / 2) * width
        for i, name in enumerate(names):
            if name not in found:
                continue
            value, low, high = found[name]
            # In logarithms of base 2, so that a bar's length is proportional to them.
            axis.bar(i + offset, math.log2(value), width * 0.92, color=COLOURS[cell], zorder=2)
            axis.plot([i + offset] * 2, [math.log2(low), math.log2(high)], color=INK, linewidth=1, alpha=0.55, zorder=3)
            end = max(math.log2(value), math.log2(high)) if value >= 1 else min(math.log2(value), math.log2(low))
            axis.annotate(
                times(value)[:4].rstrip("."),
                (i + offset, end),
                xytext=(0, 3 if value >= 1 else -3),
                textcoords="offset points",
                ha="center",
                va="bottom" if value >= 1 else "top",
                fontsize=7.5,
            )
        label = CELLS[cell][0]
        axis.bar([0], [0], color=COLOURS[cell], label=label)
        if mean is not None and len(found) > 1:
            axis.text(
                1.0 - (len(ratios) - 1 - place) * 0.105,
                1.02,
                f"{label} {times(mean)}×",
                transform=axis.transAxes,
                ha="right",
                color=COLOURS[cell],
                fontweight="bold",
                fontsize=10,
            )
    axis.text(1.0 - len(ratios) * 0.105, 1.02, "geometric mean:", transform=axis.transAxes, ha="right", fontsize=9)
    axis.set_title(_TITLES[mode], loc="left", fontsize=11, fontweight="bold")
    axis.axhline(0, color=INK, linewidth=1.2, zorder=4)
    axis.annotate("torch.nn", (1.0, 0.0), xycoords=axis.get_yaxis_transform(), **_BESIDE)
    _scale(axis, [v for found in ratios.values() for triple in found.values() for v in triple])
    axis.set_xticks(range(len(names)), [_label(name) for name in names], fontsize=9)
    axis.set_xlim(-0.55, len(names) - 0.1)
    axis.tick_params(length=0)
    axis.grid(axis="y", color=FAINT, linewidth=0.8, zorder=0)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _scale(axis: Axes, values: list[float]) -> None:
    low, high = math.log2(min([1.0, *values])), math.log2(max([2.0, *values]))
    axis.set_ylim(low - (0.3 if low < 0 else 0.0), high + 0.3)
    ticks = [2.0**i for i in range(math.floor(low), math.ceil(high) + 1)]
    if high - low < 3:
        ticks += [1.5 * tick for tick in ticks if tick >= 1]
    axis.yaxis.set_major_locator(FixedLocator(sorted(math.log2(tick) for tick in ticks)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{2.0**place:g}×"))


def _label(name: str) -> str:
    sizes = name.split("x")
    keys = ("B", "T", "H") if len(sizes) == 3 else ("B", "T", "I", "H")
    first = f"{keys[0]} {sizes[0]}  {keys[1]} {sizes[1]}"
    return first + "\n" + "  ".join(f"{k} {v}" for k, v in zip(keys[2:], sizes[2:], strict=True))
