"""From torch tensors to a walk: plans, packs the weights, checks the buffers, names the kernel's arguments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fused_rnn.cells import Cell
from fused_rnn.kernels.triton import library, packing
from fused_rnn.kernels.triton.heuristic import choose
from fused_rnn.kernels.triton.plan import Call, Device, Plan
from fused_rnn.kernels.triton.version import INTERPRETED
from fused_rnn.kernels.triton.walk import Walk
from fused_rnn.kernels.triton.walk_backward import walk_backward
from fused_rnn.kernels.triton.walk_forward import walk_forward
from fused_rnn.steps import Steps

LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

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
