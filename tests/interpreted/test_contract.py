"""The kernel contract in every regime against the reference in float64; and what the interpreter must refuse."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import schedules
import torch
from walks_support import Case, check

import fused_rnn
from fused_rnn.cells import CELLS
from fused_rnn.kernels import triton
from fused_rnn.kernels.triton import launch, plan
from fused_rnn.kernels.triton.plan import Device

REGIMES = plan.REGIMES
CHIP = Device("a chip", (9, 0), 16, 227 << 10)


@contextlib.contextmanager
def regime_of(regime: str, monkeypatch: pytest.MonkeyPatch, **fields: int) -> Iterator[None]:
    """Force a regime; programs that meet run at the same time, on a chip that has room for them."""
    with contextlib.ExitStack() as stack:
        if regime in ("cooperative", "streamed"):
            monkeypatch.setattr(launch, "device_of", lambda device: CHIP)
            stack.enter_context(schedules.together(monkeypatch, schedules.in_turn))
        stack.enter_context(plan.force(regime=regime, **fields))
        yield


every_cell = pytest.mark.parametrize("cell", CELLS)
# The kernels' own product serves a step with one.
TWO_STAGES = [name for name, cell in CELLS.items() if cell.later]

# Several programs along the units (in the stepwise regime) and along the batch, and sizes that are no power of two.
WIDE = Case(steps=3, batch=19, hidden=33, reverse=(False, True))
RAGGED = Case(steps=5, batch=5, hidden=6, ragged="packed", reverse=(False, True), reset=True, padding=3)


@pytest.mark.parametrize("case", [WIDE, RAGGED], ids=str)
@pytest.mark.parametrize(("cell", "regime"), [(c, r) for c in CELLS for r in REGIMES if r == "library" or c not in TWO_STAGES])
def test_every_cell_in_every_regime(cell: str, regime: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with regime_of(regime, monkeypatch):
        check("triton", cell, case, torch.float32)


@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "library"])
@pytest.mark.parametrize("cell", TWO_STAGES)
def test_a_step_of_two_products_is_the_librarys(cell: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        regime_of(regime, monkeypatch),
        pytest.raises(ValueError, match=rf"force\(regime='{regime}'\): the product of n is a second one in each step"),
    ):
        check("triton", cell, WIDE, torch.float32)
    assert "torch.matmul and one pointwise launch a step" in triton.explain(cell, 64, 8, device=CHIP)


@pytest.mark.parametrize(
    "case",
    [
        Case(steps=1, batch=1, hidden=1),
        Case(steps=2, batch=2, hidden=5, bias=False),
        Case(steps=2, batch=2, hidden=5, d_out=False),
        Case(batch=0, hidden=3),
        Case(steps=5, batch=18, hidden=6, ragged="padded", reverse=(True, False), reset=True),
        Case(steps=6, batch=4, hidden=6, ragged="packed", reset=True, chunk=2),
        Case(steps=6, batch=4, hidden=6, ragged="padded", reverse=(True,), reset=True, chunk=2),
        Case(steps=3, batch=2, hidden=7, reverse=(True, False), by_direction=True, padding=5),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("cell", "regime"), [*((c, r) for c in ("lstm", "gru") for r in REGIMES), ("gru_reset_before", "library")]
)
def test_sizes_and_options(cell: str, regime: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit, one step, no bias, no row, ragged rows in two tiles, walks cut into parts, rows of any stride."""
    with regime_of(regime, monkeypatch):
        check("triton", cell, case, torch.float32)


@pytest.mark.parametrize(
    "case", [Case(projection=5, batch=4, reset=True), Case(projection=3, ragged="packed", chunk=2)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_projected_lstm(case: Case, dtype: torch.dtype) -> None:
    check("triton", "lstm", case, dtype)


@every_cell
def test_float64(cell: str) -> None:
    check("triton", cell, Case(batch=3, hidden=7, steps=3, reverse=(False, True)), torch.float64)


def test_more_tiles_than_one_launch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch tiles and directions that cannot all be co-resident take several launches."""
    choose = launch.choose

    def one_at_a_time(call: plan.Call, device: plan.Device) -> plan.Plan:
        return dataclasses.replace(choose(call, device), tiles_at_once=2, directions_at_once=1)

    monkeypatch.setattr(launch, "choose", one_at_a_time)
    with plan.force(regime="cooperative", units=16, batch=16):
        check("triton", "lstm", Case(steps=2, batch=40, hidden=3, reverse=(False, True)), torch.float32)


def test_programs_that_cannot_meet_are_refused() -> None:
    """A barrier among programs that run one after another would never end; so it is not launched."""
    with (
        plan.force(regime="cooperative", units=16),
        fused_rnn.backend("triton"),
        pytest.raises(ValueError, match=r"2 programs must run at once, and interpreter runs 1"),
    ):
        fused_rnn.GRU(3, 20)(torch.randn(2, 1, 3))


def test_gradient_of_the_cell_states() -> None:
    """``d_cells``: the gradient of c of every step, ragged rows and both directions."""
    from fused_rnn.cells import LSTM
    from fused_rnn.data.cell import Weights
    from fused_rnn.data.steps import Steps
    from fused_rnn.graph import autograd

    d, n, h, i = 2, 3, 5, 4
    steps = Steps.packed(torch.tensor([3, 2, 2]))
    tensors = [torch.randn(*size, dtype=torch.float64) for size in ((7, i), (d, n, h), (d, n, h))]
    weights = [torch.randn(4 * h, size, dtype=torch.float64) for size in (i, h) * d]
    leaves = [tensor.requires_grad_() for tensor in (*tensors, *weights)]
    grads = {}
    for name in ("triton", "reference"):
        x, h_0, c_0, *rest = leaves
        pairs = tuple(Weights(rest[2 * k], rest[2 * k + 1]) for k in range(d))
        with fused_rnn.backend(name):
            out, ends, cells = autograd.layer(LSTM, x, steps, (h_0, c_0), pairs, (False, True), None, True)
            loss = out.sum() + sum((end * end).sum() for end in (*ends, cells))
            grads[name] = torch.autograd.grad(loss, leaves)
    for ours, theirs in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "case",
    [
        Case(steps=3, batch=40, hidden=20, reverse=(False, True), d_cells=True),
        Case(steps=5, batch=35, hidden=33, ragged="packed", reverse=(True, False), reset=True),
        Case(steps=4, batch=50, hidden=17, ragged="padded", reset=True, chunk=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize("cell", [name for name in CELLS if name not in TWO_STAGES])
def test_several_tiles_of_a_program(cell: str, each: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program walks several batch tiles side by side; the last one may have fewer."""
    choose = launch.choose

    def several(call: plan.Call, device: plan.Device) -> plan.Plan:
        made = choose(call, device)
        return dataclasses.replace(made, tiles_each=each, tiles_at_once=made.tiles)

    monkeypatch.setattr(launch, "choose", several)
    with regime_of("cooperative", monkeypatch, batch=8):
        check("triton", cell, case, torch.float32)
