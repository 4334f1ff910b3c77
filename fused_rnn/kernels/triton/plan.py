"""How a call is launched: the regime, the tiles, and what they depend on. ``heuristic`` makes plans.

Four regimes. The first two are the two forms of one kernel (``fragments``), the others share another (``walk_forward``):

=========== ================================ ============================== ========================================
regime      programs                         weights                        between two steps
=========== ================================ ============================== ========================================
resident    one for each batch tile          in registers, all steps        nothing: the program is alone
cooperative one for each slice of units      in registers, all steps        each waits for those that it reads from
streamed    one for each slice of units      read again in each step        a barrier among the programs of a tile
library     one for each tile of units/rows  read by torch.matmul           the end of a launch
=========== ================================ ============================== ========================================

A plan is made of numbers alone, so that it can be looked at, forced, tested and compiled without a GPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fused_rnn.data.cell import Cell

# Columns of K that one tile of the weights in registers has, and rows: those of a matrix instruction (``fragments``).
PART, PILE = 32, 16

REGIMES = ("resident", "cooperative", "streamed", "library")


@dataclass(frozen=True)
class Device:
    """What a plan depends on.

    Attributes:
        name: as the driver gives it; the key of the tuned table.
        capability: compute capability, such as (9, 0).
        processors: streaming multiprocessors.
        shared_bytes: most shared memory of one program.
        interpreted: whether Triton's interpreter stands in for it, which runs one program after another.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    interpreted: bool = False


@dataclass(frozen=True)
class Call:
    """What is to be planned.

    Attributes:
        cell: which cell.
        backward: the backward, or the forward.
        hidden: H.
        batch: N.
        directions: D.
        dtype: of the row buffers.
        projected: whether h is projected.
        tf32: whether float32 products may be rounded as cuDNN rounds them.
    """

    cell: Cell
    backward: bool
    hidden: int
    batch: int
    directions: int
    dtype: torch.dtype
    projected: bool = False
    tf32: bool = False

    @property
    def planes(self) -> int:
        """Numbers of 16 bits that one of this dtype is cut into for a product (``fragments``)."""
        if self.dtype.itemsize == 2:
            return 1
        return 2 if self.tf32 else 3


@dataclass(frozen=True)
class Plan:
    """How a call is launched.

    Attributes:
        regime: one of ``REGIMES``.
        units: hidden units of a program.
        batch: sequences of a program.
        warps: warps of a program.
        slices: programs that share a batch tile of one recurrence.
        tiles: batch tiles.
        tiles_at_once: batch tiles of one launch.
        tiles_each: batch tiles of one program: while the exchange of one is under way, another is computed.
        directions_at_once: recurrences of one launch.
        planes: see ``Call.planes``.
        piles: rows of the product of one part of K, in instructions (``fragments``).
        parts: parts of K that a warp multiplies.
        held: tiles of the weights in registers, all planes counted; the others are in shared memory.
        chunk: columns of K that one product of the streamed regime takes.
        stacked: whether the gates of the streamed forward are one product.
        reason: why this regime, for people.
    """

    regime: str
    units: int
    batch: int
    warps: int
    slices: int
    tiles: int
    tiles_at_once: int
    directions_at_once: int
    tiles_each: int = 1
    planes: int = 1
    piles: int = 1
    parts: int = 1
    held: int = 0
    chunk: int = 16
    stacked: bool = False
    reason: str = ""

    @property
    def alone(self) -> bool:
        """Whether one program has all units."""
        return self.regime == "resident"

    @property
    def fragments(self) -> bool:
        """Whether the kernels that hold the weights in registers run it."""
        return self.regime in ("resident", "cooperative")

    @property
    def ahead(self) -> int:
        """Parts of K whose loads are under way at once; fewer where a warp has more of the weights in its registers."""
        most = 8 if self.warps >= 8 else 4
        return max(1, most * 16 // max(16, self.batch) // self.planes)

    @property
    def kernel(self) -> tuple[object, ...]:
        """What of a plan its kernels are compiled for, beside what they are launched with."""
        own = (self.regime, self.warps, self.planes, self.piles, self.parts, self.held, self.ahead)
        return (*own, self.units, self.batch, self.chunk, self.stacked)

    @property
    def columns(self) -> int:
        """Of K, padded, where it is exchanged between the kernels that hold the weights in registers."""
        return self.warps * self.parts * PART

    @property
    def meets(self) -> bool:
        """Whether programs wait for one another, so that all of a launch must run at once."""
        return self.regime in ("cooperative", "streamed")

    @property
    def launches(self) -> int:
        """Launches that it takes to have every tile of as many recurrences as fit walked once."""
        return math.ceil(self.tiles / self.tiles_at_once)


def refusal(cell: Cell) -> str | None:
    """Why no plan serves a cell, or None where one does."""
    if cell.cell_state is not None and cell.direct:
        return f"the Triton kernels carry one state beside the product, not both of {cell.states}"
    return None


def power_of_two(number: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()


_FIELDS = ("regime", "units", "batch", "warps")
# Of the process, not of a thread or task: on a GPU autograd runs the backward in a thread of its own.
_forced: list[dict[str, object]] = []


@contextlib.contextmanager
def force(**fields: object) -> Iterator[None]:
    """Make every plan of the process have these fields until the ``with`` block ends, such as ``regime="streamed"``.

    Raises:
        TypeError: if a plan cannot be asked for such a field.
        ValueError: if there is no such regime. That a regime does not fit raises where the plan is made.
    """
    unknown = set(fields) - set(_FIELDS)
    if unknown:
        raise TypeError(f"force(): expected regime, units, batch or warps, got {', '.join(sorted(unknown))}")
    if fields.get("regime", "library") not in REGIMES:
        raise ValueError(f"force(): regime: expected one of {', '.join(REGIMES)}, got {fields['regime']!r}")
    _forced.append(fields)
    try:
        yield
    finally:
        _forced.remove(fields)


def forced() -> dict[str, object] | None:
    """What ``force`` asks for, or None."""
    return _forced[-1] if _forced else None


def explain(call: Call, plan: Plan) -> str:
    """One line on a plan, for people."""
    walk = "backward" if call.backward else "forward"
    sizes = f"H={call.hidden} N={call.batch} D={call.directions} {str(call.dtype).removeprefix('torch.')}"
    tiles = f"{plan.units} units × {plan.batch} sequences per program, {plan.warps} warps"
    return f"{call.cell.name} {walk} {sizes}: {plan.regime} ({tiles}): {plan.reason}"
