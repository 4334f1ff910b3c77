"""The launches of one walk, in the way of its plan, with the arguments that all of them share.

A launch goes the shortest way that Triton offers once it has compiled the kernel. ``kernel[grid](...)`` binds and inspects all
arguments, some 60 of ours, at each call: that takes longer than a short walk's first steps. What it decides by, types,
alignments and constants, is asked here in less time, and the compiled kernel launched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rnn.data.steps import Steps, keep_if_captured
from fused_rnn.kernels.memory import empties
from fused_rnn.kernels.triton.plan import Plan
from fused_rnn.kernels.triton.version import INTERPRETED

# Numbers to which a pointer or a size is a multiple, or not: what Triton compiles for.
_ALIGNMENT = 16

_compiled: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True)
class Ragged:
    """On the device: steps of each sequence (N,), and first row of each step (T,)."""

    lengths: Tensor
    offsets: Tensor


def ragged(steps: Steps, device: torch.device) -> Ragged | None:
    """The rows of the steps, for the kernels; None for a dense batch."""
    if steps.batch_sizes is None or steps.offsets is None:
        return None
    found = _ragged(steps.batch_sizes.numpy().tobytes(), steps.offsets.numpy().tobytes(), steps.batch, device)
    keep_if_captured(found, device)
    return found


@functools.lru_cache(maxsize=16)
def _ragged(batch_sizes: bytes, offsets: bytes, batch: int, device: torch.device) -> Ragged:
    """Kept, because a CUDA graph cannot hold copies from the host: what ran before a capture has made them."""
    sizes, first = (torch.frombuffer(bytearray(numbers), dtype=torch.int64) for numbers in (batch_sizes, offsets))
    # batch_sizes never grows: a sequence has as many steps as have more rows than its number.
    shorter = torch.searchsorted(sizes.flip(0).contiguous(), torch.arange(batch), right=True)
    return Ragged((len(sizes) - shorter).to(device), first.to(device))


empties(_ragged.cache_clear)


class Walk:
    """One call's arguments that every launch shares, and the launches."""

    def __init__(self, plan: Plan, reverse: Sequence[bool], steps: Steps, reset: Tensor | None, like: Tensor) -> None:
        self.plan, self.steps, self.like = plan, steps, like
        self.directions = len(reverse)
        self.reverse_bits = sum(1 << d for d, backwards in enumerate(reverse) if backwards)
        self.rows = ragged(steps, like.device)
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)

    @property
    def ring_rows(self) -> int:
        """Rows of one slot of the ring: those of all tiles."""
        return self.plan.tiles * self.plan.batch

    def zeros(self, columns: int, planes: int, dtype: torch.dtype, counters: int) -> tuple[Tensor, Tensor]:
        """What programs exchange, (2, planes, D, ring_rows, columns), and counters for so many steps; one fill for both."""
        count = self.directions * self.plan.tiles * counters
        ring_bytes = 2 * planes * self.directions * self.ring_rows * columns * dtype.itemsize
        # The ring first: its rows are read 16 bytes at a time.
        ring_words = -(-ring_bytes // 16) * 4
        memory = torch.zeros(ring_words + count, dtype=torch.int32, device=self.like.device)
        return memory[:ring_words].view(dtype), memory[ring_words:]

    def launch(self, kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """Walk all steps, as many tiles and recurrences at once as the plan says."""
        plan = self.plan
        for first_d in range(0, self.directions, plan.directions_at_once):
            count_d = min(plan.directions_at_once, self.directions - first_d)
            for first_tile in range(0, plan.tiles, plan.tiles_at_once):
                count = min(plan.tiles_at_once, plan.tiles - first_tile)
                self.run(kernel, arguments, options, (first_tile, count), (first_d, count_d))

    def run(
        self,
        kernel: Any,
        arguments: dict[str, Any],
        options: dict[str, Any],
        tiles: tuple[int, int] | None = None,
        directions: tuple[int, int] | None = None,
    ) -> None:
        """One launch. tiles, directions: the first, and how many; all where not given."""
        plan = self.plan
        tiles, directions = tiles or (0, plan.tiles), directions or (0, self.directions)
        # The driver starts such a launch only if all of its programs run at once, so none waits for one that does not.
        extra = {"launch_cooperative_grid": True} if plan.meets and not INTERPRETED else {}
        # An argument that a launch does not use still needs an address.
        unused = self.like
        launch(
            kernel,
            plan,
            (plan.slices, -(-tiles[1] // plan.tiles_each), directions[1]),
            {
                "p_reset": unused if self.reset is None else self.reset,
                "p_lengths": unused if self.rows is None else self.rows.lengths,
                "p_offsets": unused if self.rows is None else self.rows.offsets,
                "first_tile": tiles[0],
                **({"tiles_each": plan.tiles_each} if plan.fragments else {}),
                "first_d": directions[0],
                "reverse_bits": self.reverse_bits,
                "tiles": plan.tiles,
                "D": self.directions,
                "T": self.steps.length,
                "N": self.steps.batch,
                "RAGGED": self.rows is not None,
                "HAS_RESET": self.reset is not None,
                "UNITS": plan.units,
                "BATCH": plan.batch,
                "num_warps": plan.warps,
                # A product and a sum in one instruction; said here because Triton's default is about to change.
                "enable_fp_fusion": True,
                **arguments,
                **options,
                **extra,
            },
            self.like.device,
        )


@functools.cache
def _names(kernel: Any) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Of a kernel: all arguments, pointers, numbers that it is compiled for, and constants but the step and the layouts."""
    parameters = kernel.params
    pointers = tuple(each.name for each in parameters if each.name.startswith("p_"))
    constants = tuple(each.name for each in parameters if each.is_constexpr)
    numbers = tuple(
        each.name
        for each in parameters
        if not each.is_constexpr and not each.do_not_specialize and not each.name.startswith("p_")
    )
    implied = ("STEP", "MMA", "LEFT", "RIGHT", "POINT", "TURN", "SUMS", "NOTHING", "ROWS", "TAIL")
    return tuple(each.name for each in parameters), pointers, numbers, tuple(name for name in constants if name not in implied)


def compiled_as(number: int) -> str:
    """What a compiled kernel knows of a number: one itself, whether it is a multiple, and whether it needs 64 bits."""
    if number == 1:
        return "one"
    return f"{'long' if number >= 1 << 31 else 'int'}{' multiple' if number % _ALIGNMENT == 0 else ''}"


def launch(kernel: Any, plan: Plan, grid: tuple[int, int, int], arguments: Mapping[str, Any], device: torch.device) -> None:
    """Launch ``kernel`` on the current stream of a device. arguments: the kernel's, and the options of a compilation."""
    if INTERPRETED or device.type != "cuda":
        kernel[grid](**arguments)
        return
    names, pointers, numbers, constants = _names(kernel)
    # Kernels and steps live as long as their modules do.
    alike: list[Any] = [id(kernel), id(arguments["STEP"]), plan.kernel, device.index]
    for name in pointers:
        tensor: Tensor = arguments[name]
        alike.append(tensor.dtype)
        alike.append(tensor.data_ptr() % _ALIGNMENT == 0)
    for name in numbers:
        number = arguments[name]
        alike.append(compiled_as(number))
    for name in constants:
        alike.append(arguments[name])
    key = tuple(alike)
    with contextlib.nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device):
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = kernel[grid](**arguments)
        else:
            compiled[grid](*[arguments[name] for name in names])
