"""What is measured on a GPU, as data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

HIDDEN = (64, 128, 256, 512, 768, 1024, 1536)
BATCH = (1, 16, 64, 256, 1024)
STEPS = (128, 1024)
CELLS = ("lstm", "gru", "rnn_tanh")
DTYPES = ("bfloat16", "float32", "float16")
EXTRAS = ("plain", "reset", "ragged")

# Where resets and ragged lengths are measured: they touch every kernel, but not every size anew.
EXTRA_HIDDEN, EXTRA_BATCH = (64, 512, 1024), (16, 256)
QUICK_HIDDEN, QUICK_BATCH = (128, 512, 1024), (16, 256)

# Sizes in the order in which they say most about the others: the middle first, the ends last.
_HIDDEN_ORDER = (512, 128, 1024, 256, 768, 64, 1536)
_BATCH_ORDER = (16, 256, 64, 1, 1024)


@dataclass(frozen=True)
class Case:
    """One layer of I = H.

    Attributes:
        cell: one of ``CELLS``.
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
        return {"lstm": 4, "gru": 3, "rnn_tanh": 1}[self.cell]

    @property
    def training_bytes(self) -> int:
        """About the memory that one training step holds at once: gates and their gradients, input, output, their gradients."""
        columns = self.directions * self.hidden * (2 * self.gates + 6)
        return self.steps * self.batch * columns * (4 if self.dtype == "float32" else 2)


def goals() -> list[Case]:
    """The cases that the kernels are made for, and those that were slow or refused once."""
    cases = [Case("lstm", 768, 16, 1024, dtype) for dtype in ("bfloat16", "float16", "float32")]
    cases += [Case(cell, 128, b, 128, "bfloat16") for b in (16, 64) for cell in ("lstm", "gru")]
    cases += [Case("gru", 128, 64, 128, "float32"), Case("lstm", 1024, 256, 128, "bfloat16")]
    cases += [Case(cell, 512, 16, 1024, "bfloat16", 1, "reset") for cell in ("lstm", "gru")]
    cases += [Case("lstm", h, b, 128, "float32") for h, b in ((512, 64), (256, 32), (1024, 16))]
    cases += [Case("lstm", 1024, 16, 128, "bfloat16")]
    cases += [Case("lstm", h, 16, 128, "float16") for h in (768, 512)]
    return cases


def unrolled() -> list[Case]:
    """Few steps: what the loop over cells under torch.compile is measured on, which it unrolls."""
    return [Case(cell, h, b, 16, "bfloat16") for cell in CELLS for h, b in ((128, 64), (512, 16))]


def select(quick: bool) -> list[Case]:
    """All cases, those first that say most: a run that ends early has covered every kind of case."""
    kinds = [Case(cell, 512, 16, 128, "bfloat16", 1, extra) for cell in CELLS for extra in EXTRAS[1:]]
    kinds += [Case(cell, 512, 256, 128, "bfloat16", 2) for cell in CELLS]
    # As the goals with resets, in the dtype that TorchRL's kernels take.
    kinds += [Case(cell, 512, 16, 128 if quick else 1024, "float32", 1, "reset") for cell in ("lstm", "gru")]
    if quick:
        cases = [Case(c, h, b, 128, "bfloat16") for c, h, b in itertools.product(CELLS, QUICK_HIDDEN, QUICK_BATCH)]
        others = [Case("lstm", 512, 16, 128, dtype) for dtype in DTYPES[1:]]
        return [*cases, *others, *kinds]
    plain = [
        Case(cell, h, b, t, dtype, d) for t, d, (h, b), dtype, cell in itertools.product(STEPS, (1, 2), _sizes(), DTYPES, CELLS)
    ]
    extras = [
        Case(cell, h, b, t, "bfloat16", d, extra)
        for t, d, b, h, extra, cell in itertools.product(STEPS, (1, 2), EXTRA_BATCH, EXTRA_HIDDEN, EXTRAS[1:], CELLS)
    ]
    first = [case for case in plain if (case.steps, case.directions) == (STEPS[0], 1)]
    second = [case for case in extras if case.steps == STEPS[0]]
    return list(dict.fromkeys([*goals(), *kinds, *first, *second, *plain, *extras]))


def _sizes() -> list[tuple[int, int]]:
    """(H, B) in diagonals: any five in a row have all B, and soon all H."""
    count = len(_HIDDEN_ORDER)
    return [(_HIDDEN_ORDER[(i + k) % count], b) for k in range(count) for i, b in enumerate(_BATCH_ORDER)]
