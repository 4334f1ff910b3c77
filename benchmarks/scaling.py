"""How time grows with T, B, H and threads: sweeps found in results, and the slopes of lines fitted to their logarithms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.goals import figure

# What is swept; I goes with H where the two are equal.
AXES = ("T", "B", "H", "threads")

# Fewer points are no line; a machine of two cores has no more numbers of threads.
LEAST_POINTS = {"T": 3, "B": 3, "H": 3, "threads": 2}


@dataclass(frozen=True)
class Sweep:
    """One provider's times along one axis, all else equal.

    Attributes:
        axis: of ``AXES``.
        mode, cell, provider: whose times.
        fixed: the rest, in words.
        points: (value of the axis, ms), in the order of the axis.
    """

    axis: str
    mode: str
    cell: str
    provider: str
    fixed: str
    points: tuple[tuple[float, float], ...]

    @property
    def slope(self) -> float:
        """Time grows as the axis to this power: 1 is proportional, −1 with threads is perfect."""
        return _fit(self.points)[0]

    @property
    def error(self) -> float:
        """The standard error of ``slope``: large where the points are no line, infinite where there are two."""
        return _fit(self.points)[1]

    @property
    def power(self) -> str:
        """The slope and its error for people."""
        return f"{self.slope:.2f}" + (f" ± {self.error:.2f}" if math.isfinite(self.error) else "")


def _fit(points: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    """Slope of the least-squares line through the logarithms, and its standard error."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    n = len(points)
    mean_x, mean_y = sum(xs) / n, sum(ys) / n
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    left = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, math.sqrt(left / (n - 2) / spread) if n > 2 else math.inf


def sweeps(results: Mapping[str, Any]) -> list[Sweep]:
    """For each axis, mode, cell and provider the sweep with the most points.

    The other sizes of a sweep are the same for all providers.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[float, float]]] = {}
    for row in results["rows"]:
        ms = figure(row, "ms")
        if ms is None:
            continue
        shape = row["shape"]
        threads = row.get("threads", results["run"]["threads"])
        sizes = {"T": shape["T"], "B": shape["B"], "H": shape["H"], "threads": threads}
        width = "I = H" if shape["I"] == shape["H"] else f"I {shape['I']}"
        extra = (row.get("dtype", "float32"), *row.get("options", ()))
        for axis in AXES:
            if axis == "H" and shape["I"] != shape["H"]:
                continue
            rest = tuple((name, value) for name, value in sizes.items() if name != axis)
            group = groups.setdefault((axis, row["mode"], row["cell"], rest, width, extra), {})
            group.setdefault(row["provider"], {})[float(sizes[axis])] = ms
    best: dict[tuple[str, str, str], tuple[tuple[int, int], list[Sweep]]] = {}
    for (axis, mode, cell, rest, width, extra), providers in groups.items():
        words = [f"{name} {value}" for name, value in rest]
        fixed = ", ".join((*words, width, *(word for word in extra if word != "float32")))
        found = [
            Sweep(axis, mode, cell, provider, fixed, tuple(sorted(points.items())))
            for provider, points in providers.items()
            if len(points) >= LEAST_POINTS[axis]
        ]
        # Among equals the one with the most work.
        rank = sum(len(sweep.points) for sweep in found), math.prod(value for _, value in rest)
        if found and rank > best.get((axis, mode, cell), ((0, 0), []))[0]:
            best[axis, mode, cell] = rank, found
    order = sorted(best, key=lambda key: AXES.index(key[0]))
    return [sweep for key in order for sweep in best[key][1]]
