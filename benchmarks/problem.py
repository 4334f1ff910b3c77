"""The numbers of a case, the same for every peer: weights, input, initial states, gradients of the outputs; and the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import Case

# One result of one call, by name: out, h_n, c_n, d_input, d_h_0, d_c_0, d_weight_ih_l0, ...
Results = dict[str, Tensor]


class Problem:
    """Weights and data of one cell at one shape; training and inference share it.

    Attributes:
        case: the case that the problem was made for.
        module: ``torch.nn`` module with the weights.
        input: (T, B, I).
        states: initial states, each (layers, B, H).
        d_outputs: gradients of (out, h_n[, c_n]).
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        dtype = getattr(torch, case.dtype)
        B, T, I, H = case.shape.sizes  # noqa: E741
        directions = 2 if case.bidirectional else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module: nn.RNNBase = getattr(nn, case.class_name)(
                I, H, num_layers=case.num_layers, bidirectional=case.bidirectional, dtype=dtype
            )
            num_states = 2 if case.cell == "lstm" else 1
            state_size = (directions * case.num_layers, B, H)
            self.input = torch.randn(T, B, I, dtype=dtype)
            self.states = tuple(torch.randn(state_size, dtype=dtype) for _ in range(num_states))
            self.d_outputs = (
                torch.randn(T, B, directions * H, dtype=dtype),
                *(torch.randn(state_size, dtype=dtype) for _ in range(num_states)),
            )
        self._reference: Results | None = None

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
            with torch.set_grad_enabled(training):
                self._reference = self.named(step())
        return self._reference


def module_forward(
    module: nn.Module, problem: Problem, training: bool, dtype: torch.dtype | None = None
) -> tuple[Callable[[], tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """One forward of a module with torch.nn's contract, and the tensors whose gradients are wanted.

    Args:
        module: has the weights of ``problem`` already.
        training: the input and the states require gradients.
        dtype: compute in this dtype instead of the problem's.

    Returns:
        ``forward() -> (out, h_n[, c_n])`` and ``(input, h_0[, c_0], *parameters)``.
    """
    dtype = dtype or problem.input.dtype
    module = module.to(dtype).train(training)
    input_, *states = (x.to(dtype, copy=True).requires_grad_(training) for x in (problem.input, *problem.states))
    hx = tuple(states) if len(states) > 1 else states[0]

    def forward() -> tuple[Tensor, ...]:
        out, hn = module(input_, hx)
        return (out, *hn) if isinstance(hn, tuple) else (out, hn)

    return forward, (input_, *states, *module.parameters())


def module_step(
    module: nn.Module, problem: Problem, training: bool, dtype: torch.dtype | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed, of a module with torch.nn's contract. Arguments as in ``module_forward``.

    ``torch.autograd.grad`` hands the gradients back instead of adding them to ``.grad``: the same work as a training step
    after ``zero_grad(set_to_none=True)``.
    """
    forward, leaves = module_forward(module, problem, training, dtype)
    if not training:
        return forward
    d_outputs = tuple(d.to(leaves[0].dtype) for d in problem.d_outputs)

    def step() -> tuple[Tensor, ...]:
        outputs = forward()
        return (*outputs, *torch.autograd.grad(outputs, leaves, d_outputs))

    return step
