"""The GPU benchmark's gate on the Triton kernels, and its tuner, whose table the plan reads; times mean nothing here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import cases, gate, tune
from fused_rnn.cells import GRU
from fused_rnn.kernels.triton import heuristic, launch, plan, tuned, walk


def test_the_plan_takes_what_the_tuner_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, path = torch.device("cpu"), tmp_path / "tuned.json"
    calls = [plan.Call(GRU, backward, 5, 3, 1, torch.float32) for backward in (False, True)]
    monkeypatch.setattr(tune, "calls", lambda: calls)
    monkeypatch.setattr(tune, "STEPS", 1)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune.Clock, "turn", lambda self, call: call() or self.once(call))
    told: list[str] = []
    run, plans = walk.Walk.run, set()
    monkeypatch.setattr(walk.Walk, "run", lambda self, *given: plans.add(self.plan.regime) or run(self, *given))
    assert tune.tune(cpu, 60.0, path, told.append) == len(told) == 2
    assert plans == {"resident", "cooperative", "streamed", "library"}
    monkeypatch.setenv(tuned.ENVIRONMENT, str(path))
    for call, row in zip(calls, tuned.rows(path), strict=True):
        made = heuristic.choose(call, launch.device_of(cpu))
        assert (made.regime, made.batch, made.warps) == (row["regime"], row["tile"], row["warps"])
        assert "fastest for H=5, N=3" in made.reason


def test_the_gate_judges_every_regime(monkeypatch: pytest.MonkeyPatch) -> None:
    run, plans = walk.Walk.run, set()
    monkeypatch.setattr(walk.Walk, "run", lambda self, *given: plans.add(self.plan.regime) or run(self, *given))
    monkeypatch.setattr(gate, "REGIMES", {"resident": (5, 3), "cooperative": (16, 3), "streamed": (20, 3), "library": (5, 3)})
    verdicts = list(gate.every_regime(torch.device("cpu"), "triton", quick=True))
    assert [verdict.what.split()[0] for verdict in verdicts] == [name for name in gate.REGIMES for _ in cases.CELLS]
    assert all(verdict.passed for verdict in verdicts), verdicts
    assert plans == set(plan.REGIMES)


def test_rows_of_other_devices_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    device = plan.Device("mine", (9, 0), 132, 227 << 10)
    call = plan.Call(GRU, False, 64, 16, 1, torch.bfloat16)
    best = {"regime": "resident", "batch": 16, "units": 64, "warps": 4}
    row = tune.row_of(call, device, best)
    tune.write(path, "other", [row | {"device": "other"}])
    tune.write(path, "mine", [row])
    tune.write(path, "mine", [row])
    assert [each["device"] for each in tuned.rows(path)] == ["other", "mine"]


def test_candidates_fit_and_differ() -> None:
    device = plan.Device("mine", (9, 0), 132, 227 << 10)
    call = plan.Call(GRU, False, 1024, 16, 1, torch.bfloat16)
    found = list(tune.candidates(call, device))
    assert {fields["regime"] for fields in found} == {"cooperative", "streamed", "library"}
    assert len({tuple(fields.items()) for fields in found}) == len(found)
