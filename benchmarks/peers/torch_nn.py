"""torch.nn itself, in eager mode and under torch.compile."""

from __future__ import annotations

import copy

import torch

from benchmarks.cases import Case
from benchmarks.peers import compiling
from benchmarks.peers.base import Peer, Provider
from benchmarks.problem import Problem, module_forward, module_step

_PER_STEP = "one call per step, states masked: torch.nn has no resets"


def _prepare(problem: Problem, case: Case, threads: int) -> Provider:
    module = copy.deepcopy(problem.module)
    return Provider(
        step=module_step(module, problem, case.training),
        forward=module_forward(module, problem, case.training)[0],
        note=_PER_STEP if case.resets else "",
    )


def _prepare_compiled(problem: Problem, case: Case, threads: int) -> Provider:
    # nn.Module's own compile() keeps the module; torch.compile(module) would wrap it and rename its parameters.
    module = copy.deepcopy(problem.module)
    module.compile(dynamic=False)
    return Provider(
        step=module_step(module, problem, case.training),
        scope=compiling.scope,
        note=_PER_STEP if case.resets else "",
    )


PEER = Peer(
    name="torch",
    title="torch.nn",
    unavailable=lambda: None,
    version=lambda: torch.__version__,
    refuses=lambda case: None,
    prepare=_prepare,
)

COMPILED = Peer(
    name="torch-compiled",
    title="torch.nn compiled",
    unavailable=compiling.unavailable,
    version=lambda: torch.__version__,
    refuses=lambda case: None,
    prepare=_prepare_compiled,
    compiles=True,
)
