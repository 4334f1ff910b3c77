"""Pictures of the gradient's norm on its way back through time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.png import save_png
from benchmarks.training.gradient_curves import NAMES, Curve, Descent

# Okabe and Ito's palette, which colour-blind readers can tell apart; the lines also differ in style or are labelled.
_COLOURS = {"rnn_tanh": "#009E73", "gru": "#E69F00", "lstm": "#0072B2"}
_SHADES = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
_INK = "#333333"
# What is smaller is as good as gone; the axis ends there.
_FLOOR = 1e-30


def plot_curves(path: Path, curves: Sequence[Curve], steps: int) -> None:
    """Draw a panel per stage and length, with a line per cell.

    Args:
        path: the PNG to write.
        curves: those of stage "radius" are left out.
        steps: of training.
    """
    rows = {
        "start": "Before training",
        "clipped": f"After {steps} steps, clipped",
        "not clipped": f"After {steps} steps, not clipped",
    }
    stages = [stage for stage in rows if any(curve.stage == stage for curve in curves)]
    lengths = sorted({curve.length for curve in curves if curve.stage in rows})
    size = (2.2 + 3.6 * len(lengths), 1.6 + 2.5 * len(stages))
    figure = Figure(figsize=(max(size[0], 7.0), size[1]), layout="constrained")
    figure.suptitle("Norm of the gradient on its way back through time, adding problem", color=_INK, fontsize=13)
    panels = figure.subplots(len(stages), len(lengths), squeeze=False, sharey=True)
    seen = [norm for curve in curves if curve.stage in rows for norm in curve.norms if norm > _FLOOR and math.isfinite(norm)]
    for row, stage in zip(panels, stages, strict=True):
        for axes, length in zip(row, lengths, strict=True):
            for curve in curves:
                if (curve.stage, curve.length) == (stage, length):
                    chrono = curve.initial == "chrono"
                    name = NAMES[curve.cell] + (", chrono biases" if chrono else "")
                    _line(axes, curve, name, _COLOURS[curve.cell], "-" if chrono or curve.cell == "rnn_tanh" else (0, (4, 2)))
            _dress(axes)
            axes.set_title(f"{rows[stage]}, T = {length:,}", fontsize=10, loc="left")
            axes.set_xlim(0, length)
        row[0].set_ylabel("‖∂ loss / ∂ state after step t‖")
    for axes in panels[-1]:
        axes.set_xlabel("step t (the error enters at the right)")
    panels[0][0].set_ylim(max(_FLOOR, min(seen, default=1) / 10), max(seen, default=1) * 10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save_png(figure, path, 120)


def plot_exploding(path: Path, curves: Sequence[Curve], descents: Sequence[Descent]) -> None:
    """Draw what a larger recurrent matrix does to the gradient, and what clipping does for the training.

    Args:
        path: the PNG to write.
        curves: those of stage "radius" are drawn.
        descents: one clipped, one not, or the first of them alone.
    """
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    figure.suptitle("Exploding gradients: the recurrent matrices scaled", color=_INK, fontsize=13)
    grid = figure.add_gridspec(2, 6)
    first: Axes | None = None
    for place, (cell, name) in enumerate(NAMES.items()):
        axes = figure.add_subplot(grid[0, 2 * place : 2 * place + 2], sharey=first)
        radii = [curve for curve in curves if (curve.stage, curve.cell) == ("radius", cell)]
        for curve, colour in zip(radii, _SHADES, strict=False):
            _line(axes, curve, f"spectral radius {curve.initial}", colour, "-")
        _dress(axes)
        axes.set(xlabel="step t (the error enters at the right)")
        axes.set_title(f"{name}, before training, T = {descents[0].length:,}", fontsize=10, loc="left")
        if first is None:
            first = axes
            axes.set_ylabel("‖∂ loss / ∂ state after step t‖")
            if radii:
                axes.legend(frameon=False, fontsize=8.5)
        else:
            axes.tick_params(labelleft=False)
    norms, losses = figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3:])
    for descent in descents:
        name = f"clipped to {descent.clip:g}" if descent.clip else "not clipped"
        colour, style = ("#0072B2", "-") if descent.clip else ("#D55E00", (0, (4, 2)))
        numbers = range(1, len(descent.norms) + 1)
        norms.plot(numbers, _finite(descent.norms), color=colour, linestyle=style, linewidth=1.5, label=name)
        losses.plot(numbers, _finite(descent.losses), color=colour, linestyle=style, linewidth=1.5, label=name)
        if descent.clip:
            norms.axhline(descent.clip, color=_INK, linewidth=1, linestyle=":", label=f"clipping threshold {descent.clip:g}")
    losses.axhline(1 / 6, color=_INK, linewidth=1, linestyle=":", label="always 1: 1/6")
    title = f"RNN, plain gradient descent, spectral radius {descents[0].radius:g}, T = {descents[0].length:,}"
    for axes, label in ((norms, "‖gradient of all weights‖, before clipping"), (losses, "training loss, squared error")):
        _dress(axes)
        axes.set(xlabel="training step", ylabel=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8.5)
    save_png(figure, path, 120)


def _line(axes: Axes, curve: Curve, name: str, colour: str, style: str | tuple[int, tuple[int, ...]]) -> None:
    axes.plot(curve.steps, _finite(curve.norms), color=colour, linestyle=style, linewidth=1.8, label=name)


def _finite(values: Sequence[float]) -> list[float]:
    """What a logarithmic axis can show; the rest are gaps."""
    return [value if value > 0 and math.isfinite(value) else math.nan for value in values]


def _dress(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
