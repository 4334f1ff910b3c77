"""The measurement beside busy processes: its load, its rows, its page."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks_support import OURS, TINY, no_pause, run_info  # noqa: F401, a fixture for every test

from benchmarks import __main__ as command
from benchmarks import beside_loader, busy
from benchmarks.cases import Case
from benchmarks.peers import onnx_runtime, torch_nn
from benchmarks.results import load

PEERS = {"ours": OURS, "torch": torch_nn.PEER, "onnxruntime": onnx_runtime.PEER}


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    monkeypatch.setattr(busy, "_SETTLE", 0.0)


def test_busy_processes_run_in_the_block_and_end_with_it() -> None:
    with busy.busy_processes(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.returncode is not None for process in processes)
    with pytest.raises(KeyboardInterrupt), busy.busy_processes(1) as processes:
        raise KeyboardInterrupt
    assert processes[0].returncode is not None
    with busy.busy_processes(0) as processes:
        assert processes == []


def test_a_case_has_a_row_for_every_load_and_provider() -> None:
    rows = busy.measure_case(Case("lstm", TINY, "training"), PEERS, 1, run_info(), rounds=2, seconds=1e-9)
    assert [(row["busy"], row["provider"]) for row in rows] == [(b, name) for b in (0, 1, 2) for name in PEERS]
    for row in rows:
        assert row["case"] == f"training/lstm/2x3x4x5/float32/busy={row['busy']}"
        if row["provider"] == "onnxruntime":
            assert row["status"] == "missing"
            assert row["reason"] == "inference only"
            assert "ms" not in row
            continue
        assert row["status"] == "ok"
        assert row["rounds"] == 2
        assert row["ms"]["median"] > 0
        assert row["over_quiet"] == 1 if row["busy"] == 0 else row["over_quiet"] > 0
        assert ("ratio" in row) == (row["provider"] == "torch")


def test_wrong_results_are_not_timed() -> None:
    def prepare(problem, case, threads):
        right = torch_nn.PEER.prepare(problem, case, threads)
        return dataclasses.replace(right, tensors=lambda result: tuple(x + 1 for x in right.tensors(result)))

    wrong = {"ours": dataclasses.replace(OURS, prepare=prepare), "torch": torch_nn.PEER}
    rows = busy.measure_case(Case("gru", TINY, "inference"), wrong, 1, run_info(), rounds=1, seconds=1e-9)
    assert {row["status"] for row in rows if row["provider"] == "ours"} == {"wrong"}
    assert all("ms" in row and "ratio" not in row for row in rows if row["provider"] == "torch")


def test_a_training_step_is_measured_beside_a_loader() -> None:
    sizes = beside_loader.Loader(batch=2, length=3, hidden=4, vocabulary=7, tags=2, words=10)
    rows = beside_loader.loader_rows(sizes, 1, run_info(), rounds=1, seconds=1e-9)
    assert [(row["busy"], row["provider"]) for row in rows] == [(0, "ours"), (0, "torch"), (2, "ours"), (2, "torch")]
    assert rows[2]["case"] == "tagger/lstm/2x3x4/dataloader/busy=2"
    assert all(row["ms"]["median"] > 0 for row in rows)
    assert "ratio" in rows[3]


def made(load_of: int, provider: str, ms: float, over_quiet: float, ratio: float | None = None) -> dict:
    row = {"case": f"training/gru/1x2x3/float32/busy={load_of}", "provider": provider, "busy": load_of, "status": "ok"}
    row |= {"ms": {"median": ms}, "over_quiet": over_quiet}
    return row | ({"ratio": {"median": ratio}} if ratio else {})


def test_page_and_summary() -> None:
    rows = [made(0, "ours", 1.0, 1.0), made(0, "torch", 0.5, 1.0, 0.5)]
    rows += [made(1, "ours", 3.0, 3.0), made(1, "torch", 4.5, 9.0, 1.5)]
    rows += [made(2, "ours", 3.1, 3.1), made(2, "torch", 3.0, 6.0, 0.97)]
    info = run_info(command=["python", "-m", "benchmarks", "busy"], commit="abc")
    page = busy.markdown(rows, info)
    assert "`python -m benchmarks busy` on a CPU, 2 cores, 1 threads, 2020-02-02, commit abc." in page
    assert "| training/gru/1x2x3/float32 | 1 | 3 (3.0 ×) | 4.5 (9.0 ×) | 1.50 |" in page
    # The rows without load are no part of the goal.
    assert "at most 3 × our quiet time in 1 of 2 rows; no slower than another provider in 1 of 2." in page


def test_command_writes_rows_and_page(tmp_path, capsys) -> None:
    path = tmp_path / "busy.json"
    options = ["--shapes", "2x3x4", "--cells", "rnn", "--modes", "inference", "--rounds", "1", "--slice", "1e-9", "--no-loader"]
    assert command.main(["busy", *options, "--peers", "torch", "--json", str(path)]) == 0
    found = load(path)
    assert found["run"]["complete"]
    assert len(found["rows"]) == 6
    assert (tmp_path / "busy.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["busy", "--peers", "ours"])
    assert "--peers: expected some of" in capsys.readouterr().err
