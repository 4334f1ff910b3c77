"""The backward whose weights come from memory in each step: one body for every cell, in one launch or in one for each step.

A program owns the same kind of tile as in the forward. In each step it first forms what the d_gates of the step before (in
this walk) send to its units of h, W[:, units]ᵀ · d_gatesᵀ, then differentiates its own units and hands on their d_gates, which
all programs of the tile read in the next step. One more step follows the last one, for its product alone.

A cell with later gates has two launches a step, the STAGEs 1 and 2: the second is GIVEN the gradient of the operand, and adds
what the h before and the d_gates receive through it; those that have a share of both stages pass through ``p_handed``.

Legend: T steps, N sequences, H units, s counts steps in the order of this walk, t in the order of the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_rnn.kernels.triton.barrier import arrive, wait
from fused_rnn.kernels.triton.product import STAGES, dot, rounded


@triton.jit
def _product(p_weight, p_rows, mask, i_program, K, UNITS: tl.constexpr, BATCH: tl.constexpr, CHUNK: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """W[:, units]ᵀ · d_gatesᵀ of a tile: (UNITS, BATCH). p_rows, mask: (1, BATCH), to rows that are K wide."""
    total = tl.zeros((UNITS, BATCH), tl.float32)
    p_rows = p_rows + tl.arange(0, CHUNK)[:, None]
    p = p_weight + i_program.to(tl.int64) * (UNITS * K) + tl.arange(0, UNITS)[:, None] * K + tl.arange(0, CHUNK)[None, :]
    # K is no constant here: one kernel serves every H.
    for k in tl.range(0, K, CHUNK, num_stages=STAGES):
        d = tl.load(p_rows + k, mask=mask, other=0.0, cache_modifier=".cg")
        total = dot(tl.load(p + k), d, total, PRECISION)
    return total


@triton.jit(
    do_not_specialize=[
        "s_begin", "s_end", "t_begin", "t_end", "first_row", "first_tile", "first_d", "reverse_bits", "tiles", "D", "T",
        "N",
    ]
)  # fmt: skip
def walk_backward(
    p_d_gates, p_ring, p_d_h, p_d_carry, p_d_out, p_d_carries, p_tape, p_out, p_before_0, p_handed, p_weight, p_product,
    p_reset, p_lengths, p_offsets, p_counters,
    s_begin, s_end, t_begin, t_end, first_row, first_tile, first_d, reverse_bits, tiles, D, T, N, H, ring_rows, ring_row,
    d_gates_row, d_gates_d, d_out_row, d_out_d, d_carries_row, d_carries_d, tape_row, tape_d, out_row, out_d,
    STEP: tl.constexpr, STAGE: tl.constexpr, HANDED: tl.constexpr, GATES: tl.constexpr, TAPE: tl.constexpr, CELL: tl.constexpr,
    EMITTED: tl.constexpr, EMITS: tl.constexpr, CARRY: tl.constexpr, READS_OUT: tl.constexpr, RAGGED: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_D_OUT: tl.constexpr, HAS_D_CARRIES: tl.constexpr, GIVEN: tl.constexpr, UNITS: tl.constexpr,
    BATCH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Walk steps s_begin .. s_end - 1 of n + 1, n = t_end - t_begin. Grid: (slices of units, batch tiles, recurrences).

    Args:
        p_d_gates: (rows from first_row on, D, EMITTED blocks·H), written; the first GATES blocks meet the weights.
        p_ring: (2, D, ring_rows, ring_row): those blocks of a step, each padded with zeros to ring_row / GATES columns; slot
            s % 2 is read in step s. Unused if the product is GIVEN.
        p_d_h, p_d_carry: (D, N, H), in and out; without another carry than h, p_d_carry is unused.
        p_d_out: (R, D, H), if HAS_D_OUT. p_d_carries: (R, D, H), the gradient of every step's carry, if HAS_D_CARRIES.
        p_tape: (R, D, TAPE blocks·H); with CARRY 1 the carry of every step is its block CELL.
        p_out: (R, D, H), with CARRY 2 the carry of every step; if READS_OUT the STEP gets it behind the tape.
        p_before_0: the carry before the first step, (D, N, H); with CARRY alone.
        p_handed: (D, N, HANDED·H), from the first of two launches to the second; unused where STAGE is 0.
        p_weight: (D, slices, UNITS, ring_row), padded with zeros.
        p_product: (D, N, H): Wᵀ·d_gates of the step before, if GIVEN; in STAGE 2, the gradient of the operand.
        p_reset, p_lengths, p_offsets, p_counters: as in the forward, the last for n + 1 steps.
        STAGE: 0 for a step in one piece. Of the EMITTED blocks those are written whose bits EMITS has.
    """
    i_u = tl.program_id(0)
    i_b = first_tile + tl.program_id(1)
    i_d = first_d + tl.program_id(2)
    i_program = i_d * tl.num_programs(0) + i_u
    o_u = i_u * UNITS + tl.arange(0, UNITS)[:, None]
    o_b = i_b * BATCH + tl.arange(0, BATCH)[None, :]
    m_u = o_u < H
    m_all = m_u & (o_b < N)
    reverse = (reverse_bits >> i_d) & 1
    o_state = (i_d * N + o_b).to(tl.int64) * H + o_u
    o_handed = (i_d * N + o_b).to(tl.int64) * (HANDED * H) + o_u
    p_d_gates += i_d * d_gates_d
    p_d_out += i_d * d_out_d
    p_d_carries += i_d * d_carries_d
    p_tape += i_d * tape_d
    p_out += i_d * out_d
    n = t_end - t_begin
    p_counters += (i_d * tiles + i_b) * (n + 1)

    begin, end = s_begin, s_end
    lengths = tl.full((1, BATCH), 0, tl.int64) + T
    if RAGGED:
        lengths = tl.load(p_lengths + o_b, mask=o_b < N, other=0)
        longest = tl.minimum(tl.maximum(tl.load(p_lengths + i_b * BATCH).to(tl.int32) - t_begin, 0), n)
        # The steps in which the tile has a row, and the one after them; if it has none, no step.
        begin = tl.maximum(begin, tl.where(reverse != 0, 0, n - longest))
        end = tl.minimum(end, tl.where(reverse != 0, longest, n) + 1)
        end = tl.where(longest > 0, end, begin)

    d_h = tl.load(p_d_h + o_state, mask=m_all, other=0.0).to(COMPUTE)
    d_carry = tl.zeros((UNITS, BATCH), COMPUTE)
    if CARRY == 1:
        d_carry = tl.load(p_d_carry + o_state, mask=m_all, other=0.0).to(COMPUTE)

    for s in range(begin, end):
        t = tl.where(reverse != 0, t_begin + s, t_end - 1 - s)
        t_done = tl.where(reverse != 0, t - 1, t + 1)
        t_before = tl.where(reverse != 0, t + 1, t - 1)
        # A step outside what is walked, or outside the sequence, has no rows.
        m_b = (o_b < tl.where((t >= t_begin) & (t < t_end), N, 0)) & (t < lengths)
        m_done = (o_b < tl.where((t_done >= t_begin) & (t_done < t_end), N, 0)) & (t_done < lengths)
        m_before = m_b & (o_b < tl.where((t_before >= 0) & (t_before < T), N, 0)) & (t_before < lengths)
        mask = m_u & m_b
        if RAGGED:
            # The step beyond the last has no rows; its masks are off.
            rows = tl.load(p_offsets + tl.minimum(tl.maximum(t, 0), T - 1)) + o_b
            rows_done = tl.load(p_offsets + tl.minimum(tl.maximum(t_done, 0), T - 1)) + o_b
            rows_before = tl.load(p_offsets + tl.minimum(tl.maximum(t_before, 0), T - 1)) + o_b
        else:
            rows = t.to(tl.int64) * N + o_b
            rows_done = t_done.to(tl.int64) * N + o_b
            rows_before = t_before.to(tl.int64) * N + o_b
        # Read before the wait: these are ready when the others are.
        tape = ()
        for block in tl.static_range(TAPE):
            tape = tape + (tl.load(p_tape + rows * tape_row + block * H + o_u, mask=mask, other=0.0).to(COMPUTE),)
        if READS_OUT:
            tape = tape + (tl.load(p_out + rows * out_row + o_u, mask=mask, other=0.0).to(COMPUTE),)
        before = tl.zeros((UNITS, BATCH), COMPUTE)
        m_fresh = m_b
        if HAS_RESET:
            m_fresh = m_b & (tl.load(p_reset + rows, mask=m_b, other=0) == 0)
            m_done = m_done & (tl.load(p_reset + rows_done, mask=m_done, other=0) == 0)
        if CARRY:
            m_kept = m_u & m_fresh & m_before
            if CARRY == 1:
                before = tl.load(p_tape + rows_before * tape_row + CELL * H + o_u, mask=m_kept, other=0.0).to(COMPUTE)
            else:
                before = tl.load(p_out + rows_before * out_row + o_u, mask=m_kept, other=0.0).to(COMPUTE)
            m_first = m_u & m_fresh & ~m_before
            before += tl.load(p_before_0 + o_state, mask=m_first, other=0.0).to(COMPUTE)
        d_above = tl.zeros((UNITS, BATCH), COMPUTE)
        if HAS_D_OUT:
            d_above = tl.load(p_d_out + rows * d_out_row + o_u, mask=mask, other=0.0).to(COMPUTE)
        if HAS_D_CARRIES:
            d_carry += tl.load(p_d_carries + rows * d_carries_row + o_u, mask=mask, other=0.0).to(COMPUTE)
        if not GIVEN:
            if s > begin:
                wait(p_counters + s - 1, tl.num_programs(0))
        if STAGE == 2:
            d_operand = tl.load(p_product + o_state, mask=mask, other=0.0).to(COMPUTE)
        elif GIVEN:
            d_h += tl.load(p_product + o_state, mask=m_u & m_done, other=0.0).to(COMPUTE)
        else:
            slot = ((s % 2) * D + i_d).to(tl.int64)
            p_rows = p_ring + (slot * ring_rows + o_b) * ring_row
            d_h += _product(p_weight, p_rows, m_done, i_program, ring_row, UNITS, BATCH, CHUNK, PRECISION)

        if STAGE == 2:
            handed = ()
            for i in tl.static_range(HANDED):
                handed = handed + (tl.load(p_handed + o_handed + i * H, mask=mask, other=0.0),)
            d_gates, d_direct = STEP(tape, before, d_operand, handed)
            d_direct += d_h
            d_carry_before = d_carry
        elif STAGE == 1:
            d_gates, handed, d_direct, d_carry_before = STEP(tape, before, d_h + d_above, d_carry)
            for i in tl.static_range(HANDED):
                tl.store(p_handed + o_handed + i * H, handed[i], mask=mask)
        else:
            d_gates, d_direct, d_carry_before = STEP(tape, before, d_h + d_above, d_carry)

        o_gates = (rows - first_row) * d_gates_row + o_u
        if not GIVEN:
            next_slot = (((s + 1) % 2) * D + i_d).to(tl.int64)
            o_ring = (next_slot * ring_rows + o_b) * ring_row + o_u
            for gate in tl.static_range(GATES):
                stored = rounded(d_gates[gate].to(p_ring.dtype.element_ty), PRECISION)
                tl.store(p_ring + o_ring + gate * (ring_row // GATES), stored, mask=mask)
            arrive(p_counters + s)
        # What no other program waits for.
        for block in tl.static_range(EMITTED):
            if EMITS >> block & 1:
                tl.store(p_d_gates + o_gates + block * H, d_gates[block].to(p_d_gates.dtype.element_ty), mask=mask)
        # A sequence that has no step here keeps its gradients; one that was reset sends none further back.
        d_h = tl.where(m_b, tl.where(m_fresh, d_direct, 0.0), d_h)
        if CARRY == 1:
            d_carry = tl.where(m_b, tl.where(m_fresh, d_carry_before, 0.0), d_carry)

    tl.store(p_d_h + o_state, d_h, mask=m_all)
    if CARRY == 1:
        tl.store(p_d_carry + o_state, d_carry, mask=m_all)
