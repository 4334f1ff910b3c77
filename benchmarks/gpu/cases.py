"""What is measured on a GPU, as data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

HIDDEN = (64, 128, 256, 512, 768, 1024, 1536)
BATCH = (1, 16, 64, 256, 1024)
STEPS = (128, 1024)
CELLS = ("lstm", "gru")
DTYPES = ("bfloat16", "float16", "float32")
EXTRAS = ("plain", "reset", "ragged")

# Where resets and ragged lengths are measured: they touch every kernel, but not every size anew.
EXTRA_HIDDEN, EXTRA_BATCH = (64, 512, 1024), (16, 256)
QUICK_HIDDEN, QUICK_BATCH = (128, 512, 1024), (16, 256)


@dataclass(frozen=True)
class Case:
    """One layer of I = H.

    Attributes:
        cell: ``"lstm"`` or ``"gru"``.
        hidden, batch, steps: H, B, T.
        dtype: of input and weights.
        directions: 1 or 2.
        extra: ``"plain"``, ``"reset"`` (1 % of the steps start anew) or ``"ragged"`` (a PackedSequence of lengths T/2 .. T).
    """

    cell: str
    hidden: int
    batch: int
    steps: int
    dtype: str
    directions: int = 1
    extra: str = "plain"

    @property
    def name(self) -> str:
        """Such as ``lstm-bfloat16-H512-B16-T1024-D2-reset``."""
        extra = "" if self.extra == "plain" else f"-{self.extra}"
        return f"{self.cell}-{self.dtype}-H{self.hidden}-B{self.batch}-T{self.steps}-D{self.directions}{extra}"

    @property
    def gates(self) -> int:
        """G."""
        return {"lstm": 4, "gru": 3}[self.cell]

    @property
    def training_bytes(self) -> int:
        """About the memory that one training step holds at once: gates and their gradients, input, output, their gradients."""
        columns = self.directions * self.hidden * (2 * self.gates + 6)
        return self.steps * self.batch * columns * (4 if self.dtype == "float32" else 2)


def select(quick: bool) -> list[Case]:
    """All cases, those first that say most: a run that ends early has covered every kind of case."""
    if quick:
        cases = [Case(c, h, b, 128, "bfloat16") for c, h, b in itertools.product(CELLS, QUICK_HIDDEN, QUICK_BATCH)]
        others = [Case("lstm", 512, 16, 128, dtype) for dtype in DTYPES[1:]]
        extras = [Case(cell, 512, 16, 128, "bfloat16", 1, extra) for cell in CELLS for extra in EXTRAS[1:]]
        both = [Case(cell, 512, 256, 128, "bfloat16", 2) for cell in CELLS]
        return [*cases, *others, *extras, *both]
    goals = [Case("lstm", 768, 16, 1024, dtype) for dtype in DTYPES]
    goals += [Case(cell, 512, 16, 1024, "bfloat16", 1, "reset") for cell in CELLS]
    plain = [
        Case(cell, h, b, t, dtype, d)
        for t, dtype, d, cell, b, h in itertools.product(STEPS, DTYPES, (1, 2), CELLS, BATCH, HIDDEN)
    ]
    extras = [
        Case(cell, h, b, t, "bfloat16", d, extra)
        for extra, t, d, cell, b, h in itertools.product(EXTRAS[1:], STEPS, (1, 2), CELLS, EXTRA_BATCH, EXTRA_HIDDEN)
    ]
    first = [case for case in plain if case.steps == STEPS[0] and case.dtype == "bfloat16"]
    return list(dict.fromkeys([*goals, *first, *extras, *plain]))
