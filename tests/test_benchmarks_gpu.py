"""The GPU benchmark without a GPU: the cases, the gate, the clock's turns, the rows and the table, on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.gpu import cases, command, floors, gate, graphs, judging, problem, report, run, timed
from benchmarks.gpu.cases import Case, select
from benchmarks.gpu.clock import Clock

CPU = torch.device("cpu")
TINY = Case("gru", 5, 3, 4, "float32")


def test_the_grid_is_the_stated_one() -> None:
    """Every size, cell, dtype and number of directions, plain; resets and ragged lengths; nothing twice."""
    every = select(quick=False)
    assert len(every) == len(set(every))
    plain = {case for case in every if case.extra == "plain"}
    # One of the goals has a B of its own.
    assert len(plain) == 7 * 5 * 2 * 3 * 3 * 2 + 1
    assert {case.hidden for case in plain} == {64, 128, 256, 512, 768, 1024, 1536}
    assert {case.batch for case in plain} == {1, 16, 32, 64, 256, 1024}
    assert {case.steps for case in plain} == {128, 1024}
    for extra in ("reset", "ragged"):
        assert {(case.cell, case.directions, case.steps) for case in every if case.extra == extra} >= {
            (cell, d, t) for cell in cases.CELLS for d in (1, 2) for t in (128, 1024)
        }
    quick = select(quick=True)
    assert {case.extra for case in quick} == set(cases.EXTRAS)
    assert len(quick) < 30


def test_the_first_cases_say_most() -> None:
    """The goals first; a run that ends soon after has met every cell, dtype, size and extra."""
    every = select(quick=False)
    goals = cases.goals()
    assert every[: len(goals)] == goals
    assert Case("lstm", 768, 16, 1024, "float32") in goals
    first = every[: len(goals) + 150]
    for field in ("cell", "hidden", "batch", "dtype", "directions", "extra"):
        assert {getattr(case, field) for case in first} == {getattr(case, field) for case in every}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names what is missing, and exit code 2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        main(["gpu"])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("python -m benchmarks gpu: nothing to measure: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--seconds", "-1"], ["--seconds", "0"], ["--seconds", "inf"], ["--fast"]])
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gpu", *arguments])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert arguments[0] in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("extra", cases.EXTRAS)
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("directions", [1, 2])
def test_all_sides_compute_the_same(cell: str, extra: str, directions: int) -> None:
    """Ours, the reference and torch.nn: outputs, states and gradients of the same problem."""
    made = problem.make(Case(cell, 5, 3, 4, "float32", directions, extra), CPU)
    ours = problem.ours(made, None)(True)
    for other in (problem.ours(made, "reference"), problem.torch_nn(made)):
        if other is None:
            assert extra == "reset"
            continue
        theirs = other(True)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


def test_resets_and_ragged_rows_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "RESET_SHARE", 0.5)
    reset = problem.make(Case("gru", 5, 3, 40, "float32", 1, "reset"), CPU).reset
    assert reset is not None
    assert 0 < reset.sum() < len(reset)
    ragged = problem.make(Case("gru", 5, 3, 40, "float32", 1, "ragged"), CPU).steps.batch_sizes
    assert ragged is not None
    assert ragged[0] == 3
    assert ragged[-1] == 1


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


def measured(path: Path, **options: object) -> dict[str, object]:
    told: list[str] = []
    given = run.Options(CPU, rounds=1, quick=True, **options)
    tiny = [TINY, Case("lstm", 5, 3, 4, "float32", 2, "ragged"), Case("gru", 5, 3, 4, "float32", 1, "reset")]
    results = run.measure(given, tiny, told.append, lambda rows: path.write_text(json.dumps(rows)))
    assert len(told) == 1 + len(results["rows"])
    return results


def test_a_run_measures_every_case_and_keeps_its_rows(tmp_path: Path) -> None:
    """Forward and training of each case, with times, ratios and floors; what is kept is what is returned."""
    path = tmp_path / "rows.json"
    results = measured(path)
    assert json.loads(path.read_text()) == results
    assert results["run"]["complete"]
    assert [(row["name"].split("-")[0], row["mode"]) for row in results["rows"]] == [
        (cell, mode) for cell in ("gru", "lstm", "gru") for mode in ("forward", "training")
    ]
    for row in results["rows"]:
        assert row["status"] == "ok"
        assert row["ours_ms"]["median"] > 0
        assert row["floor_bytes_ms"] > 0
        assert row["floor_flops_ms"] > 0
        assert ("ratio_torch_nn" in row) == (row["extra"] != "reset")
    assert command.exit_code(results) == 0


def test_a_run_ends_when_its_time_is_up(tmp_path: Path) -> None:
    """No case is begun afterwards, and the rows say that some are missing."""
    results = measured(tmp_path / "rows.json", seconds=-1.0)
    assert results["rows"] == results["gate"] == []
    assert (results["run"]["left_out"], results["run"]["complete"]) == (3, False)


def no_regimes(backend: str | None, quick: bool) -> list[gate.Job]:
    return []


def test_right_cases_are_timed_beside_a_red_regime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict is kept and decides the exit code; rows of that regime say so."""
    job = gate.Job(Case("gru", 5, 3, gate.STEPS, "float32", 2, "reset"), "resident")
    red = gate.Verdict(job.name, False, "out", 1.0, 0.1)
    answer = gate.answer
    monkeypatch.setattr(gate, "regime_jobs", lambda backend, quick: [job])
    monkeypatch.setattr(gate, "answer", lambda given, **how: red if given == job else answer(given, **how))
    monkeypatch.setattr(timed, "regime", lambda case, training, device, backend: "resident" if training else "library")
    told: list[str] = []
    results = run.measure(run.Options(CPU, rounds=1), [TINY], told.append)
    assert told[0] == f"{job.name}: wrong: out: error 1.0e+00, allowed 1.0e-01"
    assert told[1] == "gate: 1 of 2 right"
    assert [row["status"] for row in results["rows"]] == ["ok", "ok"]
    assert [row.get("regime_gate") for row in results["rows"]] == [None, f"red: {job.name}"]
    assert command.exit_code(results) == 1


def test_a_case_that_is_wrong_or_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others are timed."""
    monkeypatch.setattr(gate, "regime_jobs", no_regimes)
    judge, other = gate.judge, Case("lstm", 5, 3, 4, "float32")

    def wrong(case: Case, device: torch.device, backend: str | None) -> gate.Verdict:
        return gate.Verdict(case.name, False, "out", 1.0, 0.1) if case.cell == "gru" else judge(case, device, backend)

    monkeypatch.setattr(gate, "judge", wrong)
    results = run.measure(run.Options(CPU, rounds=1), [TINY, other], lambda text: None)
    assert [row["status"] for row in results["rows"]] == ["wrong: out: error 1.0e+00, allowed 1.0e-01", "ok", "ok"]
    assert [verdict["passed"] for verdict in results["gate"]] == [False, True]
    assert command.exit_code(results) == 1

    def fails(case: Case, device: torch.device, backend: str | None) -> gate.Verdict:
        raise ValueError("no such plan")

    monkeypatch.setattr(gate, "judge", fails)
    results = run.measure(run.Options(CPU), [TINY], lambda text: None)
    assert [row["status"] for row in results["rows"]] == ["failed: ValueError: no such plan"]
    assert command.exit_code(results) == 1


def test_cases_that_differ_in_t_are_judged_once() -> None:
    longer = dataclasses.replace(TINY, steps=9)
    assert gate.jobs([TINY, longer], "numba", quick=True) == [gate.job_of(TINY), *gate.regime_jobs("numba", quick=True)]
    assert gate.job_of(TINY).name == "gru-float32-H5-B3-T6-D1"


def test_the_gate_knows_every_regime() -> None:
    plan = pytest.importorskip("fused_rnn.kernels.triton.plan", reason="Triton is not installed")
    assert set(gate.REGIMES) == set(plan.REGIMES)
    assert {job.regime for job in gate.regime_jobs(None, quick=True)} == set(plan.REGIMES)


def test_a_row_names_the_regime_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pytest.importorskip("fused_rnn.kernels.triton.plan", reason="Triton is not installed")
    from fused_rnn.kernels.triton import launch

    monkeypatch.setattr(launch, "device_of", lambda device: plan.Device("a GPU", (9, 0), 132, 227 << 10))
    cuda = torch.device("cuda", 0)
    for case in (*cases.goals(), *select(quick=True)):
        assert timed.regime(case, True, cuda, None) in plan.REGIMES
    assert timed.regime(TINY, True, cuda, "reference") is None
    assert timed.regime(TINY, True, CPU, None) is None


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
    assert found == {job: gate.answer(job, CPU, "reference") for job in jobs}
    assert all(verdict.passed for verdict in found.values())


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


def test_cases_without_a_verdict_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "run", lambda *given: iter([]))
    told: list[str] = []
    results = run.measure(run.Options(CPU), [TINY], told.append)
    assert (results["rows"], results["run"]["left_out"], results["run"]["complete"]) == ([], 1, False)
    assert told[0].startswith("gate: 0 of 0 right; no time for ")


def test_every_side_begins_a_round() -> None:
    """Whoever always followed the same neighbour would inherit the caches that it leaves."""
    clock, order = Clock(CPU), []
    clock.turn = lambda call: order.append(call()) or 1.0  # type: ignore[method-assign]
    found = clock.interleave({name: lambda name=name: name for name in "ab"}, rounds=2)
    assert order == ["a", "b", "b", "a"]
    assert found == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_floors_count_what_must_be_done() -> None:
    """By hand: one direction, H = 2, G = 3, B = 5, T = 7, two bytes a number."""
    case = Case("gru", 2, 5, 7, "bfloat16")
    moved, operations = floors.work(case, training=False)
    rows, weights = 35, 3 * 2 * 4 * 2
    assert operations == 2 * rows * 3 * 2 * 4
    assert moved == rows * 2 * 2 + rows * (2 * 6 + 2) * 2 + weights
    more, three_times = floors.work(case, training=True)
    assert three_times == 3 * operations
    assert more > 2 * moved


def test_the_table_is_made_of_the_rows(tmp_path: Path) -> None:
    results = measured(tmp_path / "rows.json")
    for row, ratio in zip(results["rows"], (2.0, 8.0, 1.0, 4.0), strict=False):
        row["ratio_torch_nn"] = ratio
    results["run"]["barrier_us"] = {"8": 1.25}
    out = io.StringIO()
    Console(file=out, width=150).print(report.table(results))
    text = out.getvalue()
    assert "2.00×" in text
    assert "8.00×" in text
    # √(8 · 4)
    assert "5.66×" in text
    out = io.StringIO()
    results["run"]["left_out"] = 3
    report.show(results, Console(file=out, width=150))
    assert "one barrier: 8 programs 1.25 µs" in out.getvalue()
    assert "3 cases were left out" in out.getvalue()


def test_torchrl_is_asked_for_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem.importlib.util, "find_spec", lambda name: None)
    assert problem.torchrl_missing() == "torchrl is not installed"


@pytest.fixture
def _cuda_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmark asks of torch.cuda, answered without one, by names and signatures that torch has."""

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, name="a GPU", major=9, minor=0)
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "Event": Event,
        "memory_allocated": lambda device: 5,
        "max_memory_allocated": lambda device: 12,
        "reset_peak_memory_stats": lambda device: None,
        "mem_get_info": lambda device: (70 << 30, 80 << 30),
        "get_device_name": lambda device: "a GPU",
        "get_device_properties": lambda device: properties,
        "device": lambda device: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    # The numbers stay on the CPU, whatever they are asked for.
    make, judge = problem.make, gate.judge
    monkeypatch.setattr(problem, "make", lambda case, device, steps=None: make(case, CPU, steps))
    monkeypatch.setattr(gate, "judge", lambda case, device, backend: judge(case, CPU, "numba"))
    ours = problem.ours
    monkeypatch.setattr(problem, "ours", lambda made, backend: ours(made, backend or "numba"))
    monkeypatch.setattr(run, "Floors", lambda clock: floors.Floors(Clock(CPU), 8, 64))
    monkeypatch.setattr(run, "barrier_microseconds", lambda clock, programs: programs / 100)
    monkeypatch.setattr(timed, "regime", lambda case, backward, device, backend: "resident")
    monkeypatch.setattr(gate, "REGIMES", {"resident": (5, 3)})
    monkeypatch.setattr(gate, "_force", lambda regime: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "capture", lambda call, device: lambda: call() and None)
    monkeypatch.setattr(timed, "launches", lambda call: len(call()))


@pytest.mark.usefixtures("_cuda_in_name")
def test_the_command_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the arguments to the file and the table, with all that is asked of CUDA on the way."""
    from fused_rnn.kernels import triton as backend

    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(cases, "select", lambda quick: [TINY, Case("lstm", 5, 3, 4, "float32", 2, "ragged")])
    path = tmp_path / "rows.json"
    assert main(["gpu", "--quick", "--workers", "0", "--json", str(path)]) == 0
    kept = json.loads(path.read_text())
    assert kept["run"]["device"] == "a GPU"
    assert (kept["run"]["processors"], kept["run"]["cudnn"]) == (132, 91000)
    assert kept["run"]["barrier_us"] == {"8": 0.08, "32": 0.32, "64": 0.64, "132": 1.32}
    assert [row["status"] for row in kept["rows"]] == ["ok"] * 4
    for row in kept["rows"]:
        assert row["ours_peak_bytes"] == 7
        assert row["ours_launches"] > 0
        assert row["ours_host_ms"] > 0
        ratio = row["torch_nn_graph_ms"]["median"] / row["ours_graph_ms"]["median"]
        assert row["ratio_graph_torch_nn"] == pytest.approx(ratio, rel=1e-3)
    told = capsys.readouterr().out
    assert "gate: 5 of 5 right" in told
    assert "132 programs 1.32 µs" in told
    assert "4 rows in" in told


@pytest.mark.usefixtures("_cuda_in_name")
def test_a_case_beyond_the_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    results = run.measure(run.Options(torch.device("cuda", 0), quick=True), [TINY], lambda text: None)
    assert [row["status"] for row in results["rows"]] == ["left out: too large for the memory"]
    assert command.exit_code(results) == 0


@pytest.mark.usefixtures("_cuda_in_name")
def test_the_tuner_s_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.gpu import tune
    from fused_rnn.kernels import triton as backend

    asked: list[object] = []
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(tune, "tune", lambda *arguments: asked.extend(arguments[:3]) or 7)
    assert main(["gpu", "--tune", "--seconds", "9", "--table", str(tmp_path / "tuned.json")]) == 0
    assert asked == [torch.device("cuda", 0), 9.0, tmp_path / "tuned.json"]
    assert "7 rows in" in capsys.readouterr().out
