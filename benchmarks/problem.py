"""The numbers of a case, the same for every peer: weights, input, initial states, gradients of the outputs; and the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import Case
from benchmarks.lengths import lengths

# One result of one call, by name: out, h_n, c_n, d_input, d_h_0, d_c_0, d_weight_ih_l0, ...
Results = dict[str, Tensor]


class Problem:
    """Weights and data of one cell at one shape; training and inference share it.

    Attributes:
        case: the case that the problem was made for.
        module: ``torch.nn``'s module of the case, with the weights.
        input: (T, B, I); of a ragged case the rows of all steps without gaps, (R, I), as PackedSequence has them.
        batch_sizes: of a ragged case the number of sequences of each step, (T,) int64, else None.
        lengths: of a padded case the steps of each sequence, in no order, (B,) int64, else None.
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
            self.module = make_module(case, nn)
            P = case.features
            state_sizes = [(directions * case.num_layers, B, size) for size in ((P, H) if case.cell == "lstm" else (H,))]
            rows = (case.rows,) if case.ragged else (T, B)
            self.input = torch.randn(*rows, I, dtype=dtype)
            self.states = tuple(torch.randn(size, dtype=dtype) for size in state_sizes)
            self.d_outputs = (
                torch.randn(*rows, directions * P, dtype=dtype),
                *(torch.randn(size, dtype=dtype) for size in state_sizes),
            )
            self.reset = torch.rand(T, B) < 1 / case.resets if case.resets else None
            self.lengths = torch.tensor(lengths(B, T))[torch.randperm(B)] if case.padded else None
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
        parameters = (f"d_{name}" for name, _ in self.module.named_parameters())
        data = () if self.case.parameters_only else ("d_input", *(f"d_{n}_0" for n in names))
        return ("out", *(f"{n}_n" for n in names), *data, *parameters)

    def named(self, results: tuple[Any, ...]) -> Results:
        """Give the results of one call their names; the outputs of a loop's steps are put together here, outside the timing."""
        if self.case.loop:
            outs, *others = results
            states = [state.reshape(own.shape) for state, own in zip(others, self.states, strict=False)]
            results = (torch.stack([out.reshape(self.states[0].shape[1:]) for out in outs]), *states, *others[len(states) :])
        return dict(zip(self.result_names, results, strict=False))

    def reference(self, training: bool) -> Results:
        """The results in float64, of torch.nn. Computed once; a training step's serve inference as well."""
        if self._reference is None or (training and "d_input" not in self._reference):
            step = module_step(copy.deepcopy(self.module), self, training, torch.float64)
            with torch.set_grad_enabled(training), self.seeded():
                self._reference = self.named(step())
        return self._reference


def make_module(case: Case, namespace: Any) -> nn.Module:
    """What is called in a case, of torch.nn or of a package with the same classes: a layer, or a cell that is looped over."""
    sizes, dtype = (case.shape.I, case.shape.H), getattr(torch, case.dtype)
    if case.loop == "cell":
        cell: nn.Module = getattr(namespace, f"{case.class_name}Cell")(*sizes, dtype=dtype)
        return cell
    options: dict[str, Any] = {"proj_size": case.proj_size} if case.proj_size else {}
    options |= {"num_layers": case.num_layers, "bidirectional": case.bidirectional, "dropout": case.dropout}
    layer: nn.Module = getattr(namespace, case.class_name)(*sizes, dtype=dtype, **options)
    return layer


# How a module is called: (module, problem, input, hx) -> (out, states). A loop's out is a tuple, one of each step.
Call = Callable[[nn.Module, Problem, Tensor, Any], tuple[Any, Any]]


def call_module(module: nn.Module, problem: Problem, input_: Tensor, hx: Any) -> tuple[Any, Any]:
    """Call a module as torch.nn's are: dense, with a PackedSequence, or, where states are reset, once per step."""
    if problem.case.loop:
        return call_in_loop(module, problem, input_, hx)
    if problem.reset is not None:
        return call_per_step(module, problem, input_, hx)
    if problem.lengths is not None:
        out, states = module(pack_padded_sequence(input_, problem.lengths, enforce_sorted=False), hx)
        return pad_packed_sequence(out, total_length=len(input_))[0], states
    if problem.batch_sizes is None:
        out, states = module(input_, hx)
        return out, states
    packed, states = module(PackedSequence(input_, problem.batch_sizes), hx)
    return packed.data, states


def call_in_loop(module: nn.Module, problem: Problem, input_: Tensor, hx: Any) -> tuple[tuple[Tensor, ...], Any]:
    """One call a step, as a decoder or an agent makes them: of a cell, or of a layer with T = 1."""
    outs = []
    if problem.case.loop == "cell":
        hx = tuple(state[0] for state in hx) if isinstance(hx, tuple) else hx[0]
        for x in input_.unbind():
            hx = module(x, hx)
            outs.append(hx[0] if isinstance(hx, tuple) else hx)
    else:
        for x in torch.split(input_, 1):
            out, hx = module(x, hx)
            outs.append(out)
    return tuple(outs), hx


def call_per_step(module: nn.Module, problem: Problem, input_: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """The loop that recurrent PPO code writes (CleanRL, sb3-contrib): mask the states, take one step."""
    assert problem.reset is not None
    keep = (~problem.reset).to(input_.dtype)[:, None, :, None]  # (T, 1, B, 1)
    if hx is None:
        zeros = tuple(torch.zeros_like(state, dtype=input_.dtype) for state in problem.states)
        hx = zeros if len(zeros) > 1 else zeros[0]
    outs = []
    for x, kept in zip(input_, keep, strict=True):
        hx = tuple(kept * state for state in hx) if isinstance(hx, tuple) else kept * hx
        out, hx = module(x[None], hx)
        outs.append(out)
    return torch.cat(outs), hx


def module_forward(
    module: nn.Module, problem: Problem, training: bool, dtype: torch.dtype | None = None, call: Call | None = None
) -> tuple[Callable[[], tuple[Any, ...]], tuple[Tensor, ...]]:
    """One forward of a module with torch.nn's contract, and the tensors whose gradients are wanted.

    Args:
        module: has the weights of ``problem`` already.
        training: the input and the states require gradients.
        dtype: compute in this dtype instead of the problem's.
        call: how the module is called, ``(module, problem, input, hx) -> (out, states)``; ``call_module`` by default.

    Returns:
        ``forward() -> (out, h_n[, c_n])`` and ``(input, h_0[, c_0], *parameters)``, or the parameters alone where the case says
        so.
    """
    dtype, call, case = dtype or problem.input.dtype, call or call_module, problem.case
    module = module.to(dtype).train(training)
    wanted = training and not case.parameters_only
    input_, *states = (x.to(dtype, copy=True).requires_grad_(wanted) for x in (problem.input, *problem.states))
    hx = None if case.summed else tuple(states) if len(states) > 1 else states[0]

    def forward() -> tuple[Any, ...]:
        out, hn = call(module, problem, input_, hx)
        return (out, *hn) if isinstance(hn, tuple) else (out, hn)

    return forward, tuple(module.parameters()) if case.parameters_only else (input_, *states, *module.parameters())


def module_step(
    module: nn.Module, problem: Problem, training: bool, dtype: torch.dtype | None = None, call: Call | None = None
) -> Callable[[], tuple[Any, ...]]:
    """The call that is timed, of a module with torch.nn's contract. Arguments as in ``module_forward``.

    ``torch.autograd.grad`` hands the gradients back instead of adding them to ``.grad``: the same work as a training step
    after ``zero_grad(set_to_none=True)``.
    """
    forward, leaves = module_forward(module, problem, training, dtype, call)
    if not training:
        return forward
    d_outputs = tuple(d.to(leaves[0].dtype) for d in problem.d_outputs)

    def step() -> tuple[Any, ...]:
        outputs = forward()
        return (*outputs, *torch.autograd.grad(outputs, leaves, d_outputs))

    def summed() -> tuple[Any, ...]:
        outputs = forward()
        return (*outputs, *torch.autograd.grad(outputs[0].sum(), leaves))

    # Each step's output has the shape that the module gave it.
    d_steps = torch.split(d_outputs[0], 1) if problem.case.loop == "layer" else d_outputs[0].unbind()

    def looped() -> tuple[Any, ...]:
        outputs = forward()
        return (*outputs, *torch.autograd.grad(outputs[0], leaves, d_steps))

    return summed if problem.case.summed else looped if problem.case.loop else step
