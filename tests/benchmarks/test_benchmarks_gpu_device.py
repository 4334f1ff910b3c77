"""What the GPU benchmark asks of CUDA, answered without one: the command, graphs, a device that is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.gpu import cases, command, floors, gate, graphs, judging, problem, run, timed
from benchmarks.gpu.cases import Case, select
from benchmarks.gpu.clock import Clock

CPU = torch.device("cpu")
TINY = Case("gru", 5, 3, 4, "float32")


def test_a_row_names_the_regime_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pytest.importorskip("fused_rnn.kernels.triton.plan", reason="Triton is not installed")
    from fused_rnn.kernels.triton import launch

    monkeypatch.setattr(launch, "device_of", lambda device: plan.Device("a GPU", (9, 0), 132, 227 << 10))
    cuda = torch.device("cuda", 0)
    for case in (*cases.goals(), *select(quick=True)):
        assert timed.regime(case, True, cuda, None) in plan.REGIMES
    assert timed.regime(TINY, True, cuda, "reference") is None
    assert timed.regime(TINY, True, CPU, None) is None


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
def test_a_capture_that_fails_is_noted_once_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager times are there, the other side's graph too; the same kind of call is not tried again."""
    tries: list[str] = []

    def capture(call: functools.partial[object], device: torch.device) -> object:
        name = call.func.__qualname__.split(".")[0]
        tries.append(name)
        if name == "torch_nn":
            raise RuntimeError("operation not permitted\nCUDA kernel errors might be reported later")
        return lambda: None

    monkeypatch.setattr(graphs, "capture", capture)
    given = [TINY, dataclasses.replace(TINY, batch=2)]
    results = run.measure(run.Options(torch.device("cuda", 0), rounds=1, quick=True), given, lambda text: None)
    assert [row["status"] for row in results["rows"]] == ["ok"] * 4
    why = "failed: RuntimeError: operation not permitted"
    assert [row["torch_nn_graph"] for row in results["rows"]] == [why, why, *[f"{why}, in {TINY.name}"] * 2]
    assert all(row["ours_graph_ms"]["median"] >= 0 and row["ratio_torch_nn"] > 0 for row in results["rows"])
    assert not any("ratio_graph_torch_nn" in row for row in results["rows"])
    # Forward and training: both sides of the first case, ours alone of the second.
    assert tries.count("torch_nn") == 2
    assert len(tries) == 6


@pytest.mark.usefixtures("_cuda_in_name")
def test_a_lost_device_ends_the_run_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would come next would fail too."""
    monkeypatch.setattr(judging, "device_usable", lambda: False)

    def lost(call: object, device: torch.device) -> object:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(graphs, "device_usable", lambda: False)
    monkeypatch.setattr(graphs, "capture", lost)
    kept: list[int] = []
    given = [TINY, dataclasses.replace(TINY, batch=2)]
    options = run.Options(torch.device("cuda", 0), rounds=1, quick=True)
    results = run.measure(options, given, lambda text: None, lambda rows: kept.append(len(rows["rows"])))
    assert len(results["rows"]) == 1
    assert results["rows"][0]["status"].startswith("failed: RuntimeError: the device no longer answers after a capture")
    assert results["run"]["stopped"] == f"the device answers no more after {TINY.name}"
    assert (results["run"]["left_out"], results["run"]["complete"]) == (1, False)
    assert kept[-1] == 1
    assert command.exit_code(results) == 1


def test_a_failed_capture_leaves_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph leaves it the current one where ending the capture raises; and the first error is told too."""
    current = ["first"]
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(graph: object, pool: object, stream: object) -> Iterator[None]:
        current.append("capture")
        try:
            yield
        finally:
            raise RuntimeError("capture invalidated")

    answers = {
        "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None, name=current[-1]),
        "Stream": lambda device: stream,
        "CUDAGraph": object,
        "graph_pool_handle": lambda: (0, 1),
        "stream": lambda given: contextlib.nullcontext(),
        "graph": graph,
        "set_stream": lambda given: current.append(given.name),
        "synchronize": lambda device=None: None,
        "current_device": lambda: 0,
    }
    for name, answer in answers.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, answer)
    calls: list[int] = []

    def call() -> None:
        calls.append(len(calls))
        if current[-1] == "capture":
            raise ValueError("a copy from the CPU")

    replay, why = graphs.tried(call, torch.device("cuda", 0))
    assert replay is None
    assert why == "failed: RuntimeError: capture invalidated (after ValueError: a copy from the CPU)"
    assert current == ["first", "capture", "first"]
    assert len(calls) == graphs.WARM_UP + 1


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
