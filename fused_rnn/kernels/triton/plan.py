"""How a call is launched: the regime, the tiles, and what they depend on. ``heuristic`` makes plans.

Four regimes, the first three around one kernel body:

=========== ====================================== =========================== =========================================
regime      programs                               weights                     between two steps
=========== ====================================== =========================== =========================================
resident    one for each batch tile                in shared memory, all steps nothing: the program is alone
cooperative one for each slice of units            in shared memory, all steps a barrier among the programs of a tile
stepwise    one for each slice of units            read again in each step     the end of a launch
library     one for each tile of units and rows    read by torch.matmul        the end of a launch
=========== ====================================== =========================== =========================================

A plan is made of numbers alone, so that it can be looked at, forced, tested and compiled without a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fused_rnn.cells import Cell

REGIMES = ("resident", "cooperative", "stepwise", "library")

# Numbers of h that the registers of a program have room for beside the sums; and the K beyond which there is less room, because
# the unrolled product keeps more addresses. Read from compiled code.
_AHEAD_NUMBERS = 1 << 13
_WIDE = 512


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
        tf32: whether float32 products may be rounded to TF32.
    """

    cell: Cell
    backward: bool
    hidden: int
    batch: int
    directions: int
    dtype: torch.dtype
    projected: bool = False
    tf32: bool = False


@dataclass(frozen=True)
class Plan:
    """How a call is launched.

    Attributes:
        regime: one of ``REGIMES``.
        units: hidden units of a program.
        batch: sequences of a program.
        chunk: columns of K that one product takes.
        chunks: how many of them make up K (per gate in the backward).
        slices: programs that share a batch tile of one recurrence.
        tiles: batch tiles.
        tiles_at_once: batch tiles of one launch.
        directions_at_once: recurrences of one launch.
        split: parts of K that are products of their own, in the backward.
        warps: warps of a program.
        reason: why this regime, for people.
    """

    regime: str
    units: int
    batch: int
    chunk: int
    chunks: int
    slices: int
    tiles: int
    tiles_at_once: int
    directions_at_once: int
    split: int
    stacked: bool
    warps: int
    reason: str

    @property
    def width(self) -> int:
        """K, padded."""
        return self.chunk * self.chunks

    @property
    def unrolled(self) -> bool:
        """Whether the kernel holds its weights, chunk by chunk, so that their number is a constant of its code."""
        return self.regime in ("resident", "cooperative")

    @property
    def ahead(self) -> int:
        """Chunks of h that the forward has under way at once, in the registers of the program."""
        room = _AHEAD_NUMBERS if self.width <= _WIDE else _AHEAD_NUMBERS // 2
        return min(self.chunks, max(1, room // (self.chunk * self.batch)))

    @property
    def launches(self) -> int:
        """Launches that it takes to have every tile walked once."""
        return math.ceil(self.tiles / self.tiles_at_once)


_forced: contextvars.ContextVar[dict[str, object] | None] = contextvars.ContextVar("fused_rnn_triton_plan", default=None)


@contextlib.contextmanager
def force(**fields: object) -> Iterator[None]:
    """Make every plan inside the ``with`` block have these fields, such as ``regime="stepwise"`` or ``batch=32``.

    Raises:
        TypeError: if a plan cannot be asked for such a field.
        ValueError: if there is no such regime. That a regime does not fit raises where the plan is made.
    """
    unknown = set(fields) - {"regime", "units", "batch", "warps"}
    if unknown:
        raise TypeError(f"force(): expected regime, units, batch or warps, got {', '.join(sorted(unknown))}")
    if fields.get("regime", "library") not in REGIMES:
        raise ValueError(f"force(): regime: expected one of {', '.join(REGIMES)}, got {fields['regime']!r}")
    token = _forced.set(fields)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> dict[str, object] | None:
    """What ``force`` asks for here, or None."""
    return _forced.get()


def explain(call: Call, plan: Plan) -> str:
    """One line on a plan, for people."""
    walk = "backward" if call.backward else "forward"
    sizes = f"H={call.hidden} N={call.batch} D={call.directions} {str(call.dtype).removeprefix('torch.')}"
    tiles = f"{plan.units} units × {plan.batch} sequences per program, {plan.warps} warps"
    return f"{call.cell.name} {walk} {sizes}: {plan.regime} ({tiles}): {plan.reason}"
