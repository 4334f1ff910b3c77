"""The recurrence of a cell on this backend: from torch tensors to a walk.

Plans, checks the buffers, names the kernel's arguments. ``Recurrence`` takes the states before a walk and writes those after
it, so that a layer needs no copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fused_rnn.data.cell import Cell
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.triton import launch, library, packing
from fused_rnn.kernels.triton.fragment_backward import fragment_backward
from fused_rnn.kernels.triton.fragment_forward import fragment_forward
from fused_rnn.kernels.triton.layouts import layouts
from fused_rnn.kernels.triton.plan import Plan, power_of_two, refusal
from fused_rnn.kernels.triton.walk import Walk
from fused_rnn.kernels.triton.walk_backward import walk_backward
from fused_rnn.kernels.triton.walk_forward import walk_forward

# Sums that a backward keeps of its product, so that one instruction need not wait for the one before.
_CHAINS = 4

# bias_ih and bias_hh of each recurrence, as they are; or the sums that ``fused_rnn.kernels.by_walk.walk`` describes; or zero.
Bias = Sequence[tuple[Tensor, Tensor]] | Tensor | None
# By the names of their cells; ``derived.recurrence_of`` makes them.
RECURRENCES: dict[str, Recurrence] = {}


@dataclass(frozen=True)
class Packed:
    """The weights of a call.

    Attributes:
        plan: how to launch.
        weights: weight_hh of each recurrence, as it is, for the kernels that hold it in registers; ``packing.forward_slices``
            or ``backward_slices`` alone where it is streamed; for the library's product (D, P, G·H), or (D, G·H, P).
        projection: weight_hr as (D, H, P), or for the backward (D, P, H), or None.
        later: the rows of weight_hh of later gates, for the library's product too; None where there are no such gates.
    """

    plan: Plan
    weights: Sequence[Tensor]
    projection: Tensor | None
    later: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """The pointwise parts of a step, or of one of its two stages: functions that Triton compiles.

    Attributes:
        step: (x, product, bias, carry) → (h, carry, tape). Of two stages (``Cell.later``) the first one's is (x, product, bias,
            carry) → (operand, handed, tape), the second's (handed, x, product, bias, carry) → (h, carry, tape); x and product
            are those of the stage's gates, bias that of all.
        back: (tape, carry before, d_h, d_carry) → (d_gates, d_h past the product, d_carry before). Of two stages the first
            one's gives what it hands to the second behind d_gates; the second's is (tape, carry before, d_operand, handed) →
            (d_gates, d_h past the product).
        tape, d_gates: the blocks that they give, a bit each. In the place of others there is a zero.
        handed, handed_back: how many values of each unit step, or back, hands to the other stage, or gets of it.
    """

    step: Any
    back: Any
    tape: int
    d_gates: int
    handed: int = 0
    handed_back: int = 0


def _rows(name: str, buffer: Tensor, directions: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """The strides of rows and of recurrences, in elements."""
    if buffer.dim() != 3 or buffer.shape[1] != directions or buffer.shape[2] != columns:
        raise ValueError(f"{name}: expected rows of shape (·, {directions}, {columns}), got {tuple(buffer.shape)}")
    if buffer.dtype != dtype or (columns > 1 and buffer.stride(2) != 1):
        raise ValueError(f"{name}: expected contiguous columns of {dtype}, got {buffer.dtype} with strides {buffer.stride()}")
    return buffer.stride(0), buffer.stride(1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and what the states are stored in, for row buffers of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def carry_kind(cell: Cell) -> int:
    """What the pointwise parts get of the step before. 0: nothing; 1: the cell state, c; 2: h itself, beside the product.

    Raises:
        NotImplementedError: if a cell needs both.
    """
    reason = refusal(cell)
    if reason is not None:
        raise NotImplementedError(f"cell {cell.name}: {reason}")
    return 1 if cell.cell_state is not None else 2 if cell.direct else 0


def plane_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the factors of a product in registers are stored in."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def exchange(walk: Walk, steps: int) -> tuple[Tensor, Tensor]:
    """The ring and the counters of a walk of the fragment kernels; nothing where a program is alone."""
    plan = walk.plan
    if plan.alone:
        return walk.like, walk.like
    return walk.zeros(plan.columns, plan.planes, plane_dtype(walk.like.dtype), steps * plan.warps)


def fragment_options(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of the fragment kernels that follow from the plan."""
    return {
        "ALONE": plan.alone,
        "MOST": power_of_two(plan.tiles_each),
        "PARTS": plan.parts,
        "WARPS": plan.warps,
        "PLANES": plan.planes,
        "HELD": plan.held,
        "AHEAD": plan.ahead,
        "DTYPE": tl.float16 if dtype == torch.float16 else tl.bfloat16,
        **layouts(plan.alone, plan.units, plan.batch, plan.warps),
    }


def stream_options(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of the streamed kernels that follow from the plan."""
    return {
        "GIVEN": plan.regime == "library",
        "CHUNK": plan.chunk,
        "PRECISION": "ieee" if dtype != torch.float32 else "tf32" if plan.planes == 2 else "tf32x3",
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        # No load of a step may be moved before the barrier of the step before. What may overlap says so itself.
        "num_stages": 1,
    }


class Recurrence:
    """A cell's two walks.

    Attributes:
        cell: which cell.
        stage: its pointwise parts, or those of the first stage. later: of the second, for a cell with later gates; else None.
        reads_out: whether ``stage.back`` gets h after the step too, behind the tape.
    """

    def __init__(self, cell: Cell, stage: Stage, later: Stage | None, reads_out: bool) -> None:
        self.cell, self.stage, self.later, self.reads_out = cell, stage, later, reads_out
        self.carry = carry_kind(cell)
        RECURRENCES[cell.name] = self

    def pack(self, weight_hh: Sequence[Tensor], weight_hr: Sequence[Tensor] | None, steps: Steps, backward: bool) -> Packed:
        """Plan a walk, and lay its weights out as the plan says."""
        cell = self.cell
        plan = launch.planned(cell, weight_hh[0], steps, len(weight_hh), backward, weight_hr is not None)
        if plan.fragments:
            return Packed(plan, [weight.contiguous() for weight in weight_hh], None)
        if plan.regime == "streamed":
            slices = packing.backward_slices if backward else packing.forward_slices
            weights = slices(cell, weight_hh, plan)
            return Packed(plan, [packing.rounded(weights) if plan.planes == 2 else weights], None)
        later: Tensor | None = None
        if cell.later:
            first = weight_hh[0].shape[0] // cell.num_gates * len(cell.first)
            later = torch.stack([weight[first:] for weight in weight_hh])
            later = later if backward else later.transpose(1, 2)
            weight_hh = [weight[:first] for weight in weight_hh]
        if backward:
            weights = torch.stack([packing.by_d_gates(cell, weight).flatten(0, 1) for weight in weight_hh])
            projection = None if weight_hr is None else torch.stack(tuple(weight_hr))
        else:
            weights = torch.stack(tuple(weight_hh)).transpose(1, 2)
            projection = None if weight_hr is None else torch.stack(tuple(weight_hr)).transpose(1, 2)
        return Packed(plan, [weights], projection, later)

    def forward(
        self,
        tape: Tensor,
        out: Tensor,
        states_0: Sequence[Tensor] | None,
        states_n: Sequence[Tensor],
        packed: Packed,
        bias: Bias,
        steps: Steps,
        reverse: Sequence[bool],
        reset: Tensor | None,
        keep: bool,
    ) -> None:
        """Walk all steps; arguments as of a walk's (``by_walk.walk``), but for the states.

        Args:
            states_0: before the walk, (D, N, ·) each, or None for zero. states_n: after it, written; the same tensors, or
                others of any dtype. Only the kernels that hold the weights in registers take others, or None.
            bias: raw with those kernels alone.
        """
        cell, plan, directions = self.cell, packed.plan, len(reverse)
        hidden = tape.shape[2] // len(cell.tape)
        tape_row, tape_d = _rows("tape", tape, directions, len(cell.tape) * hidden, tape.dtype)
        out_row, out_d = _rows("out", out, directions, out.shape[2], tape.dtype)
        walk = Walk(plan, reverse, steps, reset, tape)
        arguments = {
            "p_tape": tape,
            "p_out": out,
            "H": hidden,
            "tape_row": tape_row,
            "tape_d": tape_d,
            "out_row": out_row,
            "out_d": out_d,
        }
        options = {
            "STEP": self.stage.step,
            "GATES": cell.num_gates,
            "TAPE": len(cell.tape),
            "BIAS": len(cell.bias),
            "CARRY": self.carry,
            "KEEP": self.stage.tape if keep else 0,
            "HAS_BIAS": bias is not None,
        }
        if plan.fragments:
            ring, counters = exchange(walk, steps.length + 1)
            raw = [each for pair in bias for each in pair] if isinstance(bias, Sequence) else [tape if bias is None else bias]
            arguments |= {
                "p_ring": ring,
                "p_counters": counters,
                "p_h_0": (states_0 or states_n)[0],
                "p_h_n": states_n[0],
                "p_carry_0": (states_0 or states_n)[-1],
                "p_carry_n": states_n[-1],
                "p_weight": packed.weights[0],
                "p_weight_back": packed.weights[-1],
                "p_bias": raw[0],
                "p_bias_hh": raw[1 % len(raw)],
                "p_bias_back": raw[-2 % len(raw)],
                "p_bias_hh_back": raw[-1],
                "s_end": steps.length,
                "ring_rows": walk.ring_rows,
            }
            options |= fragment_options(plan, tape.dtype) | {"PILES": plan.piles, "RAW_BIAS": isinstance(bias, Sequence)}
            options["HAS_STATES"] = states_0 is not None
            del options["TURN"]
            walk.launch(fragment_forward, arguments, options)
            return
        assert not isinstance(bias, Sequence)
        given = plan.regime == "library"
        if given:
            ring, counters = tape.new_zeros((2, directions, steps.batch, hidden)), tape
        else:
            columns = packing.padded_columns(hidden, plan)
            flat, counters = walk.zeros(columns, 1, tape.dtype, steps.length + 1)
            ring = flat.view(2, directions, walk.ring_rows, columns)
        if packed.projection is None:
            # Both slots: a sequence whose first step comes later finds its h in either.
            ring[:, :, : steps.batch, :hidden] = packing.rounded(states_n[0]) if plan.planes == 2 and not given else states_n[0]
        arguments |= {
            "p_ring": ring,
            "p_counters": counters,
            "p_carry": states_n[-1],
            "p_handed": tape,
            "p_bias": states_n[0] if bias is None else bias.contiguous(),
            "p_h_n": states_n[0],
            "p_weight": packed.weights[0],
            "p_product": tape,
            "ring_rows": ring.shape[2],
            "ring_row": ring.shape[3],
        }
        options |= stream_options(plan, tape.dtype) | {"HAS_OUT": packed.projection is None, "STACKED": plan.stacked}
        options |= {"STAGE": 0, "FIRST": 0, "HANDED": 0}
        second: library.Second | None = None
        if self.later is not None:
            first, later = len(cell.first), len(cell.later)
            more = {"STEP": self.later.step, "STAGE": 2, "FIRST": first, "GATES": later, "HAS_OUT": True}
            more["KEEP"] = self.later.tape if keep else 0
            assert packed.later is not None
            second = library.Second(packed.later, more)
            options |= {"STAGE": 1, "GATES": first, "HAS_OUT": False, "HANDED": self.stage.handed}
        if given:
            projection = packed.projection
            library.forward(
                walk, walk_forward, arguments, options, packed.weights[0], projection, states_n[0], out, ring, second
            )
        else:
            walk.launch(walk_forward, arguments | {"s_begin": 0, "s_end": steps.length}, options)

    def backward(
        self,
        d_gates: Tensor,
        d_states_n: Sequence[Tensor | None],
        d_states_0: Sequence[Tensor],
        d_out: Tensor | None,
        d_cells: Tensor | None,
        tape: Tensor,
        out: Tensor,
        states_0: Sequence[Tensor] | None,
        packed: Packed,
        steps: Steps,
        t_begin: int,
        t_end: int,
        reverse: Sequence[bool],
        reset: Tensor | None,
    ) -> None:
        """Walk steps t_begin .. t_end - 1 back; arguments as of a walk's, but for the gradients of the states.

        Args:
            d_states_n: after the walked steps, (D, N, ·) each, or None for zero. d_states_0: before them, written; the same
                tensors, or others of any dtype. states_0: before all steps, or None for zero. Only the kernels that hold the
                weights in registers take others, or None.
        """
        cell, plan, directions, carry = self.cell, packed.plan, len(reverse), self.carry
        hidden, size = tape.shape[2] // len(cell.tape), out.shape[2]
        emitted = len(cell.d_gates) * hidden + (0 if packed.projection is None else size)
        strides = {}
        strides["tape_row"], strides["tape_d"] = _rows("tape", tape, directions, len(cell.tape) * hidden, tape.dtype)
        strides["out_row"], strides["out_d"] = _rows("out", out, directions, size, tape.dtype)
        strides["d_gates_row"], strides["d_gates_d"] = _rows("d_gates", d_gates, directions, emitted, tape.dtype)
        strides["d_out_row"], strides["d_out_d"] = (
            (0, 0) if d_out is None else _rows("d_out", d_out, directions, size, tape.dtype)
        )
        if d_cells is not None and carry != 1:
            raise ValueError(f"d_cells: expected None for {cell.name}, which has no cell state, got a tensor")
        strides["d_carries_row"], strides["d_carries_d"] = (
            (0, 0) if d_cells is None else _rows("d_cells", d_cells, directions, hidden, tape.dtype)
        )
        walk = Walk(plan, reverse, steps, reset, tape)
        arguments = {
            "p_d_gates": d_gates,
            "p_d_out": tape if d_out is None else d_out,
            "p_d_carries": tape if d_cells is None else d_cells,
            "p_tape": tape,
            "p_out": out,
            "p_before_0": tape if states_0 is None else states_0[-1],
            "t_begin": t_begin,
            "t_end": t_end,
            "first_row": steps.rows(t_begin, t_end).start,
            "H": hidden,
            **strides,
        }
        options = {
            "STEP": self.stage.back,
            "GATES": cell.num_gates,
            "TAPE": len(cell.tape),
            "CELL": 0 if cell.cell_state is None else cell.tape.index(cell.cell_state),
            "EMITTED": len(cell.d_gates),
            "CARRY": carry,
            "READS_OUT": self.reads_out,
            "HAS_D_OUT": d_out is not None and packed.projection is None,
            "HAS_D_CARRIES": d_cells is not None,
        }
        walked = t_end - t_begin
        if plan.fragments:
            ring, counters = exchange(walk, walked + 2)
            d_h_n, d_carry_n = d_states_n[0], d_states_n[-1]
            arguments |= {
                "p_ring": ring,
                "p_counters": counters,
                "p_d_h_n": tape if d_h_n is None else d_h_n,
                "p_d_h_0": d_states_0[0],
                "p_d_carry_n": tape if d_carry_n is None else d_carry_n,
                "p_d_carry_0": d_states_0[-1],
                "p_weight": packed.weights[0],
                "p_weight_back": packed.weights[-1],
                "ring_rows": walk.ring_rows,
            }
            options |= fragment_options(plan, tape.dtype)
            options |= {"FIRST": packing.first_gate(cell), "CHAINS": min(_CHAINS, plan.parts)}
            options |= {
                "HAS_STATES": states_0 is not None,
                "HAS_D_H": d_h_n is not None,
                "HAS_D_CARRY": carry == 1 and d_carry_n is not None,
            }
            walk.launch(fragment_backward, arguments, options)
            return
        arguments |= {"p_d_h": d_states_0[0], "p_d_carry": d_states_0[-1], "p_weight": packed.weights[0], "p_product": tape}
        arguments |= {"p_handed": tape, "p_ring": tape, "p_counters": tape, "ring_rows": 0, "ring_row": 0}
        options |= stream_options(plan, tape.dtype) | {"STAGE": 0, "HANDED": 0, "EMITS": self.stage.d_gates}
        second: library.Second | None = None
        if self.later is not None:
            more = {"STEP": self.later.back, "STAGE": 2, "EMITS": self.later.d_gates}
            more |= {"READS_OUT": False, "HAS_D_OUT": False, "HAS_D_CARRIES": False}
            assert packed.later is not None
            second = library.Second(packed.later, more)
            options |= {"STAGE": 1, "HANDED": self.stage.handed_back}
        if plan.regime == "library":
            weights, projection = packed.weights[0], packed.projection
            library.backward(walk, walk_backward, arguments, options, weights, projection, d_out, reverse, reset, second)
            return
        columns = cell.num_gates * packing.padded_columns(hidden, plan)
        ring, counters = walk.zeros(columns, 1, tape.dtype, walked + 1)
        arguments |= {"p_ring": ring, "p_counters": counters, "ring_rows": walk.ring_rows, "ring_row": columns}
        walk.launch(walk_backward, arguments | {"s_begin": 0, "s_end": walked + 1}, options)
