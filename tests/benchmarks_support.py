"""What the benchmark's tests share."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from benchmarks import report, results, timing
from benchmarks.cases import CELLS, Case, Shape
from benchmarks.floors import Floors
from benchmarks.gate import Gate
from benchmarks.peers import onnx_runtime, peers, torch_nn
from benchmarks.problem import Problem
from benchmarks.suite import Listener, Plan, Suite

TINY = Shape(2, 3, 4, 5, "test")
ONE_ROUND = Plan(seconds=1e-9, min_rounds=1, max_rounds=1, measure_memory=False)
# torch.nn under our name: these tests are about the suite, not about the kernels.
OURS = dataclasses.replace(torch_nn.PEER, name="ours", title="ours")


def tiny_cases(modes=("training", "inference")):
    return [Case(cell, TINY, mode) for cell in CELLS for mode in modes]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(timing, "TURN", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_info(**more):
    info = {
        "format": results.FORMAT,
        "date": "2020-02-02T00:00:00",
        "cpu": "a CPU",
        "cores": 2,
        "threads": 1,
        "backend": "cpp",
        "backends": {"cpp": {"available": True, "detail": "avx0"}},
        "providers": ["ours", "torch", "onnxruntime"],
        "versions": {"torch": "2", "python": "3"},
        "complete": True,
    }
    return info | more


def run(cases, table=None, plan=ONE_ROUND, listener=None):
    table = table or {"ours": OURS, "torch": torch_nn.PEER, "onnxruntime": onnx_runtime.PEER}
    suite = Suite(table, 1, run_info(), plan, listener or Listener(), Floors(size=32, elements=64))
    return suite.run(cases)


def rendered(found, width=150):
    stream = io.StringIO()
    report.print_results(found, Console(file=stream, width=width))
    return stream.getvalue()


def assert_right(name, case):
    peer, problem = peers()[name], Problem(case)
    gate = Gate(problem, case.training)
    provider = peer.prepare(problem, case, 1)
    with torch.set_grad_enabled(case.training), provider.scope(), problem.seeded():
        verdict = gate.judge(problem.named(provider.tensors(provider.step())))
    assert verdict.passed, str(verdict)
