"""What is to be reached on two cores, as data, and the judgement of a results file against it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import CELLS, SHAPES
from benchmarks.memory import HELD_NOISE, PEAK_NOISE

Row = Mapping[str, Any]

_STATISTICS: dict[str, Callable[[list[float]], float]] = {"geomean": statistics.geometric_mean, "min": min, "max": max}


@dataclass(frozen=True)
class Goal:
    """One bound on one figure.

    Attributes:
        text: what the figure is, in words.
        mode, cells: the rows it speaks of; one verdict per cell.
        quantity: ``"ms"`` or ``"held_bytes"`` (of ``over`` divided by that of ``under``), ``"x_floor"`` (of ``over``),
            or ``"growth_bytes"`` (of ``over``).
        over, under: providers.
        statistic: how the rows become one number.
        bound: the least or, where not ``at_least``, the greatest value.
        slack: what the instrument itself errs by, taken from the figure of ``over``.
    min_B, max_B, min_H: the shapes it speaks of.
        optional: says nothing where ``over`` was not asked for, or no case with the ``options`` was measured.
        options: of the cases it speaks of.
    """

    text: str
    mode: str
    cells: tuple[str, ...]
    quantity: str
    over: str
    under: str | None
    statistic: str
    bound: float
    at_least: bool = True
    slack: float = 0.0
    min_B: int = 1
    min_H: int = 1
    max_B: int | None = None
    optional: bool = False
    options: tuple[str, ...] = ()

    def speaks_of(self, B: int, H: int) -> bool:
        """Whether a shape is one of those."""
        return self.min_B <= B <= (self.max_B or B) and self.min_H <= H


_ALL = tuple(CELLS)
# The cells that torch.nn runs step by step, without oneDNN.
_ATEN = ("gru", "rnn")


def _speed_up(mode: str, cell: str, bound: float) -> Goal:
    return Goal("torch.nn / ours, geometric mean", mode, (cell,), "ms", "torch", "ours", "geomean", bound)


def _against_loop(mode: str) -> Goal:
    text = "torch.nn step by step / ours with resets"
    return Goal(text, mode, ("lstm", "gru"), "ms", "torch", "ours", "min", 10.0, optional=True, options=("resets=32",))


def _against_torch_int8(mode: str) -> Goal:
    text = "torch int8 / int8, slowest shape"
    return Goal(text, mode, ("lstm", "gru"), "ms", "torch-int8", "int8", "min", 1.0, optional=True)


GOALS = (
    _speed_up("training", "lstm", 1.5),
    _speed_up("training", "gru", 3.0),
    _speed_up("training", "rnn", 2.5),
    Goal("torch.nn / ours, slowest shape", "training", _ALL, "ms", "torch", "ours", "min", 1.05),
    Goal("× GEMM floor, worst (B ≥ 16, H ≥ 256)", "training", _ALL, "x_floor", "ours", None, "max", 1.15, False, 0.0, 16, 256),
    Goal("bytes held, ours / torch.nn, worst", "training", _ALL, "held_bytes", "ours", "torch", "max", 1.0, False, HELD_NOISE),
    _speed_up("inference", "lstm", 1.2),
    _speed_up("inference", "gru", 2.5),
    _speed_up("inference", "rnn", 1.5),
    Goal("ONNX Runtime / ours, slowest shape", "inference", ("lstm", "gru"), "ms", "onnxruntime", "ours", "min", 1.0),
    Goal("memory growth from T to 4T, bytes", "growth", _ALL, "growth_bytes", "ours", None, "max", float(PEAK_NOISE), False),
    Goal("torch.nn / ours, one step", "streaming", _ALL, "ms", "torch", "ours", "min", 2.0),
    _against_loop("training"),
    _against_loop("inference"),
    _against_torch_int8("inference"),
    _against_torch_int8("streaming"),
    Goal(
        "ours / int8, slowest (B = 1, H ≥ 512)",
        "inference",
        _ALL,
        "ms",
        "ours",
        "int8",
        "min",
        2.0,
        max_B=1,
        min_H=512,
        optional=True,
    ),
    Goal("torch.nn / numba, geometric mean", "training", _ATEN, "ms", "torch", "numba", "geomean", 1.0, optional=True),
    Goal("torch.nn / numba, geometric mean", "inference", _ATEN, "ms", "torch", "numba", "geomean", 1.0, optional=True),
    Goal("numba / ours, geometric mean", "training", _ALL, "ms", "numba", "ours", "geomean", 2.0, False, optional=True),
    Goal("numba / ours, geometric mean", "inference", _ALL, "ms", "numba", "ours", "geomean", 2.0, False, optional=True),
)


def evaluate(results: Mapping[str, Any], goals: Iterable[Goal] = GOALS) -> list[dict[str, Any]]:
    """Judge results.

    Returns:
        a row per goal and cell: ``goal``, ``mode``, ``cell``, ``bound``, ``at_least``, ``value`` (None where nothing was
        measured), the ``count`` of rows that it comes from, ``of`` how many, ``noisy`` if the spread of one of them is wide,
        and ``verdict``: "pass", "fail", "part" (holds, but not all shapes were measured) or "not measured". A provider with
        a red gate fails its goals.
    """
    verdicts = []
    for goal in goals:
        asked_for = {"ours", "torch", *results["run"]["providers"]}
        if goal.optional and not {goal.over, goal.under or goal.over} <= asked_for:
            continue
        if goal.options and not goal_rows(results, goal.options):
            continue
        for cell in goal.cells:
            verdicts.append(_judge(goal, cell, results))
    return verdicts


def _judge(goal: Goal, cell: str, results: Mapping[str, Any]) -> dict[str, Any]:
    values, wrong, noisy = _values(goal, cell, results)
    shapes = [s for s in SHAPES if goal.mode in s.modes and goal.speaks_of(s.B, s.H)]
    total = 1 if goal.mode == "growth" or goal.options else len(shapes)
    value = _STATISTICS[goal.statistic](values) if values else None
    if wrong:
        verdict = "fail"
    elif value is None:
        verdict = "not measured"
    elif value < goal.bound if goal.at_least else value > goal.bound:
        verdict = "fail"
    else:
        verdict = "pass" if len(values) >= total else "part"
    return {
        "goal": goal.text + (" (a red gate)" if wrong else ""),
        "mode": goal.mode,
        "cell": cell,
        "bound": goal.bound,
        "at_least": goal.at_least,
        "value": value,
        "noisy": noisy,
        "count": len(values),
        "of": total,
        "verdict": verdict,
    }


def _values(goal: Goal, cell: str, results: Mapping[str, Any]) -> tuple[list[float], bool, bool]:
    if goal.mode == "growth":
        rows = [r for r in results["growth"] if r["cell"] == cell and r["provider"] == goal.over and r["status"] == "ok"]
        return [float(r["growth_bytes"]) for r in rows], False, False
    values = []
    wrong = noisy = False
    for rows_of_case in by_case(goal_rows(results, goal.options), goal.mode, cell):
        over, under = rows_of_case.get(goal.over), rows_of_case.get(goal.under or goal.over)
        shape = next(iter(rows_of_case.values()))["shape"]
        if over is None or under is None or not goal.speaks_of(shape["B"], shape["H"]):
            continue
        wrong |= "wrong" in (over["status"], under["status"])
        top, bottom = figure(over, goal.quantity), figure(under, goal.quantity)
        if top is None or bottom is None:
            continue
        noisy |= goal.quantity == "ms" and any(row.get("noisy", False) for row in (over, under))
        if goal.under is None:
            values.append(top - goal.slack)
        elif bottom > 0:
            values.append((top - goal.slack) / bottom)
    return [v for v in values if math.isfinite(v)], wrong, noisy


def figure(row: Row | None, quantity: str) -> float | None:
    """A figure of a results row (median for ``"ms"``), or None where the row has none or failed its gate."""
    if row is None or row["status"] != "ok" or row.get(quantity) is None:
        return None
    return float(row["ms"]["median"] if quantity == "ms" else row[quantity])


def ratio(over: Row | None, under: Row | None, quantity: str = "ms") -> float | None:
    """``over / under``, or None where either is missing or wrong."""
    top, bottom = figure(over, quantity), figure(under, quantity)
    return top / bottom if top is not None and bottom else None


def goal_rows(results: Mapping[str, Any], options: Sequence[str] = ()) -> list[Row]:
    """The rows that goals speak of, whatever else was measured: float32, the run's threads, with exactly these options.

    Without options, only the shapes of the goals.
    """
    names = {shape.name for shape in SHAPES}
    threads = results["run"]["threads"]
    return [
        row
        for row in results["rows"]
        if (options or row["shape"]["name"] in names)
        and row.get("dtype", "float32") == "float32"
        and tuple(row.get("options", ())) == tuple(options)
        and row.get("threads", threads) == threads
    ]


def by_case(rows: Sequence[Row], mode: str, cell: str) -> list[dict[str, Row]]:
    """The rows of each case by provider, cases in the order of the file."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["mode"] == mode and row["cell"] == cell:
            cases.setdefault(row["case"], {})[row["provider"]] = row
    return list(cases.values())
