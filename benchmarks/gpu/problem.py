"""One layer with its numbers on a device, and who can run it: ours, torch.nn, TorchRL."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import fused_rnn
from benchmarks.gpu.cases import Case
from fused_rnn.cells import CELLS
from fused_rnn.data import sequences
from fused_rnn.data.cell import Weights
from fused_rnn.data.steps import Steps
from fused_rnn.graph import autograd

RESET_SHARE = 0.01
Results = dict[str, Tensor]


@dataclass
class Problem:
    """The numbers of a case: rows (R, I), initial states (D, B, H) each, weights and the gradients of the results."""

    case: Case
    input: Tensor
    states: tuple[Tensor, ...]
    weights: tuple[Weights, ...]
    steps: Steps
    reset: Tensor | None
    d_out: Tensor
    d_states: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, with leaves of their own."""
        weights = tuple(Weights(*(None if w is None else _leaf(w, dtype) for w in weight)) for weight in self.weights)
        return Problem(
            self.case,
            _leaf(self.input, dtype),
            tuple(_leaf(state, dtype) for state in self.states),
            weights,
            self.steps,
            self.reset,
            self.d_out.to(dtype),
            tuple(d_state.to(dtype) for d_state in self.d_states),
        )

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.input, *self.states, *(w for weight in self.weights for w in weight if w is not None)]


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_()


def make(case: Case, device: torch.device, steps: int | None = None) -> Problem:
    """Fresh numbers, the same for every call. steps: instead of the case's T."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, length = getattr(torch, case.dtype), steps or case.steps
    d, h, n = case.directions, case.hidden, case.batch

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    walk = Steps(length, n)
    if case.extra == "ragged":
        lengths = torch.linspace(length, max(1, length // 2), n).round().long()
        walk = Steps.packed((lengths[None, :] > torch.arange(length)[:, None]).sum(1))
    rows = walk.rows(0, length).stop
    reset = None
    if case.extra == "reset":
        reset = torch.rand(rows, generator=generator, device=device) < RESET_SHARE
    columns = (h, h, None, None)
    weights = tuple(
        Weights(*(_scaled(randn(case.gates * h, *([] if c is None else [c])), h).requires_grad_() for c in columns))
        for _ in range(d)
    )
    names = CELLS[case.cell].states
    return Problem(
        case,
        randn(rows, h).requires_grad_(),
        tuple(randn(d, n, h).requires_grad_() for _ in names),
        weights,
        walk,
        reset,
        randn(rows, d * h),
        tuple(randn(d, n, h) for _ in names),
    )


def _scaled(tensor: Tensor, hidden: int) -> Tensor:
    return tensor / hidden**0.5


# One call: the results of a forward, or with True those of a forward and backward.
Run = Callable[[bool], Results]


def ours(problem: Problem, backend: str | None) -> Run:
    """fused_rnn on a backend, or on the automatic choice."""
    cell, reverse = CELLS[problem.case.cell], (False, True)[: problem.case.directions]

    def run(training: bool) -> Results:
        with _backend(backend), torch.set_grad_enabled(training):
            resets = None
            if problem.reset is not None:
                resets = sequences.resets_by_direction(problem.reset, problem.steps, len(reverse))
            out, ends, _ = autograd.layer(cell, problem.input, problem.steps, problem.states, problem.weights, reverse, resets)
            return results_of(problem, out, ends, training)

    return run


def torch_module(problem: Problem) -> tuple[torch.nn.RNNBase, list[Tensor]]:
    """torch.nn's module with the weights of a problem, and what gradients are taken of in the order of ``leaves``."""
    case = problem.case
    name = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}[case.cell]
    made = getattr(torch.nn, name)(case.hidden, case.hidden, bidirectional=case.directions == 2, device="meta")
    module: torch.nn.RNNBase = made.to_empty(device=problem.input.device).to(problem.input.dtype)
    with torch.no_grad():
        for d, weight in enumerate(problem.weights):
            suffix = "_l0_reverse" if d else "_l0"
            for key, value in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weight, strict=False):
                getattr(module, key + suffix).copy_(value)
    # cuDNN wants its weights in one piece.
    module.flatten_parameters()
    return module, [problem.input, *problem.states, *module.parameters()]


def torch_nn(problem: Problem) -> Run | None:
    """torch.nn with the same weights; None where it has no such layer (resets)."""
    case = problem.case
    if problem.reset is not None:
        return None
    module, leaves = torch_module(problem)

    def run(training: bool) -> Results:
        with torch.set_grad_enabled(training):
            hx = problem.states if len(problem.states) > 1 else problem.states[0]
            if problem.steps.batch_sizes is None:
                x = problem.input.view(problem.steps.length, case.batch, case.hidden)
                out, ends = module(x, hx)
                out = out.flatten(0, 1)
            else:
                packed = torch.nn.utils.rnn.PackedSequence(problem.input, problem.steps.batch_sizes)
                packed, ends = module(packed, hx)
                out = packed.data
            ends = ends if isinstance(ends, tuple) else (ends,)
            return results_of(problem, out, ends, training, leaves)

    return run


def torchrl_missing() -> str | None:
    """Why TorchRL's Triton kernels cannot be measured, or None."""
    if importlib.util.find_spec("torchrl") is None:
        return "torchrl is not installed"
    from torchrl.modules import LSTMModule

    if "recurrent_backend" not in inspect.signature(LSTMModule.__init__).parameters:
        return "this torchrl has no recurrent_backend="
    return None


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    if name is None:
        yield
    else:
        with fused_rnn.backend(name):
            yield


def results_of(
    problem: Problem, out: Tensor, ends: tuple[Tensor, ...], training: bool, leaves: list[Tensor] | None = None
) -> Results:
    """Results by name, in training with the gradients of ``leaves``, or of the problem's."""
    values = (out, *ends)
    found = {"out": out.detach(), **{f"end {i}": end.detach() for i, end in enumerate(ends)}}
    if training:
        grads = torch.autograd.grad(values, leaves or problem.leaves, (problem.d_out, *problem.d_states))
        found |= {f"d_{i}": grad for i, grad in zip(itertools.count(), grads, strict=False)}
    return found
