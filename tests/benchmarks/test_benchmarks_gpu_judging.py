"""The GPU benchmark's gate without a GPU: its bounds, and the processes that judge side by side."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import cases, gate, judging, problem, timed
from benchmarks.gpu.cases import Case

CPU = torch.device("cpu")
TINY = Case("gru", 5, 3, 4, "float32")


def test_the_gate_passes_what_is_right_and_stops_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gate.judge(TINY, CPU, None).passed
    ours = problem.ours

    def off(made: problem.Problem, backend: str | None) -> problem.Run:
        side = ours(made, backend)
        if backend == "reference":
            return side

        def wrong(training: bool) -> problem.Results:
            found = side(training)
            return found | {"d_3": found["d_3"] + 1e-3} if training else found

        return wrong

    monkeypatch.setattr(problem, "ours", off)
    verdict = gate.judge(TINY, CPU, None)
    assert (verdict.passed, verdict.worst) == (False, "d_3")

    def without_a_graph(made: problem.Problem, backend: str | None) -> problem.Run:
        side = ours(made, backend)
        if backend == "reference":
            return side
        return lambda training: side(training) if training else {"out": side(False)["out"] + 1e-3}

    monkeypatch.setattr(problem, "ours", without_a_graph)
    verdict = gate.judge(TINY, CPU, None)
    assert (verdict.passed, verdict.worst) == (False, "inference out")


def test_the_whole_gate_is_right_on_the_cpu() -> None:
    """All cells, resets and ragged lengths, in the dtypes of the grid."""
    verdicts = list(gate.every_regime(CPU, "numba", quick=False))
    assert len(verdicts) == 3 * 3 * 2
    assert all(verdict.passed for verdict in verdicts), verdicts
    assert len(list(gate.every_regime(CPU, "numba", quick=True))) == 3


def test_nan_does_not_pass_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = problem.ours

    def nan(made: problem.Problem, backend: str | None) -> problem.Run:
        side = ours(made, backend)
        return side if backend == "reference" else lambda training: side(training) | {"out": torch.full((18, 5), float("nan"))}

    monkeypatch.setattr(problem, "ours", nan)
    assert not gate.judge(TINY, CPU, None).passed


def test_cases_that_differ_in_t_are_judged_once() -> None:
    longer = dataclasses.replace(TINY, steps=9)
    assert gate.jobs([TINY, longer], "numba", quick=True) == [gate.job_of(TINY), *gate.regime_jobs("numba", quick=True)]
    assert gate.job_of(TINY).name == "gru-float32-H5-B3-T6-D1"


def test_the_gate_knows_every_regime() -> None:
    plan = pytest.importorskip("fused_rnn.kernels.triton.plan", reason="Triton is not installed")
    assert set(gate.REGIMES) == set(plan.REGIMES)
    assert {job.regime for job in gate.regime_jobs(None, quick=True)} == set(plan.REGIMES)


def test_every_regime_takes_the_problems_it_is_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a large chip, forward and backward, with TF32 and without."""
    plan = pytest.importorskip("fused_rnn.kernels.triton.plan", reason="Triton is not installed")
    from fused_rnn.kernels.triton import launch

    monkeypatch.setattr(launch, "device_of", lambda device: plan.Device("a GPU", (9, 0), 132, 227 << 10))
    for job, tf32 in itertools.product(gate.regime_jobs(None, quick=False), (False, True)):
        monkeypatch.setattr(launch, "allows_tf32", lambda tf32=tf32: tf32, raising=False)
        with plan.force(regime=job.regime):
            for training in (False, True):
                assert timed.regime(job.case, training, torch.device("cuda", 0), None) == job.regime


def ask(job: gate.Job) -> gate.Verdict:
    """What a process of the tests does: by its H it ends, hangs, fails or judges."""
    if job.case.hidden == 1:
        os._exit(3)
    if job.case.hidden == 2:
        time.sleep(600)
    if job.case.hidden == 3:
        raise AssertionError("an answer that raises ends its process")
    return gate.answer(job, CPU, "reference")


def test_processes_judge_side_by_side() -> None:
    """Every problem once, with the verdict that this process has."""
    jobs = [gate.Job(Case(cell, 5, b, gate.STEPS, "float32")) for cell in cases.CELLS for b in (1, 3)]
    found = dict(judging.run(functools.partial(gate.answer, device=CPU, backend="reference"), jobs, 2, 100.0))
    assert {job: (verdict.what, verdict.status) for job, verdict in found.items()} == {job: (job.name, "ok") for job in jobs}


def test_a_process_that_ends_or_hangs_fails_its_problem_alone() -> None:
    jobs = [gate.Job(Case("gru", h, 2, gate.STEPS, "float32")) for h in (1, 5, 2, 3, 6)]
    found = dict(judging.run(ask, jobs, 2, 100.0, limit=15.0))
    assert [found[job].status for job in jobs] == [
        "failed: its process ended with exit code 3",
        "ok",
        "failed: no verdict within 15 s",
        "failed: its process ended with exit code 1",
        "ok",
    ]


def test_judging_ends_when_its_time_is_up() -> None:
    begin = time.monotonic()
    assert list(judging.run(ask, [gate.Job(Case("gru", 2, 2, gate.STEPS, "float32"))], 1, 0.5)) == []
    assert time.monotonic() - begin < 30
    assert list(judging.run(ask, [gate.job_of(TINY)], 0, 0.0)) == []


def test_the_yardstick_of_tf32_is_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With resets too, where torch.nn has none; its floor does not grow with the sums."""
    made = problem.make(TINY, CPU)
    value = torch.ones(4, dtype=torch.float64)
    exact = gate.floor(made, value)
    eps = torch.finfo(torch.float32).eps
    # 2 H = 10, G H = 15, T B = 12
    assert exact == pytest.approx(eps * (gate.FLOOR_EPS + gate.SUM_EPS * 15**0.5))
    asked: list[str] = []
    torch_nn = problem.torch_nn
    monkeypatch.setattr(problem, "torch_nn", lambda made: asked.append(made.case.extra) or torch_nn(made))
    monkeypatch.setattr(gate, "_rounds_to_tf32", lambda made: made.input.dtype == torch.float32)
    assert gate.floor(made, value) == pytest.approx(eps * gate.FLOOR_EPS)
    for extra in cases.EXTRAS:
        assert gate.judge(dataclasses.replace(TINY, extra=extra), CPU, "numba").passed
    assert asked == ["plain", "plain", "ragged"]
    assert gate.judge(dataclasses.replace(TINY, dtype="bfloat16"), CPU, "numba").passed
    assert len(asked) == 3


def test_tf32_can_be_forbidden() -> None:
    """For good in a process, so in one of its own."""
    code = "from benchmarks.gpu import gate; print(gate.allows_tf32()); gate.forbid_tf32(); print(gate.allows_tf32())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
