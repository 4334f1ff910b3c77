"""One case, timed: a row for the forward, and one for forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu import graphs, judging, peers, problem
from benchmarks.gpu.cases import Case
from benchmarks.gpu.clock import Clock, launches
from benchmarks.gpu.floors import Floors
from benchmarks.timing import quantiles
from fused_rnn.data.steps import Steps

Row = dict[str, Any]
Calls = Mapping[str, Callable[[], Any]]
MODES = ("forward", "training")

# A case whose tensors would fill more of the free memory than this is left out: both sides hold theirs at once, and so do both
# graphs.
MEMORY_SHARE = 0.15
# Those that are timed as CUDA graphs too.
GRAPHED = ("ours", "torch_nn")


class DeviceLost(Exception):
    """The device answers no more; whatever comes next would fail too."""


class Timer:
    """Times cases on a device; keeps which captures have failed."""

    def __init__(self, clock: Clock, backend: str | None, rounds: int, others: peers.Peers, floors: Floors) -> None:
        self._clock, self._backend, self._rounds = clock, backend, rounds
        self._peers, self._floors = others, floors
        self._uncaptured: dict[tuple[str | None, ...], str] = {}

    def rows(self, case: Case) -> list[Row]:
        """The rows of a case; one that fails is a row that says so.

        Raises:
            DeviceLost: if the device is of no more use; the rows are its argument.
        """
        base = base_of(case)
        if self._clock.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._clock.device)
            if case.training_bytes > MEMORY_SHARE * free:
                return [base | {"status": "left out: too large for the memory"}]
        try:
            rows = self._rows(case, base)
        except torch.cuda.OutOfMemoryError:
            rows = [base | {"status": "left out: out of memory"}]
        except Exception as error:  # One case that fails is a row; the others are still measured.
            rows = [base | {"status": f"failed: {graphs.told(error)}"}]
        graphs.clear(self._clock.device)
        if not judging.device_usable():
            raise DeviceLost(rows)
        return rows

    def _rows(self, case: Case, base: Row) -> list[Row]:
        given = problem.make(case, self._clock.device)
        sides = {"ours": problem.ours(given, self._backend)}
        peer = problem.torch_nn(given)
        if peer is not None:
            sides["torch_nn"] = peer
        others, notes = self._peers.sides(given, sides["ours"](True))
        sides |= others
        rows = []
        for mode in MODES:
            training = mode == "training"
            calls = {name: functools.partial(side, training) for name, side in sides.items()}
            row = base | {"mode": mode, "status": "ok", "regime": regime(case, training, self._clock.device, self._backend)}
            row |= self._eager(case, calls)
            if self._clock.device.type == "cuda":
                row |= self._graphs(row, {name: calls[name] for name in GRAPHED if name in calls})
            row |= self._floors.milliseconds(case, training) | notes
            rows.append(row)
        return rows

    def _eager(self, case: Case, calls: Calls) -> Row:
        found = self._clock.interleave(calls, self._rounds)
        row: Row = {}
        for name, values in found.items():
            row[f"{name}_ms"] = quantiles(values)
            row[f"{name}_peak_bytes"] = self._clock.peak(calls[name])
            row[f"{name}_host_ms"] = self._clock.host(calls[name])
        ours = row["ours_ms"]["median"]
        row["ours_us_per_step"] = 1e3 * ours / case.steps
        for name in found:
            if name != "ours":
                row[f"ratio_{name}"] = row[f"{name}_ms"]["median"] / ours
        return row

    def _graphs(self, base: Row, calls: Calls) -> Row:
        """Times of the sides as graphs, and why there are none."""
        row: Row = {}
        replays = {}
        for name, call in calls.items():
            key = (name, *(base[part] for part in ("cell", "dtype", "extra", "mode", "regime")))
            if key in self._uncaptured:
                row[f"{name}_graph"] = self._uncaptured[key]
                continue
            replay, why = graphs.tried(call, self._clock.device)
            if replay is not None:
                replays[f"{name}_graph"] = replay
            elif why is not None:
                row[f"{name}_graph"] = why
                if "OutOfMemory" not in why:
                    # Every attempt costs time and may cost memory: one of each kind will do.
                    self._uncaptured[key] = f"{why}, in {base['name']}"
        for name, values in self._clock.interleave(replays, self._rounds).items():
            row[f"{name}_ms"] = quantiles(values)
        if len(replays) == len(GRAPHED):
            row["ratio_graph_torch_nn"] = row["torch_nn_graph_ms"]["median"] / row["ours_graph_ms"]["median"]
        return row

    def count(self, case: Case, training: bool) -> int | str:
        """Launches of one eager call of ours, or why they were not counted."""
        try:
            side = problem.ours(problem.make(case, self._clock.device), self._backend)
            side(training)
            found = launches(functools.partial(side, training))
        except Exception as error:
            return f"failed: {graphs.told(error)}"
        return found or "failed: the profiler saw nothing on the device"


def base_of(case: Case) -> Row:
    """What a row says of its case, before anything is measured."""
    return {**asdict(case), "name": case.name, "mode": "training"}


def regime(case: Case, backward: bool, device: torch.device, backend: str | None) -> str | None:
    """Which regime the plan picks, on CUDA."""
    if device.type != "cuda" or backend not in (None, "triton"):
        return None
    from fused_rnn.cells import CELLS
    from fused_rnn.kernels.triton import heuristic, launch

    cell = CELLS[case.cell]
    weight = torch.empty(case.gates * case.hidden, case.hidden, dtype=getattr(torch, case.dtype), device="meta")
    call = launch.make_call(cell, weight, Steps(case.steps, case.batch), case.directions, backward, projected=False)
    return heuristic.choose(call, launch.device_of(device)).regime


def line(row: Row) -> str:
    """One row, for people."""
    head = f"{row['name']:<44} {row['mode']:<9}"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    text = f"{head} {row['regime'] or '':<12} {row['ours_ms']['median']:9.3f} ms {row['ours_us_per_step']:7.2f} µs/step"
    for name in ("torch_nn", *(peer.name for peer in peers.PEERS)):
        if f"ratio_{name}" in row:
            text += f"   {name} {row[f'{name}_ms']['median']:9.3f} ms ({row[f'ratio_{name}']:.2f}×)"
        elif name in row:
            text += f"   {name} {row[name]}"
    for name in GRAPHED:
        if f"{name}_graph_ms" in row:
            text += f"   {name} as a graph {row[f'{name}_graph_ms']['median']:9.3f} ms"
        elif f"{name}_graph" in row:
            text += f"   {name} as a graph {row[f'{name}_graph']}"
    if "ratio_graph_torch_nn" in row:
        text += f" ({row['ratio_graph_torch_nn']:.2f}×)"
    return text
