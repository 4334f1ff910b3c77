"""Cooperative launches whose programs do meet, several at a time and in adverse orders, against the reference in float64.

And what those orders are worth: with a barrier that is broken, they give a wrong result or find that nobody goes on.
"""

from __future__ import annotations

import itertools

import pytest
import schedules
import torch
import triton
import triton.language as tl
from test_kernels import Case, check
from triton.runtime.errors import InterpreterError

from fused_rnn.cells import CELLS
from fused_rnn.kernels.triton import barrier, launch, plan, walk_backward, walk_forward
from fused_rnn.kernels.triton.plan import Device

CHIP = Device("a chip", (9, 0), 16, 227 << 10)
SCHEDULES = {
    "first ahead": schedules.first_ahead,
    "last ahead": schedules.last_ahead,
    "in turn": schedules.in_turn,
    "at random": schedules.at_random(0),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
RAGGED = Case(steps=5, batch=18, hidden=20, ragged="packed", reverse=(True, False), reset=True, padding=3)


@pytest.fixture(autouse=True)
def _chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip on which programs run at the same time."""
    monkeypatch.setattr(launch, "device_of", lambda device: CHIP)


def meet(monkeypatch: pytest.MonkeyPatch, schedule: str, cell: str, case: Case) -> schedules.Seen:
    """Check a case in the cooperative regime."""
    with plan.force(regime="cooperative", units=16), schedules.together(monkeypatch, SCHEDULES[schedule]) as seen:
        check("triton", cell, case, torch.float32)
    return seen


@every_schedule
@pytest.mark.parametrize("cell", CELLS)
def test_programs_meet(cell: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs share each direction, forward and backward."""
    case = Case(steps=3, batch=2, hidden=33, reverse=(False, True))
    assert meet(monkeypatch, schedule, cell, case).programs == [6, 6]


@pytest.mark.parametrize("schedule", ["last ahead", "at random"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_ragged_rows_and_resets(cell: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs a tile; two tiles, one of which has steps without a row; resets; both directions; all in one launch."""
    assert meet(monkeypatch, schedule, cell, RAGGED).programs == [8, 8]


@pytest.mark.parametrize("schedule", ["first ahead", "at random"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_four_programs_and_a_walk_in_parts(cell: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(steps=4, batch=2, hidden=64, ragged="padded", chunk=2, reset=True, d_cells=cell == "lstm")
    assert meet(monkeypatch, schedule, cell, case).programs == [4] * 4


@pytest.mark.skipif(not hasattr(tl, "atomic_poll"), reason="this Triton has no atomic_poll")
@pytest.mark.parametrize("schedule", ["last ahead", "at random"])
def test_polling(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other body of the wait, which newer Tritons compile."""
    monkeypatch.setattr(barrier, "_HAS_POLL", tl.constexpr(True))
    seen = meet(monkeypatch, schedule, "gru", RAGGED)
    assert seen.programs == [8, 8]
    assert seen.polls > 0


@triton.jit
def never_wait(p_counter, programs):
    pass


@triton.jit
def wait_for_all_but_one(p_counter, programs):
    while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < programs - 1:
        pass


@triton.jit
def wait_too_long(p_counter, programs):
    while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < programs + 1:
        pass


@triton.jit
def never_arrive(p_counter):
    pass


@triton.jit
def arrive_without_publishing(p_counter):
    tl.atomic_add(p_counter, 1, sem="relaxed", scope="gpu")


SMALL = Case(steps=3, batch=2, hidden=33)
WALKS = {"forward": walk_forward, "backward": walk_backward}
# What is broken, with what, and how it shows.
BROKEN = {
    "no wait": ("wait", never_wait, AssertionError, "error"),
    "all but one": ("wait", wait_for_all_but_one, AssertionError, "error"),
    "one too many": ("wait", wait_too_long, InterpreterError, "wait for one another"),
    "no arrival": ("arrive", never_arrive, InterpreterError, "wait for one another"),
    "not published": ("arrive", arrive_without_publishing, AssertionError, "error"),
}


@pytest.mark.parametrize(("walk", "broken"), list(itertools.product(WALKS, BROKEN)))
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_broken_barrier_shows(cell: str, walk: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the walk that has it, and under orders that nobody chose for it."""
    name, function, error, message = BROKEN[broken]
    monkeypatch.setattr(WALKS[walk], name, function)
    for schedule in ("first ahead", "last ahead"):
        with pytest.raises(error, match=message):
            meet(monkeypatch, schedule, cell, SMALL)


def test_what_is_not_published_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of these tests is as weak as it says: were it strong, an order exists in which nobody would notice."""
    monkeypatch.setattr(walk_forward, "arrive", arrive_without_publishing)
    monkeypatch.setattr(schedules._Launch, "stored", lambda self, *args: schedules._memory.store(*args) or self.switch())
    meet(monkeypatch, "first ahead", "gru", SMALL)
