"""torch.nn itself, in eager mode, under torch.compile as it comes, and with recurrent layers allowed there.

torch.compile leaves torch.nn's recurrent layers to eager mode unless ``torch._dynamo.config.allow_rnn`` is set. Then they are
taken apart into operations and unrolled, so that compiling takes time with every step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers import compiling
from benchmarks.peers.base import Peer, Provider
from benchmarks.problem import Problem, module_forward, module_step

# In training, 3 steps take half a minute to compile.
MOST_UNROLLED = 40

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


class _Calls(nn.Module):
    """A layer called by code outside torch: torch.compile skips the frames of torch.nn's own modules."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor, hx: Any) -> Any:
        return self.layer(input, hx)


@contextmanager
def _allowing_rnn() -> Iterator[None]:
    import torch._dynamo.config as config

    with compiling.scope(), config.patch(allow_rnn=True):
        yield


def _prepare_allowed(problem: Problem, case: Case, threads: int) -> Provider:
    module = _Calls(copy.deepcopy(problem.module))
    # Where the layer is not compiled after all, this raises.
    module.compile(dynamic=False, fullgraph=True)
    return Provider(
        step=module_step(module, problem, case.training),
        scope=_allowing_rnn,
        note=_PER_STEP if case.resets else "unrolled",
    )


def _refuses_allowed(case: Case) -> str | None:
    if case.ragged or case.padded:
        return "torch.compile cannot trace torch.nn's layers with a PackedSequence"
    if case.loop == "cell":
        return "allow_rnn is about layers, not about cells"
    if case.dropout:
        return "draws other dropout masks than eager mode"
    if case.shape.T > MOST_UNROLLED and not case.resets and not case.loop:
        return f"torch.compile unrolls the layer: compared up to T = {MOST_UNROLLED} only"
    return None


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

ALLOWED = Peer(
    name="torch-allow-rnn",
    title="torch.nn compiled, allow_rnn",
    unavailable=compiling.unavailable,
    version=lambda: torch.__version__,
    refuses=_refuses_allowed,
    prepare=_prepare_allowed,
    compiles=True,
)
