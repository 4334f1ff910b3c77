"""The forward whose weights come from memory in each step: one body for every cell, in one launch or in one for each step.

The launch of all steps streams weights and h through shared memory; between two steps its programs meet (``barrier``). The one
of a single step is GIVEN the product (``library``).

A program owns ``UNITS`` hidden units of ``BATCH`` sequences of one recurrence: all their gates, and their carry (the LSTM's c,
the GRU's h), which stays in registers inside a launch and passes through memory between launches. What a step needs of h comes
from all units, through ``p_ring``: two slots, read and written in turn. A program that writes slot (s + 1) % 2 has passed the
barrier of step s - 1, so every other program has read that slot.

Gates are computed with the operands swapped, gatesᵀ = W · hᵀ: the weights fill the rows of the tensor core's tile, however
few sequences there are. ``STACKED`` weights put four blocks of units under one another in one product, and it is split after.

A cell with later gates (``Cell.later``) has two launches a step, the STAGEs 1 and 2, around the product of those gates. The
first leaves the operand in the ring, where the second then writes h, and what the second reads of it in ``p_handed``.

Legend: T steps, N sequences, H units, s counts steps in the order of the walk, t in the order of the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_rnn.kernels.triton.barrier import arrive, wait
from fused_rnn.kernels.triton.product import STAGES, dot, rounded


@triton.jit
def _split(product, UNITS: tl.constexpr, BATCH: tl.constexpr):
    """(4·UNITS, BATCH) into four tiles of (UNITS, BATCH)."""
    # Row = (2·a + b)·UNITS + unit; splitting takes the last dimension apart.
    pair = tl.permute(tl.reshape(product, (2, 2, UNITS, BATCH)), (2, 3, 1, 0))
    low, high = tl.split(pair)
    first, second = tl.split(low)
    third, fourth = tl.split(high)
    return first, second, third, fourth


@triton.jit
def _product(p_weight, p_h, mask, i_program, K, GATES: tl.constexpr, STACKED: tl.constexpr, UNITS: tl.constexpr,
             BATCH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """W·hᵀ of a program's units, a tile of (UNITS, BATCH) per gate. p_h: (1, BATCH) pointers to the rows of h, K wide."""
    ROWS: tl.constexpr = 4 * UNITS if STACKED else UNITS
    PILES: tl.constexpr = 1 if STACKED else GATES
    sums = ()
    for _ in tl.static_range(PILES):
        sums = sums + (tl.zeros((ROWS, BATCH), tl.float32),)
    p_h = p_h + tl.arange(0, CHUNK)[:, None]
    p = p_weight + i_program.to(tl.int64) * (PILES * ROWS * K)
    o = tl.arange(0, ROWS)[:, None] * K + tl.arange(0, CHUNK)[None, :]
    # K is no constant here: one kernel serves every H.
    for k in tl.range(0, K, CHUNK, num_stages=STAGES):
        h = tl.load(p_h + k, mask=mask, other=0.0, cache_modifier=".cg")
        added = ()
        for pile in tl.static_range(PILES):
            w = tl.load(p + pile * ROWS * K + k + o)
            added = added + (dot(w, h, sums[pile], PRECISION),)
        sums = added
    if STACKED:
        sums = _split(sums[0], UNITS, BATCH)
    return sums


@triton.jit(do_not_specialize=["s_begin", "s_end", "first_tile", "first_d", "reverse_bits", "tiles", "D", "T", "N"])
def walk_forward(
    p_tape, p_out, p_ring, p_carry, p_handed, p_h_n, p_weight, p_product, p_bias, p_reset, p_lengths, p_offsets, p_counters,
    s_begin, s_end, first_tile, first_d, reverse_bits, tiles, D, T, N, H, ring_rows, ring_row, tape_row, tape_d, out_row,
    out_d,
    STEP: tl.constexpr, STAGE: tl.constexpr, FIRST: tl.constexpr, HANDED: tl.constexpr, GATES: tl.constexpr,
    TAPE: tl.constexpr, BIAS: tl.constexpr, CARRY: tl.constexpr,
    KEEP: tl.constexpr, HAS_OUT: tl.constexpr, RAGGED: tl.constexpr, HAS_RESET: tl.constexpr, HAS_BIAS: tl.constexpr,
    GIVEN: tl.constexpr, STACKED: tl.constexpr, UNITS: tl.constexpr, BATCH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Walk steps s_begin .. s_end - 1. Grid: (slices of units, batch tiles from first_tile on, recurrences from first_d on).

    Args:
        p_tape: (R, D, TAPE blocks·H), gates_x in its first blocks.
        p_out: (R, D, H), if HAS_OUT.
        p_ring: (2, D, ring_rows, ring_row): h, zero beyond H up to the next multiple of CHUNK; slot s % 2 is read in step s.
        p_carry: (D, N, H), in and out; unused without CARRY (1: c, 2: h).
        p_handed: (D, N, HANDED·H), from the first of two launches to the second; unused where STAGE is 0.
        p_h_n: (D, N, H): h of every sequence's last step, if HAS_OUT; unused where h is the carry.
        p_weight: (D, slices, piles, rows, ring_row), padded with zeros.
        p_product: (D, N, GATES·H): W·h of this one step, if GIVEN; in STAGE 2, W·operand.
        p_bias: (D, BIAS blocks·H).
        p_reset: (R,) bytes.
        p_lengths: (N,) steps of each sequence, longest first, if RAGGED.
        p_offsets: (T,) first row of each step, if RAGGED.
        p_counters: (D, batch tiles, T + 1) zeros, unless the product is GIVEN.
        STAGE: 0 for a step in one piece. GATES are those of the stage, from gate FIRST on. Of the TAPE blocks those are
            written whose bits KEEP has.
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
    p_tape += i_d * tape_d
    p_out += i_d * out_d
    p_counters += (i_d * tiles + i_b) * (T + 1)

    begin, end = s_begin, s_end
    lengths = tl.full((1, BATCH), 0, tl.int64) + T
    if RAGGED:
        lengths = tl.load(p_lengths + o_b, mask=o_b < N, other=0)
        longest = tl.load(p_lengths + i_b * BATCH).to(tl.int32)
        # The steps in which the tile has a row: the first ones, or the last ones of a walk from the end.
        begin = tl.maximum(begin, tl.where(reverse != 0, T - longest, 0))
        end = tl.minimum(end, tl.where(reverse != 0, T, longest))

    bias = ()
    for block in tl.static_range(BIAS):
        if HAS_BIAS:
            b = tl.load(p_bias + (i_d * BIAS + block) * H + o_u, mask=m_u, other=0.0).to(COMPUTE)
        else:
            b = tl.zeros((UNITS, 1), COMPUTE)
        bias = bias + (b,)
    carry = tl.zeros((UNITS, BATCH), COMPUTE)
    if CARRY:
        carry = tl.load(p_carry + o_state, mask=m_all, other=0.0).to(COMPUTE)

    for s in range(begin, end):
        t = tl.where(reverse != 0, T - 1 - s, s)
        if RAGGED:
            first = tl.load(p_offsets + t)
        else:
            first = t.to(tl.int64) * N
        m_b = (o_b < N) & (t < lengths)
        mask = m_u & m_b
        rows = first + o_b
        # Read before the wait: these are ready when the others are.
        o_tape = rows * tape_row + o_u
        gates_x = ()
        for gate in tl.static_range(GATES):
            gates_x = gates_x + (tl.load(p_tape + o_tape + (FIRST + gate) * H, mask=mask, other=0.0),)
        m_h = m_b
        if HAS_RESET:
            m_h = m_b & (tl.load(p_reset + rows, mask=m_b, other=0) == 0)
            carry = tl.where(m_h | ~m_b, carry, 0.0)
        if not GIVEN:
            if s > begin:
                wait(p_counters + s - 1, tl.num_programs(0))
        slot = ((s % 2) * D + i_d).to(tl.int64)
        if GIVEN:
            # A product with h is zero after a reset; one with the operand, which this step has made, is what it is.
            m_product = m_u & (m_b if STAGE == 2 else m_h)
            product = ()
            for gate in tl.static_range(GATES):
                o_product = (i_d * N + o_b).to(tl.int64) * (GATES * H) + gate * H + o_u
                product = product + (tl.load(p_product + o_product, mask=m_product, other=0.0).to(COMPUTE),)
        else:
            p_h = p_ring + (slot * ring_rows + o_b) * ring_row
            product = _product(p_weight, p_h, m_h, i_program, ring_row, GATES, STACKED, UNITS, BATCH, CHUNK, PRECISION)

        x = ()
        for gate in tl.static_range(GATES):
            x = x + (gates_x[gate].to(COMPUTE),)
        if STAGE == 0:
            h, after, blocks = STEP(x, product, bias, carry)
        elif STAGE == 1:
            # In the place of h the operand.
            h, handed, blocks = STEP(x, product, bias, carry)
            after = carry
            for i in tl.static_range(HANDED):
                tl.store(p_handed + o_handed + i * H, handed[i], mask=mask)
        else:
            handed = ()
            for i in tl.static_range(HANDED):
                handed = handed + (tl.load(p_handed + o_handed + i * H, mask=mask, other=0.0),)
            h, after, blocks = STEP(handed, x, product, bias, carry)

        stored = h.to(p_out.dtype.element_ty)
        sent = rounded(stored, PRECISION)
        next_slot = (((s + 1) % 2) * D + i_d).to(tl.int64)
        tl.store(p_ring + (next_slot * ring_rows + o_b) * ring_row + o_u, sent, mask=mask)
        if not GIVEN:
            arrive(p_counters + s)
        # What no other program waits for.
        if HAS_OUT:
            tl.store(p_out + rows * out_row + o_u, stored, mask=mask)
            if CARRY != 2:
                last = t == tl.where(reverse != 0, 0, lengths - 1)
                tl.store(p_h_n + o_state, h, mask=mask & last)
        if CARRY:
            carry = tl.where(m_b, after, carry)
        if KEEP:
            for block in tl.static_range(TAPE):
                if KEEP >> block & 1:
                    tl.store(p_tape + o_tape + block * H, blocks[block].to(p_tape.dtype.element_ty), mask=mask)

    if CARRY:
        tl.store(p_carry + o_state, carry, mask=m_all)
