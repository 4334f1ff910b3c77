"""The GPU benchmark without a GPU: the cases, the clock's turns, the rows and the table, on the CPU."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.gpu import cases, command, floors, gate, judging, report, run, timed
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
    assert len(quick) < 40


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
    # √(8 · 4), and the least of both
    assert "5.66×, 4.00×" in text
    results["rows"][0]["ratio_torch_nn"] = 0.5
    results["rows"][1]["ratio_graph_torch_nn"] = 0.25
    results["rows"][2]["torch_nn_graph"] = "failed: RuntimeError: a copy"
    results["rows"][3]["torch_nn_graph"] = "failed: RuntimeError: a copy, in another"
    out = io.StringIO()
    results["run"]["left_out"] = 3
    report.show(results, Console(file=out, width=150))
    assert "one barrier: 8 programs 1.25 µs" in out.getvalue()
    assert "3 cases were left out" in out.getvalue()
    assert "torch_nn_graph failed: RuntimeError: a copy (2 rows, the first lstm-" in out.getvalue()
    listed = [line.strip() for line in out.getvalue().splitlines() if line.startswith("  gru-float32-H5-B3-T4-D1 ")]
    assert [line.split(":")[0] for line in listed] == [f"gru-float32-H5-B3-T4-D1 forward{more}" for more in ("+backward", "")]
    assert "torch_nn as a graph 0.25×" in listed[0]
    assert "torch_nn 0.50×" in listed[1]
