"""Whole layers on the Triton backend, with every option of one, against the reference backend in float64."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import schedules
import torch
from tolerances import assert_close_to_reference
from torch import Tensor

import fused_rnn
from fused_rnn.cells import CELLS
from fused_rnn.data.cell import Weights
from fused_rnn.data.steps import Steps
from fused_rnn.graph import autograd
from fused_rnn.kernels.triton import launch, plan
from fused_rnn.kernels.triton.plan import Device

CHIP = Device("a chip", (9, 0), 32, 227 << 10)
every_cell = pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
every_regime = pytest.mark.parametrize("regime", plan.REGIMES)
FEATURES, HIDDEN = 3, 19
DENSE, PACKED = Steps(4, 3), Steps.packed(torch.tensor([3, 3, 2, 1]), 4)


@contextlib.contextmanager
def regime_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Force a regime; of those that meet, two programs run at the same time."""
    with contextlib.ExitStack() as stack:
        if name in ("cooperative", "streamed"):
            stack.enter_context(monkeypatch.context()).setattr(launch, "device_of", lambda device: CHIP)
            stack.enter_context(schedules.together(monkeypatch, schedules.first_ahead))
        stack.enter_context(plan.force(regime=name, units=16))
        yield


@dataclass
class Case:
    """A layer and what is asked of it. biases: which there are, bias_ih and bias_hh of each direction."""

    cell: str
    steps: Steps
    reverse: Sequence[bool] = (False, True)
    biases: Sequence[tuple[bool, bool]] = ((True, True), (True, True))
    reset: bool = False
    cell_states: bool = False
    # Of the results, those that the loss depends on: the output, the states, with cell_states c of every step.
    used: Sequence[int] | None = None


def run(case: Case, dtype: torch.dtype, backend: str, second: bool = False) -> dict[str, Tensor]:
    """Results and all gradients; with ``second`` the gradients of a function of those."""
    draw = torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        # Of few bits, so that every dtype has the same numbers.
        return (torch.randn(*sizes, generator=draw).to(torch.bfloat16) / 2).to(dtype).requires_grad_()

    cell, d = CELLS[case.cell], len(case.reverse)
    gates, rows = cell.num_gates * HIDDEN, case.steps.rows(0, case.steps.length).stop
    x = randn(rows, FEATURES)
    states = tuple(randn(d, case.steps.batch, HIDDEN) for _ in cell.states)
    weights = tuple(
        Weights(randn(gates, FEATURES), randn(gates, HIDDEN), *(randn(gates) if there else None for there in pair))
        for pair in case.biases[:d]
    )
    reset = torch.rand(rows, generator=draw) < 0.3 if case.reset else None
    leaves = {"x": x, **{f"{name}_0": state for name, state in zip(cell.states, states, strict=True)}}
    for i, weight in enumerate(weights):
        named = {"ih": weight.ih, "hh": weight.hh, "bias_ih": weight.bias_ih, "bias_hh": weight.bias_hh}
        leaves |= {f"{name} {i}": tensor for name, tensor in named.items() if tensor is not None}
    with fused_rnn.backend(backend):
        mask = None if reset is None else reset.expand(d, rows).contiguous()
        out, ends, cells = autograd.layer(cell, x, case.steps, states, weights, tuple(case.reverse), mask, case.cell_states)
        values = (out, *ends) if cells is None else (out, *ends, cells)
        used = values if case.used is None else [values[i] for i in case.used]
        loss = sum((v * torch.linspace(-1, 1, v.numel(), dtype=torch.float64).to(dtype).view_as(v)).sum() for v in used)
        if second:
            first = torch.autograd.grad((loss * loss), [x, *states], create_graph=True)
            loss = sum((grad * grad).sum() for grad in first)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {f"value {i}": value.detach() for i, value in enumerate(values)}
    return found | {f"d_{name}": torch.zeros(()) if g is None else g for name, g in zip(leaves, grads, strict=True)}


def check(case: Case, dtype: torch.dtype, regime: str, monkeypatch: pytest.MonkeyPatch, second: bool = False) -> None:
    """Error ≤ 2 × that of plain torch in the same dtype + floor."""
    with regime_of(regime, monkeypatch):
        ours = run(case, dtype, "triton", second)
    theirs, exact = run(case, dtype, "reference", second), run(case, torch.float64, "reference", second)
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        assert_close_to_reference(ours[name], theirs[name], value, name)


@pytest.mark.parametrize("steps", [DENSE, PACKED], ids=["dense", "packed"])
@every_regime
@every_cell
def test_both_directions(cell: str, regime: str, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """With resets; of the packed sequences one has no step, whose states and gradients pass through."""
    check(Case(cell, steps, reset=True, cell_states=CELLS[cell].cell_state is not None), torch.float32, regime, monkeypatch)


@pytest.mark.parametrize("biases", list(itertools.product((True, False), repeat=2)), ids=str)
@every_regime
@every_cell
def test_biases(cell: str, regime: str, biases: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both, one of them, none; in the second direction both."""
    steps = Steps(2, 2)
    check(Case(cell, steps, biases=(biases, (True, True))), torch.float32, regime, monkeypatch)
    if regime == "resident":
        check(Case(cell, steps, reverse=(False,), biases=(biases,)), torch.float32, regime, monkeypatch)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,)], ids=["out", "h_n", "c_n", "c"])
@every_regime
def test_gradients_that_do_not_come(regime: str, used: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that nobody uses has no gradient: its is None, not zeros."""
    check(Case("lstm", Steps(3, 2), cell_states=True, used=used), torch.float32, regime, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", ["resident", "cooperative", "streamed"])
@every_cell
def test_states_of_16_bits(cell: str, regime: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In and out, and their gradients; c and the GRU's h are not rounded between the steps."""
    check(Case(cell, PACKED, cell_states=CELLS[cell].cell_state is not None), dtype, regime, monkeypatch)


@pytest.mark.parametrize("regime", ["resident", "cooperative"])
@every_cell
def test_second_derivatives(cell: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Case(cell, Steps(3, 2), reverse=(False,)), torch.float32, regime, monkeypatch, second=True)


@pytest.mark.parametrize("regime", ["resident", "cooperative"])
@every_cell
def test_one_step_and_one_sequence(cell: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Case(cell, Steps(1, 1)), torch.float32, regime, monkeypatch)


@pytest.mark.parametrize("regime", ["resident", "cooperative"])
def test_states_of_any_stride(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walks read contiguous states; a caller's need not be."""
    module, x = fused_rnn.GRU(FEATURES, HIDDEN, bidirectional=True), torch.randn(3, 2, FEATURES)
    h_0 = torch.randn(HIDDEN, 2, 2).permute(2, 1, 0)
    found = []
    for h in (h_0, h_0.contiguous()):
        with regime_of(regime, monkeypatch), fused_rnn.backend("triton"):
            found.append(module(x, h))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
