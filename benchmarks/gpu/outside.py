"""Layers of other projects as peers, each called as its own documentation tells, around the weights of a problem.

FlashRNN and gru-qat walk over time alone; the product of the input, which is everybody's, is torch's here.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.cases import Case
from benchmarks.gpu.problem import Problem, Results, Run, results_of
from benchmarks.peers import compiling
from benchmarks.peers.cell_loop import Loop

# FlashRNN's kernels in Triton take no more units; its kernels in CUDA are compiled anew for each size, for a minute or more.
_FLASHRNN_TRITON = 64
_FLASHRNN_CUDA = ((768, 16), (512, 16))
# gru-qat gives a program so many rows and units, backward and forward, and waits for ever if not all of them run at once.
_GRU_QAT_TILES = ((16, 64), (8, 128))
# torch.compile unrolls the loop over time.
LOOP_STEPS = 16


def not_installed(package: str) -> str | None:
    """Why a package cannot be used, or None."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def flashrnn_takes(case: Case) -> bool:
    """LSTM, one direction."""
    if (case.cell, case.directions, case.extra) != ("lstm", 1, "plain"):
        return False
    return case.hidden <= _FLASHRNN_TRITON or ((case.hidden, case.batch) in _FLASHRNN_CUDA and shutil.which("nvcc") is not None)


def flashrnn(problem: Problem, backend: str | None = None) -> Run:
    """FlashRNN of one head. backend: its ``backend``."""
    from flashrnn import flashrnn as walk

    case, weight = problem.case, problem.weights[0]
    h, n, g = case.hidden, case.batch, case.gates
    name = backend or ("triton_fused" if h <= _FLASHRNN_TRITON else "cuda_fused")

    def run(training: bool) -> Results:
        with torch.set_grad_enabled(training):
            # (N, T, G, heads, H), (G, heads, H, H) and (G, heads, H); its gates stand in torch's order.
            gates = F.linear(problem.input, weight.ih, weight.bias_ih).view(-1, n, g, 1, h).transpose(0, 1)
            states = torch.stack([state[0] for state in problem.states])[:, :, None, None]
            bias = _there(weight.bias_hh).view(g, 1, h)
            out, _ = walk(gates, weight.hh.view(g, 1, h, h), bias, states, "lstm", None, name, case.dtype)
            # (states, N, T, heads, H)
            rows = out[0, :, :, 0].transpose(0, 1).flatten(0, 1)
            ends = tuple(out[i, :, -1, 0][None] for i in range(len(problem.states)))
            return results_of(problem, rows, ends, training)

    return run


def gru_qat_takes(case: Case) -> bool:
    """Float32 GRU, one direction; H a power of two, which its tiles ask for."""
    layer = (case.cell, case.dtype, case.directions, case.extra) == ("gru", "float32", 1, "plain")
    return layer and case.hidden & (case.hidden - 1) == 0


def gru_qat(problem: Problem) -> Run:
    """Gru-qat's persistent kernels, without quantization.

    Raises:
        ValueError: if its programs would not all run at once: they wait for one another.
    """
    from gru_qat.triton_kernels.scan import gru_scan_persistent

    case, weight = problem.case, problem.weights[0]
    programs = max(-(-case.batch // rows) * -(-case.hidden // units) for rows, units in _GRU_QAT_TILES)
    most = torch.cuda.get_device_properties(problem.input.device).multi_processor_count
    if programs > most:
        raise ValueError(f"{programs} programs for {most} processors")

    def run(training: bool) -> Results:
        with torch.set_grad_enabled(training):
            gates = F.linear(problem.input, weight.ih, weight.bias_ih).view(-1, case.batch, 3 * case.hidden)
            out = gru_scan_persistent(gates, problem.states[0][0], weight.hh, _there(weight.bias_hh))
            return results_of(problem, out.flatten(0, 1), (out[-1:],), training)

    return run


def loop_takes(case: Case) -> bool:
    """One direction, plain, few enough steps to unroll."""
    return case.directions == 1 and case.extra == "plain" and case.steps <= LOOP_STEPS


def loop_compiled(problem: Problem) -> Run:
    """The plain loop over cells under torch.compile."""
    case = problem.case
    module = Loop(_Named(problem.weights[0]), {"rnn_tanh": "rnn"}.get(case.cell, case.cell))
    module.compile(dynamic=False)
    leaves = [problem.input, *problem.states, *module.parameters()]

    def run(training: bool) -> Results:
        with torch.set_grad_enabled(training), compiling.scope():
            hx = problem.states if len(problem.states) > 1 else problem.states[0]
            out, ends = module(problem.input.view(case.steps, case.batch, case.hidden), hx)
            return results_of(problem, out.flatten(0, 1), ends if isinstance(ends, tuple) else (ends,), training, leaves)

    return run


class _Named(torch.nn.Module):
    """Parameters under the names that torch.nn gives them."""

    def __init__(self, weights: Sequence[Tensor | None]) -> None:
        super().__init__()
        for name, value in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=False):
            self.register_parameter(f"{name}_l0", torch.nn.Parameter(_there(value).detach()))


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
