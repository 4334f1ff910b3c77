"""torch.nn itself, in eager mode."""

from __future__ import annotations

import copy

import torch

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Provider
from benchmarks.problem import Problem, module_forward, module_step


def _prepare(problem: Problem, case: Case, threads: int) -> Provider:
    module = copy.deepcopy(problem.module)
    return Provider(
        step=module_step(module, problem, case.training),
        forward=module_forward(module, problem, case.training)[0],
    )


PEER = Peer(
    name="torch",
    title="torch.nn",
    unavailable=lambda: None,
    version=lambda: torch.__version__,
    refuses=lambda case: None,
    prepare=_prepare,
)
