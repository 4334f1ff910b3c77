"""The plain Python loop: one cell step after the other in torch's operations, as a first version of any new cell is written.

Also the same loop under torch.compile, which unrolls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import CELLS, Case
from benchmarks.peers import compiling
from benchmarks.peers.base import Peer, Provider
from benchmarks.problem import Problem, module_forward, module_step

# Compile time grows with T: half a minute at 7 steps, minutes here.
MOST_UNROLLED = 40


def _rnn(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(gates_x + gates_h),)


def _lstm(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (gates_x + gates_h).chunk(4, 1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (rx, zx, nx), (rh, zh, nh) = gates_x.chunk(3, 1), gates_h.chunk(3, 1)
    n = torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
    return (n + torch.sigmoid(zx + zh) * (states[0] - n),)


_STEPS = {"rnn": _rnn, "lstm": _lstm, "gru": _gru}
assert set(_STEPS) == set(CELLS)


class Loop(nn.Module):
    """One layer of one direction as a loop over time, with the parameters of a torch.nn module under their own names."""

    def __init__(self, module: nn.Module, cell: str) -> None:
        super().__init__()
        self._step = _STEPS[cell]
        for name, value in module.named_parameters():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, input: Tensor, hx: Any, keep: Tensor | None = None) -> tuple[Tensor, Any]:
        """Input (T, B, I), states (1, B, H); ``keep`` (T, B, 1) is 0 where a state is reset and 1 elsewhere."""
        states = tuple(state[0] for state in (hx if isinstance(hx, tuple) else (hx,)))
        outs = []
        for t in range(input.shape[0]):
            if keep is not None:
                states = tuple(state * keep[t] for state in states)
            gates_x = F.linear(input[t], self.weight_ih_l0, self.bias_ih_l0)
            gates_h = F.linear(states[0], self.weight_hh_l0, self.bias_hh_l0)
            states = self._step(gates_x, gates_h, states)
            outs.append(states[0])
        ends = tuple(state[None] for state in states)
        return torch.stack(outs), ends if len(ends) > 1 else ends[0]


def _call(module: nn.Module, problem: Problem, input_: Tensor, hx: Any) -> tuple[Tensor, Any]:
    keep = None if problem.reset is None else (~problem.reset).to(input_.dtype)[..., None]
    out, states = module(input_, hx, keep)
    return out, states


def _prepare(problem: Problem, case: Case, threads: int) -> Provider:
    module = Loop(problem.module, case.cell)
    return Provider(
        step=module_step(module, problem, case.training, call=_call),
        forward=module_forward(module, problem, case.training, call=_call)[0],
    )


def _prepare_compiled(problem: Problem, case: Case, threads: int) -> Provider:
    module = Loop(problem.module, case.cell)
    module.compile(dynamic=False)
    return Provider(step=module_step(module, problem, case.training, call=_call), scope=compiling.scope, note="unrolled")


def _refuses(case: Case) -> str | None:
    if case.num_layers > 1 or case.bidirectional or case.ragged or case.unusual:
        return "compared for one dense layer of one direction only"
    return None


def _refuses_compiled(case: Case) -> str | None:
    if case.shape.T > MOST_UNROLLED:
        return f"torch.compile unrolls the loop: compared up to T = {MOST_UNROLLED} only"
    return _refuses(case)


PEER = Peer(
    name="loop",
    title="Python loop",
    unavailable=lambda: None,
    version=lambda: torch.__version__,
    refuses=_refuses,
    prepare=_prepare,
)

COMPILED = Peer(
    name="loop-compiled",
    title="Python loop compiled",
    unavailable=compiling.unavailable,
    version=lambda: torch.__version__,
    refuses=_refuses_compiled,
    prepare=_prepare_compiled,
    compiles=True,
)
