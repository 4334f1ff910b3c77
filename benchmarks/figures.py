"""The report's pictures, only from results: each as wide as a phone, so that it is read without turning or zooming."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchmarks.cases import CELLS
from benchmarks.goals import by_case, figure, ratio
from benchmarks.peers import OURS
from benchmarks.plots import COLOURS, FAINT, INK
from benchmarks.report import case_label, size, times, title
from benchmarks.scaling import Sweep, sweeps

Results = Mapping[str, Any]

# Inches: on a phone, 360 CSS pixels wide, 9 points are 11 pixels.
WIDTH = 4.0
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "fused_rnn",
}

# What a reader of a section's pictures has to know.
INTRODUCTIONS = {
    "Time per step against the floors": "The floors are what this machine could do at best, measured in the same run: the "
    "matrix products alone, as fast as one large library product (GEMM floor) or as multiply-adds in registers (FMA peak), and "
    "the inputs and results alone, read and written at memory's speed (memory bus).",
    "Scaling": "One size changes, the others stay. A straight line is a power law; its exponent and standard error are in the "
    "legend: 1 is proportional, 0 is free, and with threads −1 would be perfect.",
    "Memory": "Held for the backward: bytes that stay from the forward to the backward, results included. Peak of a call: how "
    "far resident memory rises in the first call of a case. Bars are relative to torch.nn, figures absolute.",
}

# A chart of more rows than this is not read.
MOST_ROWS = 24

# A bar that would be longer, relative to torch.nn's, is cut and has its length beside it.
LONGEST_BAR = 3.0

_SLOWER_FASTER = LinearSegmentedColormap.from_list("speed", ["#B2182B", "#FDDBC7", "#F7F7F7", "#D1E5F0", "#2166AC"])
# Providers in line and bar charts; those of the palette are the cells'.
_PROVIDERS = {OURS: "#0072B2", "torch": "#D55E00"}
_OTHERS = ("#CC79A7", "#56B4E9", "#999999", "#F0E442", "#009E73")
# The first is the longest, so that it is seen where another lies on it.
_FLOORS = {
    "gemm": ("GEMM floor", "#555555", 14),
    "fma": ("FMA peak", "#009E73", 7),
    "bandwidth": ("memory bus", "#E69F00", 10),
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: of its files.
        section: of the report.
        caption: what it shows, in one sentence.
        figure: matplotlib's.
    """

    name: str
    section: str
    caption: str
    figure: Figure


@contextmanager
def _drawing(rows: float, heading: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure that is ``rows`` text lines high, its heading above it."""
    # Without pyplot: it keeps every figure and draws for a screen.
    with rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH, 0.95 + 0.24 * rows), layout="constrained")
        axis = drawn.subplots()
        drawn.suptitle(heading, x=0.02, ha="left", fontsize=10.5, fontweight="bold")
        axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axis.tick_params(length=0)
        yield drawn, axis


def pictures(results: Results) -> list[Picture]:
    """Every picture that the results have the figures for."""
    drawers: Sequence[Callable[[Results], Iterator[Picture]]] = (_heat_maps, _floors, _scaling, _memory)
    return [picture for draw in drawers for picture in draw(results)]


# Heat maps


def _grid(cases: Sequence[Mapping[str, Mapping[str, Any]]]) -> tuple[int, dict[tuple[int, int], tuple[float, bool]]]:
    """T, and (B, H) -> (torch.nn / ours, noisy) of plain float32 cases at the T where most were measured."""
    by_length: dict[int, dict[tuple[int, int], tuple[float, bool]]] = {}
    for rows in cases:
        value = ratio(rows.get("torch"), rows.get(OURS))
        first = next(iter(rows.values()))
        shape = first["shape"]
        plain = first.get("dtype", "float32") == "float32" and len([p for p in first["case"].split("/")[4:] if p]) == 0
        if value is not None and plain and shape["I"] == shape["H"]:
            place = shape["B"], shape["H"]
            by_length.setdefault(shape["T"], {})[place] = value, bool(rows["torch"].get("noisy"))
    return max(by_length.items(), key=lambda item: len(item[1]), default=(0, {}))


def _heat_maps(results: Results) -> Iterator[Picture]:
    for mode in ("training", "inference", "streaming"):
        for cell, (class_name, _) in CELLS.items():
            T, found = _grid(by_case(results["rows"], mode, cell))
            batches, widths = sorted({B for B, _ in found}), sorted({H for _, H in found})
            if len(batches) < 2 or len(widths) < 2 or len(found) < 2 * max(len(batches), len(widths)):
                continue
            heading = f"{class_name} {mode}, T = {T}"
            with _drawing(1.1 + 1.5 * len(batches), heading) as (drawn, axis):
                cells = [[math.log2(found[B, H][0]) if (B, H) in found else math.nan for H in widths] for B in batches]
                # The same colours in every map: four times as slow to four times as fast.
                norm = TwoSlopeNorm(0.0, -2.0, 2.0)
                axis.imshow(cells, cmap=_SLOWER_FASTER, norm=norm, aspect="auto")
                for (B, H), (value, noisy) in found.items():
                    red, green, blue, _ = _SLOWER_FASTER(norm(math.log2(value)))
                    dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
                    text = times(value) + ("~" if noisy else "")
                    place = widths.index(H), batches.index(B)
                    axis.text(*place, text, ha="center", va="center", color="white" if dark else INK, fontsize=10)
                axis.set_xticks(range(len(widths)), [str(H) for H in widths])
                axis.set_yticks(range(len(batches)), [str(B) for B in batches])
                axis.set_xlabel("H")
                axis.set_ylabel("B")
                caption = f"Times as fast as torch.nn: {class_name}, {mode}, T = {T}. Blue is faster, red slower."
                yield Picture(f"heatmap-{mode}-{cell}", "Speed-up over B × H", caption, drawn)


# Time per step against the floors


def _floors(results: Results) -> Iterator[Picture]:
    for mode in ("training", "inference"):
        for cell, (class_name, _) in CELLS.items():
            cases = [
                rows for rows in by_case(results["rows"], mode, cell) if figure(rows.get(OURS), "ms") and "floors" in rows[OURS]
            ]
            if not cases:
                continue
            cases, left_out = cases[:MOST_ROWS], max(0, len(cases) - MOST_ROWS)
            with _drawing(2.2 + len(cases), f"{class_name} {mode}: time per step") as (drawn, axis):
                for y, rows in enumerate(cases):
                    T = rows[OURS]["shape"]["T"]
                    floors = {name: value * 1e3 / T for name, value in rows[OURS]["floors"].items()}
                    ours = rows[OURS]["ms"]["median"] * 1e3 / T
                    axis.plot([max(floors.values()), ours], [y, y], color=FAINT, linewidth=2, zorder=1)
                    for name, (label, colour, length) in _FLOORS.items():
                        axis.plot(floors[name], y, "|", color=colour, markersize=length, markeredgewidth=2.4, label=label)
                    for provider in (OURS, "torch"):
                        ms = figure(rows.get(provider), "ms")
                        if ms is not None:
                            axis.plot(
                                ms * 1e3 / T, y, "o", color=_PROVIDERS[provider], markersize=6, label=title(provider), zorder=3
                            )
                _rows(axis, [case_label(rows[OURS]) for rows in cases])
                axis.set_xscale("log")
                axis.set_xlabel("µs per step (logarithmic)")
                axis.grid(axis="x", color=FAINT, linewidth=0.8, zorder=0)
                _legend(drawn, axis, 3)
                caption = f"{class_name} {mode}: dots are measured, marks are floors. B×T×H on the left."
                caption += f" {left_out} more cases are in the tables." if left_out else ""
                yield Picture(f"floors-{mode}-{cell}", "Time per step against the floors", caption, drawn)


def _rows(axis: Axes, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axis.set_ylim(len(labels) - 0.4, -0.6)


def _legend(drawn: Figure, axis: Axes, columns: int, length: float = 1.4) -> None:
    """One entry per label, below the chart."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    drawn.legend(
        unique.values(), unique, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5, handlelength=length
    )


# Scaling


def _scaling(results: Results) -> Iterator[Picture]:
    groups: dict[tuple[str, str], list[Sweep]] = {}
    for sweep in sweeps(results):
        if sweep.provider in (OURS, "torch"):
            groups.setdefault((sweep.axis, sweep.mode), []).append(sweep)
    for (axis_name, mode), found in groups.items():
        with _drawing(11 + 0.9 * len(found) / 2, f"{mode.capitalize()}: time over {axis_name}") as (drawn, axis):
            # The legend fills its columns one after the other: ours, then torch.nn.
            for sweep in sorted(found, key=lambda sweep: sweep.provider != OURS):
                xs, ys = zip(*sweep.points, strict=True)
                who = "" if sweep.provider == OURS else f" {title(sweep.provider)}"
                label = f"{CELLS[sweep.cell][0]}{who} {sweep.power}"
                style = "-" if sweep.provider == OURS else "--"
                axis.plot(xs, ys, style, marker="o", markersize=3, color=COLOURS[sweep.cell], label=label)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_locator(FixedLocator(_apart({x for sweep in found for x, _ in sweep.points})))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
            low, high = axis.get_ylim()
            # Numbers without powers of ten; within a few decades, some between these powers.
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.set_xlabel(axis_name)
            axis.set_ylabel("ms")
            axis.grid(color=FAINT, linewidth=0.8)
            _legend(drawn, axis, 2, 2.4)
            rest = " / ".join(dict.fromkeys(sweep.fixed for sweep in found))
            caption = (
                f"{mode.capitalize()}, {rest}. Dashed: torch.nn. Numbers: time ∝ {axis_name} to this power, ± standard error."
            )
            yield Picture(f"scaling-{axis_name}-{mode}", "Scaling", caption, drawn)


def _apart(values: Iterable[float]) -> list[float]:
    """Those of the values whose labels do not run into one another."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value > 1.5 * kept[-1]:
            kept.append(value)
    return kept


# Memory


def _memory(results: Results) -> Iterator[Picture]:
    words = {"held_bytes": "held for the backward", "peak_bytes": "peak of a call"}
    for quantity, text in words.items():
        # A streaming step needs next to nothing.
        for mode in ("training", "inference"):
            for cell, (class_name, _) in CELLS.items():
                cases = [rows for rows in by_case(results["rows"], mode, cell) if figure(rows.get("torch"), quantity)]
                providers = [p for p in results["run"]["providers"] if any(figure(rows.get(p), quantity) for rows in cases)]
                if not cases or providers == ["torch"]:
                    continue
                cases, left_out = cases[:MOST_ROWS], max(0, len(cases) - MOST_ROWS)
                heading = f"{class_name} {mode}: {text}"
                with _drawing(2.2 + len(cases) * max(1.0, 0.6 * len(providers)), heading) as (drawn, axis):
                    _bars(axis, cases, providers, quantity)
                    _legend(drawn, axis, 3)
                    caption = f"{class_name} {mode}: memory, {text}, as a share of torch.nn's."
                    caption += f" {left_out} more cases are in the tables." if left_out else ""
                    yield Picture(f"{quantity.removesuffix('_bytes')}-{mode}-{cell}", "Memory", caption, drawn)


def _bars(axis: Axes, cases: Sequence[Mapping[str, Any]], providers: Sequence[str], quantity: str) -> None:
    height = 0.8 / len(providers)
    longest = 1.0
    for i, provider in enumerate(providers):
        colour = _PROVIDERS.get(provider, _OTHERS[i % len(_OTHERS)])
        for y, rows in enumerate(cases):
            value, reference = figure(rows.get(provider), quantity), figure(rows["torch"], quantity)
            if not value or not reference:
                continue
            share = value / reference
            longest = max(longest, share)
            place = y + (i - (len(providers) - 1) / 2) * height
            axis.barh(place, min(share, LONGEST_BAR), height * 0.9, color=colour, label=title(provider), zorder=2)
            note = size(value) + (f" ({times(share)}×)" if share > LONGEST_BAR else "")
            end = (min(share, LONGEST_BAR), place)
            axis.annotate(note, end, xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    _rows(axis, [case_label(next(iter(rows.values()))) for rows in cases])
    # Room for the figures at the ends of the bars.
    axis.set_xlim(0, min(longest, LONGEST_BAR) * 1.3)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x * 100:.0f} %"))
    axis.grid(axis="x", color=FAINT, linewidth=0.8, zorder=0)
