"""From torch tensors to running kernels: plans, packs the weights, checks the buffers, launches the walk."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rnn.cells import Cell
from fused_rnn.kernels.triton import library, packing
from fused_rnn.kernels.triton.heuristic import choose
from fused_rnn.kernels.triton.plan import Call, Device, Plan
from fused_rnn.kernels.triton.version import INTERPRETED
from fused_rnn.kernels.triton.walk_backward import walk_backward
from fused_rnn.kernels.triton.walk_forward import walk_forward
from fused_rnn.steps import Steps

LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# A row of the kernel's arguments that a launch does not use still needs an address.
_CARRY_OF_H = 2


@dataclass(frozen=True)
class Packed:
    """The weights of a call.

    Attributes:
        plan: how to launch.
        weights: ``packing.forward_slices`` or ``backward_slices``; for the library's product (D, P, G·H), or (D, G·H, P).
        projection: weight_hr as (D, H, P), or for the backward (D, P, H), or None.
    """

    plan: Plan
    weights: Tensor
    projection: Tensor | None


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        driver = triton.runtime.driver.active
        shared = driver.utils.get_device_properties(index)["max_shared_mem"]
    return Device(properties.name, (properties.major, properties.minor), properties.multi_processor_count, shared)


def device_of(device: torch.device) -> Device:
    """What the plan needs to know of a device.

    Raises:
        RuntimeError: if its chip is too old, or it is a CPU and nothing interprets the kernels.
    """
    if device.type != "cuda":
        if not INTERPRETED:
            raise RuntimeError(
                f"triton runs on cuda, got a tensor on {device.type}; set TRITON_INTERPRET=1 to try it on the cpu"
            )
        return Device("interpreter", (9, 0), 1, 227 << 10, interpreted=True)
    found = _cuda_device(torch.cuda.current_device() if device.index is None else device.index)
    reason = too_old(found.name, found.capability)
    if reason is not None:
        raise RuntimeError(f"triton: {reason}; the reference backend serves it: fused_rnn.backend('reference')")
    return found


def too_old(name: str, capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot run on a chip, or None."""
    if capability >= LEAST_CAPABILITY:
        return None
    least, given = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
    return f"expected a chip of compute capability {least} or newer, {name} has {given}"


def allows_tf32() -> bool:
    """Whether the user's torch rounds the factors of float32 products to TF32: ``torch.backends.cuda.matmul``."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:  # torch before 2.9
        return bool(matmul.allow_tf32)
    return bool(precision == "tf32")


def make_call(cell: Cell, weight_hh: Tensor, steps: Steps, directions: int, backward: bool, projected: bool) -> Call:
    """What is to be planned, of the tensors of a call."""
    if weight_hh.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"triton: expected weights of {names}, got {weight_hh.dtype}, which no backend computes in")
    hidden = weight_hh.shape[0] // cell.num_gates
    tf32 = weight_hh.dtype == torch.float32 and allows_tf32()
    return Call(cell, backward, hidden, steps.batch, directions, weight_hh.dtype, projected, tf32)


def _guard(like: Tensor) -> Any:
    return torch.cuda.device(like.device) if like.device.type == "cuda" else contextlib.nullcontext()


def _rows(name: str, buffer: Tensor, directions: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """The strides of rows and of recurrences, in elements."""
    if buffer.dim() != 3 or buffer.shape[1] != directions or buffer.shape[2] != columns:
        raise ValueError(f"{name}: expected rows of shape (·, {directions}, {columns}), got {tuple(buffer.shape)}")
    if buffer.dtype != dtype or (columns > 1 and buffer.stride(2) != 1):
        raise ValueError(f"{name}: expected contiguous columns of {dtype}, got {buffer.dtype} with strides {buffer.stride()}")
    return buffer.stride(0), buffer.stride(1)


def _check_states(name: str, states: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
    for state, shape in zip(states, shapes, strict=True):
        if tuple(state.shape) != shape or state.dtype != dtype or not state.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {dtype} of shape {shape}, got {state.dtype} of shape {tuple(state.shape)}"
            )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and what the states are stored in, for row buffers of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def carry_kind(cell: Cell) -> int:
    """0: nothing but h passes from step to step; 1: c does too; 2: h itself does, past the product."""
    if len(cell.states) > 1:
        return 1
    # A cell that keeps hn interpolates between h₋ and its candidate.
    return _CARRY_OF_H if "hn" in cell.tape else 0


def make_functions(cell: Cell, step: Any, step_backward: Any) -> tuple[Any, Any, Any]:
    """Make a cell's ``pack``, ``forward`` and ``backward`` (contract: ``fused_rnn.kernels``).

    Args:
        cell: which cell.
        step: its pointwise part, a function that Triton compiles: (x, product, bias, carry) → (h, carry, tape).
        step_backward: (tape, carry before, d_h, d_carry) → (d_gates, d_h past the product, d_carry before).
    """
    carry = carry_kind(cell)

    def pack(weight_hh: list[Tensor], weight_hr: list[Tensor] | None, steps: Steps, backward: bool) -> Packed:
        call = make_call(cell, weight_hh[0], steps, len(weight_hh), backward, weight_hr is not None)
        plan = choose(call, device_of(weight_hh[0].device))
        if plan.regime != "library":
            slices = packing.backward_slices if backward else packing.forward_slices
            return Packed(plan, slices(cell, weight_hh, plan), None)
        if backward:
            weights = torch.stack([packing.by_d_gates(cell, weight).flatten(0, 1) for weight in weight_hh])
            projection = None if weight_hr is None else torch.stack(weight_hr)
        else:
            weights = torch.stack(weight_hh).transpose(1, 2)
            projection = None if weight_hr is None else torch.stack(weight_hr).transpose(1, 2)
        return Packed(plan, weights, projection)

    def forward(
        tape: Tensor,
        out: Tensor,
        states: tuple[Tensor, ...],
        packed: Packed,
        bias: Tensor | None,
        steps: Steps,
        reverse: Sequence[bool],
        reset: Tensor | None,
        keep: bool,
    ) -> None:
        if steps.batch == 0 or steps.length == 0:
            return
        plan, directions = packed.plan, len(reverse)
        hidden, size = tape.shape[2] // len(cell.tape), out.shape[2]
        compute = compute_dtype(tape.dtype)
        tape_row, tape_d = _rows("tape", tape, directions, len(cell.tape) * hidden, tape.dtype)
        out_row, out_d = _rows("out", out, directions, size, tape.dtype)
        shapes = [(directions, steps.batch, width) for width in (size, hidden)]
        _check_states("states", states, shapes[: len(states)], compute)
        walk = Walk(plan, reverse, steps, reset, tape)
        given = plan.regime == "library"
        width, ring_rows = (hidden, steps.batch) if given else (plan.width, plan.tiles * plan.batch)
        ring = tape.new_zeros((2, directions, ring_rows, width))
        if packed.projection is None:
            # Both slots: a sequence whose first step comes later finds its h in either.
            ring[:, :, : steps.batch, :hidden] = states[0]
        arguments = {
            "p_tape": tape,
            "p_out": out,
            "p_ring": ring,
            "p_carry": states[-1],
            "p_h_n": states[0],
            "p_weight": packed.weights,
            "p_product": tape,
            "p_bias": states[0] if bias is None else bias.contiguous(),
            "D": directions,
            "H": hidden,
            "ring_rows": ring_rows,
            "ring_row": width,
            "tape_row": tape_row,
            "tape_d": tape_d,
            "out_row": out_row,
            "out_d": out_d,
        }
        options = {
            "STEP": step,
            "GATES": cell.num_gates,
            "TAPE": len(cell.tape),
            "BIAS": len(cell.bias),
            "CARRY": carry,
            "KEEP": keep and not cell.tape_is_out,
            "HAS_OUT": packed.projection is None,
            "HAS_BIAS": bias is not None,
            "STACKED": plan.stacked,
            "AHEAD": plan.ahead if plan.unrolled else 1,
            "PRECISION": "tf32" if tape.dtype == torch.float32 and allows_tf32() else "ieee",
        }
        if given:
            library.forward(walk, walk_forward, arguments, options, packed.weights, packed.projection, states[0], out, ring)
        else:
            walk.launch(walk_forward, steps.length, arguments, options)

    def backward(
        d_gates: Tensor,
        d_states: tuple[Tensor, ...],
        d_out: Tensor | None,
        d_cells: Tensor | None,
        tape: Tensor,
        out: Tensor,
        states_0: tuple[Tensor, ...],
        packed: Packed,
        steps: Steps,
        t_begin: int,
        t_end: int,
        reverse: Sequence[bool],
        reset: Tensor | None,
    ) -> None:
        if steps.batch == 0 or t_begin == t_end:
            return
        plan, directions = packed.plan, len(reverse)
        hidden, size = tape.shape[2] // len(cell.tape), out.shape[2]
        compute = compute_dtype(tape.dtype)
        emitted = len(cell.d_gates) * hidden + (0 if packed.projection is None else size)
        strides = {}
        strides["tape_row"], strides["tape_d"] = _rows("tape", tape, directions, len(cell.tape) * hidden, tape.dtype)
        out_row, out_d = _rows("out", out, directions, size, tape.dtype)
        strides["d_gates_row"], strides["d_gates_d"] = _rows("d_gates", d_gates, directions, emitted, tape.dtype)
        strides["d_out_row"], strides["d_out_d"] = (
            (0, 0) if d_out is None else _rows("d_out", d_out, directions, size, tape.dtype)
        )
        if d_cells is not None and carry != 1:
            raise ValueError(f"d_cells: expected None for {cell.name}, which has no c, got a tensor")
        strides["d_carries_row"], strides["d_carries_d"] = (
            (0, 0) if d_cells is None else _rows("d_cells", d_cells, directions, hidden, tape.dtype)
        )
        shapes = [(directions, steps.batch, width) for width in (size, hidden)]
        _check_states("d_states", d_states, shapes[: len(d_states)], compute)
        _check_states("states_0", states_0, shapes[: len(d_states)], compute)
        # c lies in the tape's last block, h in the output.
        before = tape[:, :, cell.tape.index("c") * hidden :] if carry == 1 else out
        strides["before_row"], strides["before_d"] = (
            (strides["tape_row"], strides["tape_d"]) if carry == 1 else (out_row, out_d)
        )
        walk = Walk(plan, reverse, steps, reset, tape)
        given = plan.regime == "library"
        arguments = {
            "p_d_gates": d_gates,
            "p_d_h": d_states[0],
            "p_d_carry": d_states[-1],
            "p_d_out": tape if d_out is None else d_out,
            "p_d_carries": tape if d_cells is None else d_cells,
            "p_tape": tape,
            "p_before": before,
            "p_before_0": states_0[-1],
            "p_weight": packed.weights,
            "p_product": tape,
            "t_begin": t_begin,
            "t_end": t_end,
            "first_row": steps.rows(t_begin, t_end).start,
            "H": hidden,
            **strides,
        }
        options = {
            "STEP": step_backward,
            "GATES": cell.num_gates,
            "TAPE": len(cell.tape),
            "EMITTED": len(cell.d_gates),
            "CARRY": carry,
            "HAS_D_OUT": d_out is not None and packed.projection is None,
            "HAS_D_CARRIES": d_cells is not None,
            "SPLIT": plan.split,
            "PRECISION": "tf32" if tape.dtype == torch.float32 and allows_tf32() else "ieee",
        }
        if given:
            library.backward(walk, walk_backward, arguments, options, packed.weights, packed.projection, d_out, reverse, reset)
        else:
            walk.launch(walk_backward, t_end - t_begin + 1, arguments, options)

    for function, suffix in ((pack, "pack"), (forward, "forward"), (backward, "backward")):
        function.__name__ = function.__qualname__ = f"{cell.name}_{suffix}"
        function.__module__ = step.__module__
    return pack, forward, backward
