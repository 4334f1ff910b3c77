"""The launches of one walk, in the way of its plan, with the arguments that all of them share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fused_rnn.kernels.triton.plan import Plan
from fused_rnn.kernels.triton.version import INTERPRETED
from fused_rnn.steps import Steps


def _guard(like: Tensor) -> Any:
    return torch.cuda.device(like.device) if like.device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class Ragged:
    """On the device: steps of each sequence (N,), and first row of each step (T,)."""

    lengths: Tensor
    offsets: Tensor


def ragged(steps: Steps, device: torch.device) -> Ragged | None:
    """The rows of the steps, for the kernels; None for a dense batch."""
    if steps.batch_sizes is None or steps.offsets is None:
        return None
    # batch_sizes never grows: a sequence has as many steps as have more rows than its number.
    shorter = torch.searchsorted(steps.batch_sizes.flip(0).contiguous(), torch.arange(steps.batch), right=True)
    return Ragged((steps.length - shorter).to(device), steps.offsets.contiguous().to(device))


class Walk:
    """One call's arguments that every launch shares, and the launches."""

    def __init__(self, plan: Plan, reverse: Sequence[bool], steps: Steps, reset: Tensor | None, like: Tensor) -> None:
        self.plan, self.steps, self.like = plan, steps, like
        self.directions = len(reverse)
        self.reverse_bits = sum(1 << d for d, backwards in enumerate(reverse) if backwards)
        self.rows = ragged(steps, like.device)
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        self.counters = like.new_zeros(0, dtype=torch.int32)

    def launch(self, kernel: Any, last: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """Walk steps 0 .. last - 1 in the plan's way."""
        plan = self.plan
        meet = plan.regime == "cooperative"
        if meet:
            self.counters = torch.zeros(self.directions * plan.tiles * (last + 1), dtype=torch.int32, device=self.like.device)
        if plan.regime == "stepwise":
            for s in range(last):
                self.run(kernel, s, s + 1, arguments, options)
            return
        for first_d in range(0, self.directions, plan.directions_at_once):
            count_d = min(plan.directions_at_once, self.directions - first_d)
            for first_tile in range(0, plan.tiles, plan.tiles_at_once):
                count = min(plan.tiles_at_once, plan.tiles - first_tile)
                self.run(kernel, 0, last, arguments, options, (first_tile, count), (first_d, count_d))

    def run(
        self,
        kernel: Any,
        begin: int,
        end: int,
        arguments: dict[str, Any],
        options: dict[str, Any],
        tiles: tuple[int, int] | None = None,
        directions: tuple[int, int] | None = None,
    ) -> None:
        """One launch. tiles, directions: the first, and how many; all where not given."""
        plan = self.plan
        tiles, directions = tiles or (0, plan.tiles), directions or (0, self.directions)
        meet = plan.regime == "cooperative"
        extra = {"launch_cooperative_grid": True} if meet and not INTERPRETED else {}
        # An argument that a launch does not use still needs an address.
        unused = self.like
        with _guard(self.like):
            kernel[(plan.slices, tiles[1], directions[1])](
                p_reset=unused if self.reset is None else self.reset,
                p_lengths=unused if self.rows is None else self.rows.lengths,
                p_offsets=unused if self.rows is None else self.rows.offsets,
                p_counters=self.counters if meet else unused,
                s_begin=begin,
                s_end=end,
                first_tile=tiles[0],
                first_d=directions[0],
                reverse_bits=self.reverse_bits,
                tiles=plan.tiles,
                T=self.steps.length,
                N=self.steps.batch,
                RAGGED=self.rows is not None,
                HAS_RESET=self.reset is not None,
                GIVEN=plan.regime == "library",
                RESIDENT=plan.unrolled,
                MEET=meet,
                UNITS=plan.units,
                BATCH=plan.batch,
                CHUNKS=plan.chunks if plan.unrolled else 1,
                CHUNK=plan.chunk,
                COMPUTE=tl.float64 if self.like.dtype == torch.float64 else tl.float32,
                num_warps=plan.warps,
                # No load of a step may be moved before the barrier of the step before. What may overlap says so itself.
                num_stages=1,
                # A product and a sum in one instruction; said here because Triton's default is about to change.
                enable_fp_fusion=True,
                **arguments,
                **options,
                **extra,
            )
