"""Int8 weights: torch's dynamically quantized modules, and ours.

Both compute the case's float32 problem with rounded weights. So they are judged by another measure than the others: twice the
error of torch's quantized modules, as elsewhere twice that of torch.nn.
"""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.gate import Gate
from benchmarks.peers import fused
from benchmarks.peers.base import Peer, Provider
from benchmarks.problem import Problem, call_module, module_step

TORCH, OURS = "torch-int8", "int8"


class _Loop(nn.Module):
    """A layer of torch's quantized RNNCell, which has no quantized RNN: for the measure alone."""

    def __init__(self, layer: nn.RNN) -> None:
        super().__init__()
        cell = nn.RNNCell(layer.input_size, layer.hidden_size)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
        self.inner = nn.ModuleList([cell])

    def forward(self, input_: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        state = input_.new_zeros(input_.shape[1], self.inner[0].hidden_size) if h is None else h[0]
        outs = []
        for x in input_.unbind():
            state = self.inner[0](x, state)
            outs.append(state)
        return torch.stack(outs), state[None]


def _quantized(module: nn.Module) -> nn.Module:
    """The quantized form in torch of a module of torch.nn."""
    with warnings.catch_warnings():
        # Of what torch is going to remove.
        warnings.simplefilter("ignore")
        quantize: Any = torch.ao.quantization.quantize_dynamic
        made: nn.Module = quantize(nn.Sequential(copy.deepcopy(module)))[0]
    return made


def _gate(problem: Problem) -> Gate:
    """Judges by the error of torch's quantized module."""
    module = problem.module
    if isinstance(module, nn.RNN):
        loop = _Loop(module)
        loop.inner[0] = _quantized(loop.inner[0])
        return Gate(problem, False, module_step(loop, problem, False))
    return Gate(problem, False, module_step(_quantized(module), problem, False))


def _refuses(case: Case) -> str | None:
    if case.training:
        return "inference only"
    if case.dtype != "float32":
        return "in place of float32 alone"
    if case.proj_size:
        return "has no projection"
    if case.cell == "rnn" and (not case.plain or case.loop):
        return "an RNN is compared as one dense layer of one direction only"
    return None


def _torch_refuses(case: Case) -> str | None:
    return "torch quantizes no RNN layer" if case.cell == "rnn" else _refuses(case)


def saved_bytes(module: nn.Module) -> int:
    """Bytes of a module's state_dict in a file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(module.state_dict(), buffer)
    return buffer.tell()


def _provider(module: nn.Module, problem: Problem, call: Callable[..., Any]) -> Provider:
    sizes = {"saved_bytes": saved_bytes(module), "saved_bytes_float32": saved_bytes(problem.module)}
    return Provider(step=module_step(module, problem, False, call=call), figures=sizes)


def _prepare_torch(problem: Problem, case: Case, threads: int) -> Provider:
    return _provider(_quantized(problem.module), problem, call_module)


def _prepare(problem: Problem, case: Case, threads: int) -> Provider:
    module = importlib.import_module("fused_rnn").quantize_dynamic(copy.deepcopy(problem.module))
    return _provider(module, problem, fused.call)


PEER = Peer(
    name=TORCH,
    title="torch int8",
    unavailable=lambda: None if hasattr(torch.ao, "quantization") else "this torch has no torch.ao.quantization",
    version=lambda: f"{torch.__version__} ({torch.backends.quantized.engine})",
    refuses=_torch_refuses,
    prepare=_prepare_torch,
    gate=_gate,
)

OUR_PEER = Peer(
    name=OURS,
    title="ours int8",
    unavailable=lambda: fused.unavailable("cpp"),
    version=lambda: fused.version("cpp"),
    refuses=_refuses,
    prepare=_prepare,
    gate=_gate,
)
