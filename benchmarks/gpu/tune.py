"""Tile sizes by measurement: every plan that fits, kernels alone, and the fastest as a row of the table that the plan reads."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import BATCH, CELLS, HIDDEN
from benchmarks.gpu.clock import Clock
from fused_rnn import cells
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.triton import heuristic, launch, plan, tuned
from fused_rnn.kernels.triton.derived import recurrence_of
from fused_rnn.kernels.triton.plan import Call

STEPS = 64
ROUNDS = 3
# Batch tiles and warps that are tried in each regime, beside what the heuristic would take.
TILES, WARPS = (16, 32), (4, 8)


def calls(dtypes: Sequence[str] = ("bfloat16", "float32")) -> list[Call]:
    """What is tuned, the sizes that are met most often first."""
    order = itertools.product(dtypes, (1, 2), CELLS, HIDDEN, BATCH, (False, True))
    return [Call(cells.CELLS[cell], b, h, n, d, getattr(torch, dtype)) for dtype, d, cell, h, n, b in order]


def candidates(call: Call, device: plan.Device) -> Iterator[dict[str, Any]]:
    """What ``plan.force`` takes, for every plan that fits, without repeating one."""
    seen = set()
    for regime, tile, warps in itertools.product(plan.REGIMES, TILES, WARPS):
        fields = {"regime": regime, "batch": tile, "warps": warps}
        try:
            with plan.force(**fields):
                made = heuristic.choose(call, device)
        except ValueError:
            continue
        key = (made.regime, made.units, made.batch, made.warps)
        if key not in seen:
            seen.add(key)
            yield fields | {"units": made.units}


def kernel_call(call: Call, where: torch.device) -> Callable[[], None]:
    """One walk of the kernels alone, with the plan that is in force when this is made."""
    cell, d, n, h = call.cell, call.directions, call.batch, call.hidden
    kernels = recurrence_of(cell)
    steps, reverse = Steps(STEPS, n), (False, True)[:d]
    rows = STEPS * n

    def buffer(columns: int) -> torch.Tensor:
        return torch.rand(rows, d, columns, device=where).to(call.dtype)

    weights = [torch.randn(cell.num_gates * h, h, device=where).div_(h**0.5).to(call.dtype) for _ in range(d)]
    packed = kernels.pack(weights, None, steps, call.backward)
    tape, states = buffer(len(cell.tape) * h), tuple(torch.zeros(d, n, h, device=where) for _ in cell.states)
    out = tape if cell.tape_is_out else buffer(h)
    if not call.backward:
        return lambda: kernels.forward(tape, out, states, states, packed, None, steps, reverse, None, True)
    d_gates, d_out = buffer(len(cell.d_gates) * h), buffer(h)
    states_0 = tuple(torch.zeros_like(state) for state in states)
    walked = (tape, out, states_0, packed, steps, 0, STEPS, reverse, None)
    return lambda: kernels.backward(d_gates, states, states, d_out, None, *walked)


def tune(where: torch.device, seconds: float, path: Path, tell: Callable[[str], None]) -> int:
    """Measure and write the table. Returns the number of rows of this device; rows of other devices are kept."""
    begin, clock, device = time.perf_counter(), Clock(where), launch.device_of(where)
    found: list[dict[str, Any]] = []
    for call in calls():
        if time.perf_counter() - begin > seconds:
            break
        times = {}
        for fields in candidates(call, device):
            with plan.force(**fields):
                walk = kernel_call(call, where)
            times[tuple(fields.items())] = statistics.median(clock.turn(walk) for _ in range(ROUNDS))
        best = dict(min(times, key=lambda key: times[key]))
        row = row_of(call, device, best)
        found.append(row)
        tell(" ".join(str(value) for value in row.values()))
    write(path, device.name, found)
    return len(found)


def row_of(call: Call, device: plan.Device, best: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    return {
        "device": device.name,
        "cell": call.cell.name,
        "backward": call.backward,
        "dtype": str(call.dtype).removeprefix("torch."),
        "hidden": call.hidden,
        "batch": call.batch,
        "directions": call.directions,
        "regime": best["regime"],
        "units": best["units"],
        "tile": best["batch"],
        "warps": best["warps"],
    }


def write(path: Path, device: str, found: Sequence[dict[str, Any]]) -> None:
    """Replace the rows of a device."""
    others = [row for row in tuned.rows(path) if row["device"] != device] if path.exists() else []
    text = ",\n".join(json.dumps(row) for row in [*others, *found])
    path.write_text(f'{{"format": {tuned.FORMAT}, "rows": [\n{text}\n]}}\n')
    tuned.rows.cache_clear()
