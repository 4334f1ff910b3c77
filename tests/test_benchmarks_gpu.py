"""The GPU benchmark without a GPU: the cases, the gate, the clock's turns, the rows and the table, on the CPU."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.gpu import cases, command, floors, gate, problem, report, run
from benchmarks.gpu.cases import Case, select
from benchmarks.gpu.clock import Clock

CPU = torch.device("cpu")
TINY = Case("gru", 5, 3, 4, "float32")


def test_the_grid_is_the_stated_one() -> None:
    """Every size, cell, dtype and number of directions, plain; resets and ragged lengths; nothing twice."""
    every = select(quick=False)
    assert len(every) == len(set(every))
    plain = {case for case in every if case.extra == "plain"}
    assert len(plain) == 7 * 5 * 2 * 2 * 3 * 2
    assert {case.hidden for case in plain} == {64, 128, 256, 512, 768, 1024, 1536}
    assert {case.batch for case in plain} == {1, 16, 64, 256, 1024}
    assert {case.steps for case in plain} == {128, 1024}
    for extra in ("reset", "ragged"):
        assert {(case.cell, case.directions, case.steps) for case in every if case.extra == extra} >= {
            (cell, d, t) for cell in ("lstm", "gru") for d in (1, 2) for t in (128, 1024)
        }
    quick = select(quick=True)
    assert {case.extra for case in quick} == set(cases.EXTRAS)
    assert len(quick) < 30


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
            return found | {"d_3": found["d_3"] + 1e-3}

        return wrong

    monkeypatch.setattr(problem, "ours", off)
    verdict = gate.judge(TINY, CPU, None)
    assert (verdict.passed, verdict.worst) == (False, "d_3")


def test_the_whole_gate_is_right_on_the_cpu() -> None:
    """Both cells, resets and ragged lengths, in the dtypes of the grid."""
    verdicts = list(gate.every_regime(CPU, "numba", quick=False))
    assert len(verdicts) == 2 * 3 * 2
    assert all(verdict.passed for verdict in verdicts), verdicts
    assert len(list(gate.every_regime(CPU, "numba", quick=True))) == 2


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
    assert results["rows"] == []
    assert (results["run"]["left_out"], results["run"]["complete"]) == (3, False)


def test_a_red_gate_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    red = gate.Verdict("resident lstm", False, "out", 1.0, 0.1)
    monkeypatch.setattr(gate, "every_regime", lambda device, backend, quick: iter([red]))
    told: list[str] = []
    results = run.measure(run.Options(CPU), [TINY], told.append)
    assert results["rows"] == []
    assert told[0].startswith("WRONG resident lstm: out: error 1.0e+00, allowed 1.0e-01")
    assert command.exit_code(results) == 1


def test_a_case_that_is_wrong_or_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "every_regime", lambda device, backend, quick: iter([]))
    monkeypatch.setattr(gate, "judge", lambda case, device, backend: gate.Verdict(case.name, False, "out", 1.0, 0.1))
    results = run.measure(run.Options(CPU, quick=True), [TINY], lambda text: None)
    assert [row["status"] for row in results["rows"]] == ["wrong: out: error 1.0e+00, allowed 1.0e-01"]
    assert command.exit_code(results) == 1

    def fails(case: Case, device: torch.device, backend: str | None) -> gate.Verdict:
        raise ValueError("no such plan")

    monkeypatch.setattr(gate, "judge", fails)
    results = run.measure(run.Options(CPU, quick=True), [TINY], lambda text: None)
    assert [row["status"] for row in results["rows"]] == ["failed: ValueError: no such plan"]


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
        "synchronize": lambda device: None,
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
    monkeypatch.setattr(gate, "judge", lambda case, device, backend: judge(case, device, "numba"))
    ours = problem.ours
    monkeypatch.setattr(problem, "ours", lambda made, backend: ours(made, backend or "numba"))
    monkeypatch.setattr(run, "Floors", lambda clock: floors.Floors(Clock(CPU), 8, 64))
    monkeypatch.setattr(run, "barrier_microseconds", lambda clock, programs: programs / 100)
    monkeypatch.setattr(run, "_regime", lambda case, backward, options: "resident")
    monkeypatch.setattr(gate, "REGIMES", {"resident": (5, 3)})


@pytest.mark.usefixtures("_cuda_in_name")
def test_the_command_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the arguments to the file and the table, with all that is asked of CUDA on the way."""
    from fused_rnn.kernels import triton as backend

    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(cases, "select", lambda quick: [TINY, Case("lstm", 5, 3, 4, "float32", 2, "ragged")])
    path = tmp_path / "rows.json"
    assert main(["gpu", "--quick", "--json", str(path)]) == 0
    kept = json.loads(path.read_text())
    assert kept["run"]["device"] == "a GPU"
    assert (kept["run"]["processors"], kept["run"]["cudnn"]) == (132, 91000)
    assert kept["run"]["barrier_us"] == {"8": 0.08, "32": 0.32, "64": 0.64, "132": 1.32}
    assert [row["status"] for row in kept["rows"]] == ["ok"] * 4
    assert {row["ours_peak_bytes"] for row in kept["rows"]} == {7}
    told = capsys.readouterr().out
    assert "gate: 2 of 2 right" in told
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
