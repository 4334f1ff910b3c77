"""The same cases under pytest-benchmark: its tables, ``--benchmark-json``, and comparison between commits.

    pytest benchmarks --benchmark-autosave                 measure, and keep the result under this commit
    pytest benchmarks --benchmark-compare                  measure again, and show the last result beside it
    pytest benchmarks --benchmark-compare-fail=median:10%  ... and fail where the median is a tenth slower

Providers of a case run one after the other here, each as long as pytest-benchmark likes; a machine that gets busier meanwhile
falsifies their ratio. ``python -m benchmarks`` lets them take turns, and ratios to be quoted come from there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.gate import Gate
from benchmarks.peers import Peer
from benchmarks.problem import Problem
from benchmarks.timing import PAUSE

# Seconds of timing for one case and provider, and the least number of rounds.
SECONDS, ROUNDS = 0.3, 5

# Cases that share their data stand next to each other, and so do the providers of a case.
_last: dict[Case, tuple[Problem, dict[bool, Gate]]] = {}


def _problem(case: Case) -> tuple[Problem, Gate]:
    if case.data not in _last:
        _last.clear()
        _last[case.data] = Problem(case), {}
    problem, gates = _last[case.data]
    if case.training not in gates:
        gates[case.training] = Gate(problem, case.training)
    return problem, gates[case.training]


@pytest.fixture
def threads(request: pytest.FixtureRequest, case: Case) -> Iterator[int]:
    before = torch.get_num_threads()
    count = case.threads or request.config.getoption("--threads")
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.mark.benchmark(max_time=SECONDS, min_rounds=ROUNDS, timer=time.perf_counter, disable_gc=True)
def test_speed(benchmark: BenchmarkFixture, case: Case, peer: Peer, threads: int) -> None:
    reason = peer.reason(replace(case, threads=threads))
    if reason:
        # As in the table of python -m benchmarks: a peer that cannot run here, or not this case, is a line that says why.
        pytest.skip(f"no figure of {peer.title}: {reason}")
    problem, gate = _problem(case)
    provider = peer.prepare(problem, case, threads)
    benchmark.group = case.key
    benchmark.extra_info |= {"provider": peer.name, "threads": threads, "flops": case.flops, "origin": case.shape.origin}
    with torch.set_grad_enabled(case.training), provider.scope():
        with problem.seeded():
            verdict = gate.judge(problem.named(provider.tensors(provider.step())))
        # Nothing is timed whose results are wrong.
        assert verdict.passed, str(verdict)
        gc.collect()
        # The last provider's threads spin for a while.
        time.sleep(PAUSE)
        provider.step()
        benchmark(provider.step)
