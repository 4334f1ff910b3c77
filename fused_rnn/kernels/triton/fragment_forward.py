"""The forward in registers: one body for every cell, in the shared form and in the alone form (``fragments``).

A program owns ``UNITS`` hidden units of ``BATCH`` sequences of one recurrence: all their gates, and their carry (the LSTM's c,
the GRU's h), which stays in registers. What a step needs of h comes from all units: in the shared form through ``p_ring``, two
slots that are read and written in turn. A program that writes slot (s + 1) % 2 has waited for step s - 1, so every program has
read that slot; the alone form has one slot in shared memory, between two barriers of the program.

Legend: T steps, N sequences, H units, s counts steps in the order of the walk, t in the order of the rows.
"""

from __future__ import annotations

import triton.language as tl

from fused_rnn.kernels.triton.fragments import (
    PART,
    PILE,
    allocate,
    allocate_nothing,
    alone_product,
    arrive,
    expected,
    hold,
    in_planes,
    shared_product,
    wait,
)
from fused_rnn.kernels.triton.language import barrier, gl, jit


@jit
def _weights(p_weight, i_u, H, tail, GATES: tl.constexpr, PILES: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr,
             HELD: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr, ALONE: tl.constexpr, LEFT: tl.constexpr,
             DTYPE: tl.constexpr):  # fmt: skip
    """The rows of weight_hh (G·H, H) that belong to a program's units, tile by tile, zero beyond H."""
    weights = ()
    if ALONE:
        o_row = gl.arange(0, UNITS, layout=gl.SliceLayout(1, LEFT))[:, None]
        # As ``fragments.in_rows`` has them.
        o_unit = o_row // PILE * PILE + o_row % (PILE // 2) * 2 + o_row // (PILE // 2) % 2
        o_k = gl.arange(0, UNITS, layout=gl.SliceLayout(0, LEFT))[None, :]
        mask = (o_unit < H) & (o_k < H)
        for gate in gl.static_range(GATES):
            tile = gl.load(p_weight + (gate * H + o_unit) * H + o_k, mask=mask, other=0.0)
            weights = hold(weights, tail, tile, gate, GATES, PLANES, HELD, DTYPE)
    else:
        i_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None, None]
        o_row = gl.arange(0, PILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :, None]
        o_part = gl.arange(0, PART, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :]
        for pile in gl.static_range(PILES):
            row = pile * PILE + o_row
            unit = i_u * UNITS + row % UNITS
            for part in gl.static_range(PARTS):
                o_k = (i_warp * PARTS + part) * PART + o_part
                mask = (row < GATES * UNITS) & (unit < H) & (o_k < H)
                tile = gl.load(p_weight + (row // UNITS * H + unit) * H + o_k, mask=mask, other=0.0)
                weights = hold(weights, tail, tile, pile * PARTS + part, PILES * PARTS, PLANES, HELD, DTYPE)
    return weights


@jit
def _bias(p_bias, p_bias_hh, o_u, m_u, H, GATES: tl.constexpr, BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
          RAW_BIAS: tl.constexpr, UNITS: tl.constexpr, POINT: tl.constexpr):  # fmt: skip
    """The blocks of the bias, (UNITS, 1) each.

    A block beyond the gates is the part of bias_hh that stays apart, that of the last gate, whose own block then is bias_ih.
    """
    blocks = ()
    for i in gl.static_range(BIAS):
        block = gl.full((UNITS, 1), 0.0, gl.float32, layout=POINT)
        if HAS_BIAS and not RAW_BIAS:
            block = gl.load(p_bias + (i * H + o_u), mask=m_u, other=0.0).to(gl.float32)
        elif HAS_BIAS:
            if i < GATES:
                block += gl.load(p_bias + (i * H + o_u), mask=m_u, other=0.0).to(gl.float32)
            if i != GATES - 1 or BIAS == GATES:
                block += gl.load(p_bias_hh + (min(i, GATES - 1) * H + o_u), mask=m_u, other=0.0).to(gl.float32)
        blocks = blocks + (block,)
    return blocks


@jit
def _gates_x(p_rows, mask, H, GATES: tl.constexpr):
    """gates_x of a step. p_rows: pointers to the first gate, (UNITS, BATCH)."""
    gates_x = ()
    for gate in gl.static_range(GATES):
        gates_x = gates_x + (gl.load(p_rows + gate * H, mask=mask, other=0.0),)
    return gates_x


@jit
def _rows_of(p_offsets, t, N, T, RAGGED: tl.constexpr):
    """The first row of step t."""
    first = t.to(gl.int64) * N
    if RAGGED:
        first = gl.load(p_offsets + gl.minimum(gl.maximum(t, 0), T - 1))
    return first


@jit(do_not_specialize=["s_end", "first_tile", "tiles_each", "first_d", "reverse_bits", "tiles", "D", "T", "N"])
def fragment_forward(
    p_tape, p_out, p_ring, p_h_0, p_h_n, p_carry_0, p_carry_n, p_weight, p_weight_back, p_bias, p_bias_hh, p_bias_back,
    p_bias_hh_back, p_reset, p_lengths, p_offsets, p_counters,
    s_end, first_tile, tiles_each, first_d, reverse_bits, tiles, D, T, N, H, ring_rows, tape_row, tape_d, out_row, out_d,
    STEP: tl.constexpr, GATES: tl.constexpr, TAPE: tl.constexpr, BIAS: tl.constexpr, CARRY: tl.constexpr,
    KEEP: tl.constexpr, RAGGED: tl.constexpr, HAS_RESET: tl.constexpr, HAS_STATES: tl.constexpr, HAS_BIAS: tl.constexpr,
    RAW_BIAS: tl.constexpr, ALONE: tl.constexpr, MOST: tl.constexpr, UNITS: tl.constexpr, BATCH: tl.constexpr,
    PILES: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, PLANES: tl.constexpr, HELD: tl.constexpr,
    AHEAD: tl.constexpr, DTYPE: tl.constexpr, MMA: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    POINT: tl.constexpr, SUMS: tl.constexpr, NOTHING: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Walk steps 0 .. s_end - 1. Grid: (slices of units, groups of batch tiles, recurrences from first_d on).

    Args:
        p_tape: (R, D, TAPE blocks·H), gates_x in its first blocks. p_out: (R, D, H).
        p_ring: (2, PLANES, D, ring_rows, WARPS·PARTS·PART) of DTYPE, zeros; in the shared form alone.
        p_h_0: (D, N, H), h before the walk, if HAS_STATES; else it is zero.
        p_h_n: (D, N, H), written: h of every sequence's last step. It may be p_h_0.
        p_carry_0, p_carry_n: likewise the other state that passes from step to step; unused without CARRY (1: c, 2: h itself).
        p_weight: (G·H, H) of the first recurrence, p_weight_back of the second.
        p_bias: (D, BIAS blocks·H). With RAW_BIAS bias_ih of the first recurrence, p_bias_hh its bias_hh, and the other two
            those of the second, (G·H,) each.
        p_reset: (R,) bytes.
        p_lengths: (N,) steps of each sequence, longest first, if RAGGED. p_offsets: (T,) first row of each step, if RAGGED.
        p_counters: (D, batch tiles, T + 1, WARPS) zeros; in the shared form alone.
        KEEP: the blocks of the tape that are written, a bit each.
        tiles_each: batch tiles of a program, from first_tile on, no more than MOST. While one waits, another is computed.
        AHEAD, MMA, LEFT, …: as of ``fragments``. SUMS, ROWS, TAIL: layouts in shared memory.
    """
    K: tl.constexpr = UNITS if ALONE else WARPS * PARTS * PART
    i_u = gl.program_id(0)
    i_first = first_tile + gl.program_id(1) * tiles_each
    i_d = first_d + gl.program_id(2)
    slices = gl.num_programs(0)
    o_u = i_u * UNITS + gl.arange(0, UNITS, layout=gl.SliceLayout(1, POINT))[:, None]
    o_tile = gl.arange(0, BATCH, layout=gl.SliceLayout(0, POINT))[None, :]
    m_u = o_u < H
    reverse = (reverse_bits >> i_d) & 1
    p_tape += i_d * tape_d
    p_out += i_d * out_d
    p_counters += (i_d * tiles + i_first).to(gl.int64) * ((T + 1) * WARPS)

    begin, end = 0, s_end
    if RAGGED:
        longest = gl.load(p_lengths + i_first * BATCH).to(gl.int32)
        # The steps in which the first tile has a row: the first ones, or the last ones of a walk from the end.
        begin = gl.where(reverse != 0, T - longest, 0)
        end = gl.minimum(end, gl.where(reverse != 0, T, longest))

    tail = p_tape
    TILES: tl.constexpr = GATES if ALONE else PILES * PARTS
    if HELD < TILES * PLANES:
        SHAPE: tl.constexpr = [UNITS, UNITS] if ALONE else [WARPS, PILE, PART]
        tail = gl.allocate_shared_memory(DTYPE, [TILES * PLANES - HELD] + SHAPE, TAIL)
    p_w = p_weight
    if i_d > 0:
        p_w = p_weight_back
    weights = _weights(p_w, i_u, H, tail, GATES, PILES, PARTS, PLANES, HELD, UNITS, WARPS, ALONE, LEFT, DTYPE)

    if RAW_BIAS:
        if i_d > 0:
            p_bias = p_bias_back
            p_bias_hh = p_bias_hh_back
    else:
        p_bias += i_d * (BIAS * H)
    bias = _bias(p_bias, p_bias_hh, o_u, m_u, H, GATES, BIAS, HAS_BIAS, RAW_BIAS, UNITS, POINT)
    if ALONE:
        rows = allocate(PLANES, DTYPE, UNITS, BATCH, ROWS)
    else:
        sums = allocate(PILES, gl.float32, WARPS * PILE, BATCH, SUMS)
        nothing = allocate_nothing(WARPS, MMA, NOTHING)
        plane_stride = D * ring_rows * K
        i_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))
        needed = expected(i_warp, slices, 1, PARTS, UNITS)
        o_part = gl.arange(0, PART, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
        o_row = i_first * BATCH + gl.arange(0, BATCH, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
        p_rows = p_ring + ((i_d * ring_rows + o_row) * K + i_warp[:, None, None] * (PARTS * PART) + o_part)
    # The carry of one tile stays in registers; several pass through shared memory.
    count = 1
    if MOST > 1:
        count = gl.minimum(tiles_each, tiles - i_first)
        carries = gl.allocate_shared_memory(gl.float32, [MOST, UNITS, BATCH], SUMS)
    carry = gl.full((UNITS, BATCH), 0.0, gl.float32, layout=POINT)
    for i in range(0, count):
        o_b = (i_first + i) * BATCH + o_tile
        m_all = m_u & (o_b < N)
        o_state = (i_d * N + o_b).to(gl.int64) * H + o_u
        h = gl.full((UNITS, BATCH), 0.0, gl.float32, layout=POINT)
        carry = h
        if HAS_STATES:
            h = gl.load(p_h_0 + o_state, mask=m_all, other=0.0).to(gl.float32)
            if CARRY:
                carry = gl.load(p_carry_0 + o_state, mask=m_all, other=0.0).to(gl.float32)
        if MOST > 1:
            carries.index(i).store(carry)
        planes = in_planes(h, PLANES, DTYPE)
        if ALONE:
            for plane in gl.static_range(PLANES):
                rows[plane].store(planes[plane])
            barrier()
        else:
            o_ring = (i_d * ring_rows + o_b) * K + o_u
            for slot in gl.static_range(2):
                # Both slots: a sequence whose first step comes later finds its h in either.
                for plane in gl.static_range(PLANES):
                    gl.store(p_ring + (slot * PLANES + plane) * plane_stride + o_ring, planes[plane], mask=m_all)
            arrive(p_counters + (i * (T + 1) + begin) * WARPS, i_u, 1, PARTS, UNITS)

    o_b = i_first * BATCH + o_tile
    lengths = gl.full((1, BATCH), 0, gl.int64, layout=POINT) + T
    if RAGGED:
        lengths = gl.load(p_lengths + o_b, mask=o_b < N, other=0)
    t = gl.where(reverse != 0, T - 1 - begin, begin)
    first = _rows_of(p_offsets, t, N, T, RAGGED)
    m_b = (o_b < gl.where(begin < end, N, 0)) & (t < lengths)
    gates_x = _gates_x(p_tape + ((first + o_b) * tape_row + o_u), m_u & m_b, H, GATES)
    for s in range(begin, end):
        for i in range(0, count):
            t = gl.where(reverse != 0, T - 1 - s, s)
            mask = m_u & m_b
            rows_now = first + o_b
            o_tape = rows_now * tape_row + o_u
            o_state = (i_d * N + o_b).to(gl.int64) * H + o_u
            o_ring = (i_d * ring_rows + o_b) * K + o_u
            m_h = m_b
            if HAS_RESET:
                m_h = m_b & (gl.load(p_reset + rows_now, mask=m_b, other=0) == 0)
            last = t == gl.where(reverse != 0, 0, lengths - 1)
            # What the next tile, or step, reads of its own is on its way while this one waits.
            s_next = s + 1
            o_next = o_b
            if MOST > 1:
                s_next = gl.where(i + 1 < count, s, s + 1)
                o_next = (i_first + gl.where(i + 1 < count, i + 1, 0)) * BATCH + o_tile
                if RAGGED:
                    lengths = gl.load(p_lengths + o_next, mask=o_next < N, other=0)
            t_next = gl.where(reverse != 0, T - 1 - s_next, s_next)
            first = _rows_of(p_offsets, t_next, N, T, RAGGED)
            m_next = (o_next < gl.where(s_next < end, N, 0)) & (t_next < lengths)
            gates_next = _gates_x(p_tape + ((first + o_next) * tape_row + o_u), m_u & m_next, H, GATES)

            if MOST > 1:
                carry = carries.index(i).load(POINT)
            if ALONE:
                product = alone_product(weights, tail, rows, GATES, 1, UNITS, BATCH, PLANES, HELD, MMA, LEFT, RIGHT,
                                        POINT)  # fmt: skip
                barrier()
            else:
                wait(p_counters + (i * (T + 1) + s) * WARPS, needed, i_warp)
                p_now = p_rows + ((s % 2) * (PLANES * plane_stride) + i * (BATCH * K))
                product = shared_product(weights, tail, p_now, plane_stride, sums, nothing, PILES, PARTS, 1, AHEAD, GATES,
                                         UNITS, BATCH, WARPS, PLANES, HELD, MMA, LEFT, POINT)  # fmt: skip
            x = ()
            for gate in gl.static_range(GATES):
                x = x + (gates_x[gate].to(gl.float32),)
            if HAS_RESET:
                # A product with zero is zero; h, whatever it was, is zero before this step.
                kept = ()
                for gate in gl.static_range(GATES):
                    kept = kept + (gl.where(m_h, product[gate], 0.0),)
                product = kept
                carry = gl.where(m_b & (m_h == 0), 0.0, carry)
            h, after, blocks = STEP(x, product, bias, carry)

            planes = in_planes(h, PLANES, DTYPE)
            if ALONE:
                for plane in gl.static_range(PLANES):
                    old = planes[plane]
                    if RAGGED:
                        # A sequence without this step keeps its h.
                        old = gl.where(m_b, old, rows[plane].load(POINT))
                    rows[plane].store(old)
                barrier()
            else:
                for plane in gl.static_range(PLANES):
                    p_slot = p_ring + (((s + 1) % 2) * PLANES + plane) * plane_stride
                    gl.store(p_slot + o_ring, planes[plane], mask=mask)
                arrive(p_counters + (i * (T + 1) + s + 1) * WARPS, i_u, 1, PARTS, UNITS)
            # What no other program waits for.
            gl.store(p_out + (rows_now * out_row + o_u), h.to(p_out.dtype.element_ty), mask=mask)
            if CARRY != 2:
                gl.store(p_h_n + o_state, h.to(p_h_n.dtype.element_ty), mask=mask & last)
            if CARRY:
                carry = gl.where(m_b, after, carry)
                if MOST > 1:
                    carries.index(i).store(carry)
            if KEEP:
                for block in gl.static_range(TAPE):
                    if KEEP >> block & 1:
                        gl.store(p_tape + (o_tape + block * H), blocks[block].to(p_tape.dtype.element_ty), mask=mask)
            gates_x, m_b, o_b = gates_next, m_next, o_next

    if CARRY:
        for i in range(0, count):
            if MOST > 1:
                carry = carries.index(i).load(POINT)
            o_b = (i_first + i) * BATCH + o_tile
            o_state = (i_d * N + o_b).to(gl.int64) * H + o_u
            gl.store(p_carry_n + o_state, carry.to(p_carry_n.dtype.element_ty), mask=m_u & (o_b < N))
