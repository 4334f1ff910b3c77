"""Pictures of a race between two trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.png import save_png
from benchmarks.training.trainer import Contender, disturbed, speed_up, total_speed_up

_BASE_COLOR = "#e8a33d"
_OURS_COLOR = "#1f5fa8"
_TEXT_COLOR = "#333333"


def plot_race(
    path: Path,
    title: str,
    base: Contender,
    ours: Contender,
    levels: Mapping[str, float],
    unit: str = "nats",
    *,
    log: bool = False,
) -> None:
    """Draw loss against steps, the difference of the two curves, and loss against the wall time of each one's steps.

    Args:
        path: the PNG to write.
        title: the headline.
        base: whom to compare with; a wide line.
        ours: a narrow line on top, so that both are seen where they coincide.
        levels: name → loss, drawn as horizontal lines.
        unit: of the loss.
        log: whether the axes of the loss are logarithmic.
    """
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    figure.suptitle(title, color=_TEXT_COLOR, fontsize=12)
    grid = figure.add_gridspec(2, 2, height_ratios=(3.2, 1), width_ratios=(1, 1))
    steps = figure.add_subplot(grid[0, 0])
    difference = figure.add_subplot(grid[1, 0], sharex=steps)
    clock = figure.add_subplot(grid[:, 1])

    common = min(len(base.losses), len(ours.losses))
    window = max(1, common // 40)
    for contender, color, width, alpha in ((base, _BASE_COLOR, 6.0, 0.65), (ours, _OURS_COLOR, 1.6, 1.0)):
        smooth = moving_mean(contender.losses, window)
        numbers = range(window, window + len(smooth))
        times = list(accumulate(contender.seconds))
        steps.plot(numbers, smooth, color=color, linewidth=width, alpha=alpha, label=contender.name)
        clock.plot(times[window - 1 :], smooth, color=color, linewidth=2.2, label=contender.name)
        clock.plot(times[-1], smooth[-1], "o", color=color, markersize=7)
    gaps = [abs(a - b) for a, b in zip(base.losses, ours.losses, strict=False)]
    # Dots, because steps of equal loss have no place on a logarithmic axis.
    difference.plot(range(1, common + 1), gaps, ".", color="#777777", markersize=3)
    if any(gaps):
        difference.set_yscale("log")
        # Whole decades, so that there are numbers at the axis, and none crowd it.
        seen = [math.log10(gap) for gap in gaps if 0 < gap < math.inf]
        difference.set_ylim(10.0 ** math.floor(min(seen, default=0)), 10.0 ** (math.floor(max(seen, default=0)) + 1))
        difference.yaxis.set_minor_formatter(NullFormatter())
    difference.set(xlabel="step", ylabel="|difference|")
    smoothing = f", mean of {window} steps" if window > 1 else ""
    steps.set(title="Loss against steps", ylabel=f"training loss, {unit}{smoothing}")
    steps.tick_params(labelbottom=False)
    clock.set(
        title="Loss against wall time", xlabel="seconds spent in training steps", ylabel=f"training loss, {unit}{smoothing}"
    )
    for axes in (steps, clock):
        # Against the clock the faster curve is at the left edge all the way down: no room for names there.
        _draw_levels(axes, levels, named=axes is steps)
        axes.legend(loc="upper right", frameon=False)
    # Room for the arrow, below everything that was drawn.
    if log:
        for axes in (steps, clock):
            axes.set_yscale("log")
        low, high = clock.get_ylim()
        clock.set_ylim(low * (low / high) ** 0.12, high)
    else:
        low, high = clock.get_ylim()
        clock.set_ylim(low - 0.12 * (high - low), high)
    _mark_lead(clock, base, ours, window)
    for axes in (steps, difference, clock):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_xlim(left=0)
    save_png(figure, path, 120)


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each run of ``window`` values; shorter by window - 1."""
    sums = [0.0, *accumulate(values)]
    return [(end - start) / window for start, end in zip(sums, sums[window:], strict=False)]


def _draw_levels(axes: Axes, levels: Mapping[str, float], *, named: bool) -> None:
    """Draw each level across the axes; where ``named``, write its name beside it, at the left edge where the curves are high.

    The name of the highest one is above its line and the others' below, for two levels may lie close together.
    """
    for name, level in levels.items():
        axes.axhline(level, color=_TEXT_COLOR, linewidth=1, linestyle=(0, (2, 3)))
        if not named:
            continue
        axes.annotate(
            name,
            xy=(0.01, level),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3 if level == max(levels.values()) else -3),
            va="bottom" if level == max(levels.values()) else "top",
            textcoords="offset points",
            fontsize=8.5,
            color=_TEXT_COLOR,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.8},
        )


def _mark_lead(axes: Axes, base: Contender, ours: Contender, window: int) -> None:
    """Draw an arrow from the end of one training to the end of the other."""
    ratio, total = speed_up(base, ours), total_speed_up(base, ours)
    if ratio is None or len(base.losses) != len(ours.losses):
        return
    late, soon = sum(base.seconds), sum(ours.seconds)
    # Heights of the arrow as shares of the picture: below all curves, above the axis.
    height, in_data_and_share = 0.07, axes.get_xaxis_transform()
    for contender, color, end in ((base, _BASE_COLOR, late), (ours, _OURS_COLOR, soon)):
        last = moving_mean(contender.losses, window)[-1]
        axes.plot([end, end], [axes.get_ylim()[0], last], color=color, linewidth=1, linestyle=":")
    arrow = {"arrowstyle": "-|>", "color": _TEXT_COLOR, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (soon, height), (late, height), in_data_and_share, in_data_and_share, arrowprops=arrow)
    middle = (late + soon) / 2
    # The arrow is as long as the totals say, and they are not to be trusted where other work held up single steps.
    note = f" by the median step ({total:.2f}× in all, disturbed)" if disturbed(base, ours) else ""
    axes.text(
        middle,
        height - 0.015,
        f"{ratio:.2f}×{note}",
        transform=in_data_and_share,
        ha="center",
        va="top",
        color=_TEXT_COLOR,
        weight="bold",
    )
