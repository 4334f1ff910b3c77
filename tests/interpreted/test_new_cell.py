"""A cell that the table has not, made as CONTRIBUTING.md says: its row alone tells the kernels what to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401 — the interpreter looks for it beside what it runs
import walks_support
from equations_support import leaky
from test_contract import REGIMES, regime_of
from walks_support import Case, check

from fused_rnn import cells
from fused_rnn.cells import LSTM
from fused_rnn.kernels.by_walk.walk import Walk
from fused_rnn.kernels.reference.recurrence import walk
from fused_rnn.kernels.triton.activations import tanh
from fused_rnn.kernels.triton.contract import contract
from fused_rnn.kernels.triton.recurrence import Recurrence

# h passes beside the product, and the backward reads no state before the step.
LEAKY = leaky.row


@triton.jit
def step(x, product, bias, h):
    n = tanh(x[0] + bias[0] + product[0])
    h = 0.9 * h + 0.1 * n
    return h, h, (n,)


@triton.jit
def step_backward(tape, before, d_h, d_carry):
    n = tape[0]
    return (d_h * 0.1 * (1.0 - n * n),), d_h * 0.9, d_carry


@pytest.mark.parametrize(
    "case", [Case(steps=3, batch=19, hidden=33, reverse=(False, True)), Case(batch=5, ragged="packed", reset=True)], ids=str
)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_leaky_cell(regime: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cells.CELLS, LEAKY.name, LEAKY)
    made = {"triton": contract(Recurrence(LEAKY, step, step_backward)), "reference": walk(leaky.equations)}
    monkeypatch.setattr(walks_support, "walk_of", lambda backend, _: Walk(*made[backend]))
    with regime_of(regime, monkeypatch):
        check("triton", LEAKY.name, case, torch.float32)


def test_a_cell_that_carries_two_states_is_refused() -> None:
    both = dataclasses.replace(LSTM, name="both", direct=True, projected=None)
    with pytest.raises(NotImplementedError, match=r"cell both: the Triton kernels carry one state .* not both of \('h', 'c'\)"):
        Recurrence(both, step, step_backward)
