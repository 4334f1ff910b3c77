"""What the tests without a GPU compile: the heuristic's own choices, a few that stand for all, or as many as one asks for."""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Sequence

import torch
from triton_support import Configuration

from fused_rnn.cells import CELLS
from fused_rnn.kernels.triton.heuristic import choose
from fused_rnn.kernels.triton.plan import Call, Device, Plan

# The forms of a product: of 16 bits, of float32 in two planes where the switch allows it, and in three.
Form = tuple[torch.dtype, bool]
BFLOAT16, FLOAT16, TWO_PLANES, THREE_PLANES, FLOAT64 = (
    (torch.bfloat16, False),
    (torch.float16, False),
    (torch.float32, True),
    (torch.float32, False),
    (torch.float64, False),
)
FORMS = (BFLOAT16, TWO_PLANES, THREE_PLANES)

# How many of the heuristic's choices are drawn at random for each chip beside those that stand for all; new ones at each run.
DRAWN = int(os.environ.get("FUSED_RNN_TRITON_DRAWN", "0"))

_HIDDEN = (1, *range(32, 257, 32), *range(320, 1025, 64), *range(1152, 2561, 128), 4096)
_BATCH = (1, 16, 33, 64, 256, 1024, 4096)


@functools.cache
def _choices(chip: Device, cell: str, backward: bool, form: Form) -> list[tuple[Call, Plan]]:
    """All that the heuristic chooses for many sizes, whose rows are aligned."""
    found = []
    for hidden, batch in itertools.product(_HIDDEN, _BATCH):
        call = Call(CELLS[cell], backward, hidden, batch, 1, form[0], tf32=form[1])
        found.append((call, choose(call, chip)))
    return found


def _work(plan: Plan) -> tuple[int, ...]:
    """What a program has in registers: the more, the sooner they do not suffice."""
    return (plan.planes * plan.piles * plan.parts * plan.batch, plan.units * plan.batch, plan.warps)


def largest(
    chip: Device, cell: str, backward: bool, form: Form, regime: str, aligned: bool, narrow: bool
) -> Configuration | None:
    """The choice with the most work for a program, or None if the regime is not chosen.

    narrow: of those with the fewest sequences a program. Without alignment H is one less: rows then begin anywhere.
    """
    found = [(call, plan) for call, plan in _choices(chip, cell, backward, form) if plan.regime == regime]
    if not found:
        return None
    if narrow:
        least = min(plan.batch for _, plan in found)
        found = [(call, plan) for call, plan in found if plan.batch == least]
    call, plan = max(found, key=lambda each: _work(each[1]))
    if not aligned:
        odd = Call(call.cell, backward, max(1, call.hidden - 1), call.batch, 1, call.dtype, tf32=call.tf32)
        other = choose(odd, chip)
        # A size beside the edge may be another's.
        call, plan = (odd, other) if other.regime == regime else (call, plan)
    return Configuration(call, plan, chip)


def representative(
    chip: Device, cells: Sequence[str], forms: Sequence[Form], regimes: Sequence[str], aligned: bool
) -> list[Configuration]:
    """The largest choice of each cell, walk, form and regime; of the widest or the narrowest tile, and aligned or not, in turn.

    With ``aligned`` negated each is what it was not before.
    """
    found = []
    for i, (cell, backward, form) in enumerate(itertools.product(cells, (False, True), forms)):
        for j, regime in enumerate(regimes):
            narrow = aligned == ((i // 2 + i) % 2 == 0)
            made = largest(chip, cell, backward, form, regime, aligned == ((i + j) % 2 == 0), narrow)
            if made is not None:
                found.append(made)
    return list(dict.fromkeys(found))


def drawn(chip: Device, count: int = DRAWN) -> list[Configuration]:
    """Choices for sizes drawn at random, no kernel twice. The seed is one for all processes of a test run."""
    draw = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID", os.urandom(8).hex()))
    found: dict[tuple[object, ...], Configuration] = {}
    while len(found) < count:
        hidden = draw.choice([draw.randint(1, 300), draw.randint(1, 2600), 16 * draw.randint(1, 300)])
        batch, directions = draw.choice([draw.randint(1, 99), draw.randint(1, 6000)]), draw.randint(1, 2)
        dtype, tf32 = draw.choice([*FORMS, FLOAT16, FLOAT64])
        call = Call(draw.choice(list(CELLS.values())), draw.random() < 0.5, hidden, batch, directions, dtype, tf32=tf32)
        made = choose(call, chip)
        sizes = (made.regime, made.units, made.batch, made.warps, made.parts, made.held, hidden % 16 == 0)
        found.setdefault((call.cell.name, call.backward, dtype, tf32, *sizes), Configuration(call, made, chip))
    return list(found.values())
