"""The picture of a deep stack's trainings: losses, and what reaches each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from benchmarks.png import save_png
from benchmarks.training.job import EARLY
from benchmarks.training.layer_norms import LayerNorms
from benchmarks.training.plots import moving_mean
from benchmarks.training.report import LAST_STEPS

# Okabe and Ito's palette, which colour-blind readers can tell apart; the marks differ too.
_STYLES = {
    "torch.nn": ("no connections, torch.nn", "#E69F00", "s", 5.0),
    "fused_rnn": ("no connections, fused_rnn", "#0072B2", "o", 1.6),
    "residual": ("residual", "#009E73", "^", 1.8),
    "highway": ("highway", "#D55E00", "D", 1.8),
    "dense": ("dense", "#CC79A7", "v", 1.8),
}
_INK = "#333333"


def plot_deep(path: Path, title: str, trainings: Sequence[tuple[str, Sequence[float], LayerNorms]]) -> None:
    """Draw the losses, and the norm of the gradient of each layer at the start and at the end.

    Args:
        path: the PNG to write.
        title: the headline.
        trainings: name, losses and norms of each; torch.nn's is a wide line below fused_rnn's.
    """
    figure = Figure(figsize=(13.5, 5.4), layout="constrained")
    figure.suptitle(title, color=_INK, fontsize=12)
    losses, first, last = figure.subplots(1, 3)
    common = min(len(values) for _, values, _ in trainings)
    window = max(1, common // 40)
    for name, values, norms in trainings:
        label, colour, mark, width = _STYLES[name]
        line = {"color": colour, "linewidth": width, "label": label, "alpha": 0.6 if width > 2 else 1.0}
        smooth = moving_mean(values, window)
        losses.plot(range(window, window + len(smooth)), smooth, **line)
        for axes, begin, end in ((first, 0, EARLY), (last, -LAST_STEPS, None)):
            means = [value if value > 0 and math.isfinite(value) else math.nan for value in norms.mean(begin, end)]
            axes.plot(range(len(means)), means, marker=mark, markersize=5, **line)
    smoothing = f", mean of {window} steps" if window > 1 else ""
    losses.set(title="Loss against steps", xlabel="step", ylabel=f"training loss, nats{smoothing}")
    losses.set_xlim(left=0)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for axes, words, steps in ((first, "first", EARLY), (last, "last", LAST_STEPS)):
        axes.set(title=f"What reaches each layer, {words} {min(steps, common)} steps", xlabel="layer (0 is next to the input)")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    first.set_ylabel("‖gradient of the layer's weights‖, before clipping")
    for axes in (losses, first, last):
        _dress(axes)
    save_png(figure, path, 120)


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
