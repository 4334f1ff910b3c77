"""The numbers of a case, the same for every peer: weights, input, initial states, gradients of the outputs; and the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks.cases import Case
from benchmarks.lengths import lengths

# One result of one call, by name: out, h_n, c_n, d_input, d_h_0, d_c_0, d_weight_ih_l0, ...
Results = dict[str, Tensor]


class Problem:
    """Weights and data of one cell at one shape; training and inference share it.

    Attributes:
        case: the case that the problem was made for.
        module: ``torch.nn`` module with the weights.
        input: (T, B, I); of a ragged case the rows of all steps without gaps, (R, I), as PackedSequence has them.
        batch_sizes: of a ragged case the number of sequences of each step, (T,) int64, else None.
        reset: of a case with resets (T, B) bool, where a state is zero before a step, else None.
        states: initial states, each (layers, B, H).
        d_outputs: gradients of (out, h_n[, c_n]).
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        dtype = getattr(torch, case.dtype)
        B, T, I, H = case.shape.sizes  # noqa: E741
        directions = case.directions
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module: nn.RNNBase = getattr(nn, case.class_name)(
                I, H, num_layers=case.num_layers, bidirectional=case.bidirectional, dropout=case.dropout, dtype=dtype
            )
            num_states = 2 if case.cell == "lstm" else 1
            state_size = (directions * case.num_layers, B, H)
            rows = (case.rows,) if case.ragged else (T, B)
            self.input = torch.randn(*rows, I, dtype=dtype)
            self.states = tuple(torch.randn(state_size, dtype=dtype) for _ in range(num_states))
            self.d_outputs = (
                torch.randn(*rows, directions * H, dtype=dtype),
                *(torch.randn(state_size, dtype=dtype) for _ in range(num_states)),
            )
            self.reset = torch.rand(T, B) < 1 / case.resets if case.resets else None
        self.batch_sizes: Tensor | None = None
        if case.ragged:
            ends = torch.tensor(lengths(B, T))
            self.batch_sizes = (ends[None] > torch.arange(T)[:, None]).sum(1)
        self._reference: Results | None = None

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Calls in here draw the same dropout masks each time, whatever their dtype."""
        with torch.random.fork_rng(devices=[], enabled=self.case.dropout > 0):
            if self.case.dropout:
                torch.manual_seed(1)
            yield

    @property
    def result_names(self) -> tuple[str, ...]:
        """Names of what one training step returns; a forward returns the leading ones."""
        names = ("h", "c")[: len(self.states)]
        parameters = (name for name, _ in self.module.named_parameters())
        return ("out", *(f"{n}_n" for n in names), "d_input", *(f"d_{n}_0" for n in names), *(f"d_{n}" for n in parameters))

    def named(self, results: tuple[Tensor, ...]) -> Results:
        """Give the results of one call their names."""
        return dict(zip(self.result_names, results, strict=False))

    def reference(self, training: bool) -> Results:
        """The results in float64, of torch.nn. Computed once; a training step's serve inference as well."""
        if self._reference is None or (training and "d_input" not in self._reference):
            step = module_step(copy.deepcopy(self.module), self, training, torch.float64)
            with torch.set_grad_enabled(training), self.seeded():
                self._reference = self.named(step())
        return self._reference


# How a module is called: (module, problem, input, hx) -> (out, states).
Call = Callable[[nn.Module, Problem, Tensor, Any], tuple[Tensor, Any]]


def call_module(module: nn.Module, problem: Problem, input_: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """Call a module as torch.nn's are: dense, with a PackedSequence, or, where states are reset, once per step."""
    if problem.reset is not None:
        return call_per_step(module, problem, input_, hx)
    if problem.batch_sizes is None:
        out, states = module(input_, hx)
        return out, states
    packed, states = module(PackedSequence(input_, problem.batch_sizes), hx)
    return packed.data, states


def call_per_step(module: nn.Module, problem: Problem, input_: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """The loop that recurrent PPO code writes (CleanRL, sb3-contrib): mask the states, take one step."""
    assert problem.reset is not None
    keep = (~problem.reset).to(input_.dtype)[:, None, :, None]  # (T, 1, B, 1)
    outs = []
    for x, kept in zip(input_, keep, strict=True):
        hx = tuple(kept * state for state in hx) if isinstance(hx, tuple) else kept * hx
        out, hx = module(x[None], hx)
        outs.append(out)
    return torch.cat(outs), hx


def module_forward(
    module: nn.Module, problem: Problem, training: bool, dtype: torch.dtype | None = None, call: Call | None = None
) -> tuple[Callable[[], tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """One forward of a module with torch.nn's contract, and the tensors whose gradients are wanted.

    Args:
        module: has the weights of ``problem`` already.
        training: the input and the states require gradients.
        dtype: compute in this dtype instead of the problem's.
        call: how the module is called, ``(module, problem, input, hx) -> (out, states)``; ``call_module`` by default.

    Returns:
        ``forward() -> (out, h_n[, c_n])`` and ``(input, h_0[, c_0], *parameters)``.
    """
    dtype, call = dtype or problem.input.dtype, call or call_module
    module = module.to(dtype).train(training)
    input_, *states = (x.to(dtype, copy=True).requires_grad_(training) for x in (problem.input, *problem.states))
    hx = tuple(states) if len(states) > 1 else states[0]

    def forward() -> tuple[Tensor, ...]:
        out, hn = call(module, problem, input_, hx)
        return (out, *hn) if isinstance(hn, tuple) else (out, hn)

    return forward, (input_, *states, *module.parameters())


def module_step(
    module: nn.Module, problem: Problem, training: bool, dtype: torch.dtype | None = None, call: Call | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed, of a module with torch.nn's contract. Arguments as in ``module_forward``.

    ``torch.autograd.grad`` hands the gradients back instead of adding them to ``.grad``: the same work as a training step
    after ``zero_grad(set_to_none=True)``.
    """
    forward, leaves = module_forward(module, problem, training, dtype, call)
    if not training:
        return forward
    d_outputs = tuple(d.to(leaves[0].dtype) for d in problem.d_outputs)

    def step() -> tuple[Tensor, ...]:
        outputs = forward()
        return (*outputs, *torch.autograd.grad(outputs, leaves, d_outputs))

    return step
