"""Launches whose programs do meet, several at a time and in adverse orders, against the reference in float64.

And what those orders are worth: with a barrier that is broken, they give a wrong result or find that nobody goes on.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import schedules
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from walks_support import Case, check, make_inputs, run

from fused_rnn.kernels.triton import fragment_backward, fragment_forward, launch, plan, standin, walk_backward, walk_forward
from fused_rnn.kernels.triton.plan import Device

CHIP = Device("a chip", (9, 0), 32, 227 << 10)
SCHEDULES = {
    "first ahead": schedules.first_ahead,
    "last ahead": schedules.last_ahead,
    "in turn": schedules.in_turn,
    "at random": schedules.at_random(0),
}
REGIMES = ("cooperative", "streamed")
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_regime = pytest.mark.parametrize("regime", REGIMES)
RAGGED = Case(steps=5, batch=18, hidden=20, ragged="packed", reverse=(True, False), reset=True, padding=3)


@pytest.fixture(autouse=True)
def _chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip on which programs run at the same time."""
    monkeypatch.setattr(launch, "device_of", lambda device: CHIP)


def meet(monkeypatch: pytest.MonkeyPatch, schedule: str, regime: str, cell: str, case: Case, **fields: int) -> schedules.Seen:
    """Check a case in a regime whose programs meet, 16 units each unless said otherwise."""
    forced = {"units": 16, **fields}
    with plan.force(regime=regime, **forced), schedules.together(monkeypatch, SCHEDULES[schedule]) as seen:
        check("triton", cell, case, torch.float32)
    return seen


@every_schedule
@every_regime
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_programs_meet(cell: str, regime: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs share each direction, forward and backward."""
    case = Case(steps=3, batch=2, hidden=33, reverse=(False, True))
    assert meet(monkeypatch, schedule, regime, cell, case).programs == [6, 6]


@pytest.mark.parametrize("schedule", ["last ahead", "at random"])
@every_regime
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_ragged_rows_and_resets(cell: str, regime: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs a tile; several tiles, some with steps that have no row; resets; both directions; all in one launch."""
    # More sequences than the least tile of each regime has.
    case = dataclasses.replace(RAGGED, batch={"cooperative": 10, "streamed": 18}[regime])
    assert meet(monkeypatch, schedule, regime, cell, case).programs == [8, 8]


@pytest.mark.parametrize("schedule", ["first ahead", "at random"])
@every_regime
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_four_programs_and_a_walk_in_parts(cell: str, regime: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(steps=4, batch=2, hidden=64, ragged="padded", chunk=2, reset=True, d_cells=True)
    assert meet(monkeypatch, schedule, regime, cell, case).programs == [4] * 4


@pytest.mark.parametrize(
    ("schedule", "hidden", "warps"), [("first ahead", 33, 8), ("last ahead", 65, 4), ("at random", 100, 8)]
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_slices_of_the_product(cell: str, schedule: str, hidden: int, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warps' slices of K begin and end between the gates of 32 units, or have several of those; programs arrive at each."""
    case = Case(steps=3, batch=3, hidden=hidden)
    assert meet(monkeypatch, schedule, "cooperative", cell, case, warps=warps).programs == [-(-hidden // 16)] * 2


@pytest.mark.parametrize("schedule", ["first ahead", "last ahead", "at random"])
@pytest.mark.parametrize("ragged", [None, "packed"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_several_tiles_of_a_program(cell: str, ragged: str | None, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip that has no room for a program for each: three tiles in turn, of which the last has few sequences."""
    monkeypatch.setattr(launch, "device_of", lambda device: dataclasses.replace(CHIP, processors=4))
    case = Case(steps=4, batch=19, hidden=20, ragged=ragged, reset=True, reverse=(False, True), d_cells=True)
    assert meet(monkeypatch, schedule, "cooperative", cell, case, batch=8, warps=8).programs == [4, 4]


@pytest.mark.parametrize(("units", "batch"), [(16, 8), (16, 16), (16, 32), (8, 8), (8, 16)])
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
def test_tiles(cell: str, units: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one matrix instruction and of several sequences more, of as many rows and of fewer; some have no sequence."""
    case = Case(steps=3, batch=9, hidden=36)
    programs = -(-36 // units) * -(-9 // batch)
    assert meet(monkeypatch, "at random", "cooperative", cell, case, units=units, batch=batch).programs == [programs] * 2


@pytest.mark.parametrize("held", [0, 1, 5])
@pytest.mark.parametrize("tf32", [False, True], ids=["three planes", "two planes"])
@pytest.mark.parametrize(("cell", "regime"), [("gru", "cooperative"), ("lstm", "cooperative"), ("lstm", "resident")])
def test_weights_in_shared_memory(cell: str, regime: str, tf32: bool, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, however many of the weights' tiles the registers hold."""
    case, choose = Case(steps=2, batch=3, hidden=40), launch.choose
    monkeypatch.setattr(launch, "allows_tf32", lambda: tf32)
    inputs, found, plans, most = make_inputs(cell, case), [], [], [1000, held]

    def some(call: plan.Call, device: Device) -> plan.Plan:
        made = choose(call, device)
        tiles = made.planes * (call.cell.num_gates if made.alone else made.piles * made.parts)
        plans.append(made)
        return dataclasses.replace(made, held=min(tiles, most[len(found)]))

    monkeypatch.setattr(launch, "choose", some)
    for _ in most:
        with plan.force(regime=regime, warps=2), schedules.together(monkeypatch, schedules.first_ahead):
            found.append(run("triton", cell, case, inputs, torch.float32))
    assert {made.planes for made in plans} == {2 if tf32 else 3}
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@triton.jit
def never_wait(p_counter, needed, i_warp):
    pass


@triton.jit
def wait_for_all_but_one(p_counter, needed, i_warp):
    standin.wait_each(p_counter + i_warp, needed - 1)


@triton.jit
def wait_for_one_too_many(p_counter, needed, i_warp):
    standin.wait_each(p_counter + i_warp, tl.where(needed > 0, needed + 1, 0))


@triton.jit
def wait_for_the_slice_before(p_counter, needed, i_warp):
    standin.wait_each(p_counter + tl.maximum(i_warp - 1, 0), needed)


@triton.jit
def wait_for_the_first_slice(p_counter, needed, i_warp):
    standin.wait_each(p_counter + i_warp, tl.where(i_warp == 0, needed, 0))


@triton.jit
def never_arrive(p_counter, i_u, GATES: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr):
    pass


@triton.jit
def arrive_without_publishing(p_counter, i_u, GATES: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr):
    part = i_u * UNITS // 32 * GATES
    for gate in tl.static_range(GATES):
        if gate == 0 or (part + gate) % PARTS == 0:
            tl.atomic_add(p_counter + (part + gate) // PARTS, 1, sem="relaxed", scope="gpu")


@triton.jit
def arrive_at_one_slice(p_counter, i_u, GATES: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr):
    tl.atomic_add(p_counter + i_u * UNITS // 32 * GATES // PARTS, 1, sem="release", scope="gpu")


@triton.jit
def never_wait_streamed(p_counter, programs):
    pass


@triton.jit
def wait_for_all_but_one_streamed(p_counter, programs):
    while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < programs - 1:
        pass


@triton.jit
def wait_for_one_too_many_streamed(p_counter, programs):
    while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < programs + 1:
        pass


@triton.jit
def never_arrive_streamed(p_counter):
    pass


@triton.jit
def arrive_without_publishing_streamed(p_counter):
    tl.atomic_add(p_counter, 1, sem="relaxed", scope="gpu")


SMALL = Case(steps=3, batch=2, hidden=33)
WALKS = {
    ("cooperative", "forward"): fragment_forward,
    ("cooperative", "backward"): fragment_backward,
    ("streamed", "forward"): walk_forward,
    ("streamed", "backward"): walk_backward,
}
# How it shows: numbers that are wrong, or programs of which none goes on.
WRONG, STUCK = (AssertionError, "error"), (InterpreterError, "wait for one another")
# What is broken, with what of each regime, and how it shows.
BROKEN = {
    "no wait": ("wait", never_wait, never_wait_streamed, WRONG),
    "all but one": ("wait", wait_for_all_but_one, wait_for_all_but_one_streamed, WRONG),
    "one too many": ("wait", wait_for_one_too_many, wait_for_one_too_many_streamed, STUCK),
    "no arrival": ("arrive", never_arrive, never_arrive_streamed, STUCK),
    "not published": ("arrive", arrive_without_publishing, arrive_without_publishing_streamed, WRONG),
}


@pytest.mark.parametrize(("walk", "broken"), list(itertools.product(WALKS, BROKEN)))
@pytest.mark.parametrize(("cell", "schedule"), [("lstm", "first ahead"), ("gru", "last ahead")])
def test_a_broken_barrier_shows(
    cell: str, schedule: str, walk: tuple[str, str], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the walk that has it, and under orders that nobody chose for it."""
    name, cooperative, streamed, (error, message) = BROKEN[broken]
    monkeypatch.setattr(WALKS[walk], name, cooperative if walk[0] == "cooperative" else streamed)
    with pytest.raises(error, match=message):
        meet(monkeypatch, schedule, walk[0], cell, SMALL)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("wait", [wait_for_the_slice_before, wait_for_the_first_slice], ids=lambda wait: wait.__name__)
@pytest.mark.parametrize("walk", ["forward", "backward"])
def test_the_wrong_slice_shows(walk: str, wait: object, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp that waits for the programs of another slice reads what its own have not written, or waits for ever."""
    monkeypatch.setattr(WALKS["cooperative", walk], "wait", wait)
    with pytest.raises((AssertionError, InterpreterError), match=r"error|wait for one another"):
        # The first two programs write the first of two slices, the third one the other.
        meet(monkeypatch, "first ahead", "cooperative", cell, SMALL, warps=2)


@pytest.mark.parametrize(("cell", "warps"), [("lstm", 8), ("lstm", 4), ("gru", 8), ("gru", 4)])
def test_an_arrival_at_one_of_several_slices_shows(cell: str, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward the gates of 32 units may lie in several slices of K, and each of them waits."""
    monkeypatch.setattr(fragment_backward, "arrive", arrive_at_one_slice)
    with pytest.raises(InterpreterError, match="wait for one another"):
        meet(monkeypatch, "in turn", "cooperative", cell, SMALL, warps=warps)


@every_regime
def test_what_is_not_published_is_not_seen(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of these tests is as weak as it says: were it strong, an order exists in which nobody would notice."""
    broken = arrive_without_publishing if regime == "cooperative" else arrive_without_publishing_streamed
    monkeypatch.setattr(WALKS[regime, "forward"], "arrive", broken)
    monkeypatch.setattr(schedules._Launch, "stored", lambda self, *args: schedules._memory.store(*args) or self.switch())
    meet(monkeypatch, "first ahead", regime, "gru", SMALL)
