"""The backward in registers: one body for every cell, in the shared form and in the alone form (``fragments``).

A program owns the same kind of tile as in the forward. In each step it first forms what the d_gates of the step before (in
this walk) send to its units of h, W[:, units]ᵀ · d_gatesᵀ, then differentiates its own units and hands on their d_gates, which
all programs of the tile read in the next step. One more step follows the last one, for its product alone.

Legend: T steps, N sequences, H units, s counts steps in the order of this walk, t in the order of the rows.
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
    in_rows,
    shared_product,
    wait,
)
from fused_rnn.kernels.triton.language import barrier, gl, jit


@jit
def _weights(p_weight, i_u, H, tail, GATES: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr,
             HELD: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr, ALONE: tl.constexpr, LEFT: tl.constexpr,
             TURN: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The columns of weight_hh (G·H, H) that belong to a program's units, tile by tile, zero beyond H."""
    weights = ()
    if ALONE:
        o_unit = gl.arange(0, UNITS, layout=gl.SliceLayout(1, TURN))[:, None]
        o_k = gl.arange(0, UNITS, layout=gl.SliceLayout(0, TURN))[None, :]
        mask = (o_unit < H) & (o_k < H)
        for gate in gl.static_range(GATES):
            tile = gl.load(p_weight + ((gate + FIRST) % GATES * H + o_k) * H + o_unit, mask=mask, other=0.0)
            tile = gl.convert_layout(in_rows(tile, UNITS, UNITS), LEFT)
            weights = hold(weights, tail, tile, gate, GATES, PLANES, HELD, DTYPE)
    else:
        i_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, TURN)))[:, None, None]
        o_row = gl.arange(0, PILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, TURN)))[None, :, None]
        o_part = gl.arange(0, PART, layout=gl.SliceLayout(0, gl.SliceLayout(1, TURN)))[None, None, :]
        unit = i_u * UNITS + o_row
        for part in gl.static_range(PARTS):
            place = i_warp * PARTS + part
            gate = (place % GATES + FIRST) % GATES
            o_k = place // GATES * PART + o_part
            mask = (o_row < UNITS) & (unit < H) & (o_k < H)
            tile = gl.load(p_weight + (gate * H + o_k) * H + unit, mask=mask, other=0.0)
            weights = hold(weights, tail, gl.convert_layout(tile, LEFT), part, PARTS, PLANES, HELD, DTYPE)
    return weights


@jit
def _read(
    p_tape, p_out, p_before_0, p_d_out, p_d_carries, p_lengths, p_reset, p_offsets, t, t_begin, t_end, o_b, o_u, i_d,
    reverse, T, N, H, tape_row, out_row, d_out_row, d_carries_row,
    TAPE: tl.constexpr, CELL: tl.constexpr, CARRY: tl.constexpr, READS_OUT: tl.constexpr, RAGGED: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_STATES: tl.constexpr, HAS_D_OUT: tl.constexpr, HAS_D_CARRIES: tl.constexpr,
    BATCH: tl.constexpr, POINT: tl.constexpr,
):  # fmt: skip
    """What step t of a tile reads of its own.

    Returns: the tape, the carry before, the gradients from above; whether a row has the step, and the same where it was not
    reset; the rows. A step outside what is walked, or outside the sequence, has no row.
    """
    lengths = gl.full((1, BATCH), 0, gl.int64, layout=POINT) + T
    if RAGGED:
        lengths = gl.load(p_lengths + o_b, mask=o_b < N, other=0)
    t_before = gl.where(reverse != 0, t + 1, t - 1)
    m_b = (o_b < gl.where((t >= t_begin) & (t < t_end), N, 0)) & (t < lengths)
    m_before = m_b & (o_b < gl.where((t_before >= 0) & (t_before < T), N, 0)) & (t_before < lengths)
    if RAGGED:
        rows = gl.load(p_offsets + gl.minimum(gl.maximum(t, 0), T - 1)) + o_b
        rows_before = gl.load(p_offsets + gl.minimum(gl.maximum(t_before, 0), T - 1)) + o_b
    else:
        rows = t.to(gl.int64) * N + o_b
        rows_before = t_before.to(gl.int64) * N + o_b
    m_u = o_u < H
    mask = m_u & m_b
    tape = ()
    for block in gl.static_range(TAPE):
        tape = tape + (gl.load(p_tape + (rows * tape_row + block * H + o_u), mask=mask, other=0.0),)
    if READS_OUT:
        tape = tape + (gl.load(p_out + (rows * out_row + o_u), mask=mask, other=0.0),)
    m_fresh = m_b
    if HAS_RESET:
        m_fresh = m_b & (gl.load(p_reset + rows, mask=m_b, other=0) == 0)
    before = ()
    if CARRY:
        m_kept = m_u & m_fresh & m_before
        if CARRY == 1:
            before = (gl.load(p_tape + (rows_before * tape_row + CELL * H + o_u), mask=m_kept, other=0.0),)
        else:
            before = (gl.load(p_out + (rows_before * out_row + o_u), mask=m_kept, other=0.0),)
        if HAS_STATES:
            o_state = (i_d * N + o_b).to(gl.int64) * H + o_u
            before = before + (gl.load(p_before_0 + o_state, mask=m_u & m_fresh & (m_before == 0), other=0.0),)
    above = ()
    if HAS_D_OUT:
        above = above + (gl.load(p_d_out + (rows * d_out_row + o_u), mask=mask, other=0.0),)
    if HAS_D_CARRIES:
        above = above + (gl.load(p_d_carries + (rows * d_carries_row + o_u), mask=mask, other=0.0),)
    return tape, before, above, m_b, m_fresh, rows


@jit(
    do_not_specialize=[
        "t_begin", "t_end", "first_row", "first_tile", "tiles_each", "first_d", "reverse_bits", "tiles", "D", "T", "N",
    ]
)  # fmt: skip
def fragment_backward(
    p_d_gates, p_ring, p_d_h_n, p_d_h_0, p_d_carry_n, p_d_carry_0, p_d_out, p_d_carries, p_tape, p_out, p_before_0, p_weight,
    p_weight_back, p_reset, p_lengths, p_offsets, p_counters,
    t_begin, t_end, first_row, first_tile, tiles_each, first_d, reverse_bits, tiles, D, T, N, H, ring_rows,
    d_gates_row, d_gates_d, d_out_row, d_out_d, d_carries_row, d_carries_d, tape_row, tape_d, out_row, out_d,
    STEP: tl.constexpr, GATES: tl.constexpr, FIRST: tl.constexpr, TAPE: tl.constexpr, CELL: tl.constexpr, EMITTED: tl.constexpr,
    CARRY: tl.constexpr, READS_OUT: tl.constexpr, RAGGED: tl.constexpr, HAS_RESET: tl.constexpr, HAS_STATES: tl.constexpr,
    HAS_D_OUT: tl.constexpr, HAS_D_H: tl.constexpr, HAS_D_CARRY: tl.constexpr, HAS_D_CARRIES: tl.constexpr, ALONE: tl.constexpr,
    MOST: tl.constexpr, UNITS: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr,
    PLANES: tl.constexpr, HELD: tl.constexpr, AHEAD: tl.constexpr, CHAINS: tl.constexpr, DTYPE: tl.constexpr, MMA: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, POINT: tl.constexpr, TURN: tl.constexpr, SUMS: tl.constexpr, NOTHING: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Walk steps t_begin .. t_end - 1. Grid: (slices of units, groups of batch tiles, recurrences from first_d on).

    Args:
        p_d_gates: (rows of the walked steps, D, EMITTED blocks·H), written; row ``first_row`` of all steps is its row 0.
        p_ring: (2, PLANES, D, ring_rows, WARPS·PARTS·PART) of DTYPE, zeros; in the shared form alone. A row holds 32 units of
            the first gate, the same 32 of the next, and so on, then the next 32; zero for a row that sends nothing back.
        p_d_h_n: (D, N, H), the gradient of h after the walked steps, if HAS_D_H; else it is zero.
        p_d_h_0: (D, N, H), written: the gradient of h before them. It may be p_d_h_n.
        p_d_carry_n, p_d_carry_0: likewise of c, with CARRY 1 alone.
        p_d_out: (R, D, H), if HAS_D_OUT. p_d_carries: (R, D, H), the gradient of every step's carry, if HAS_D_CARRIES.
        p_tape: (R, D, TAPE blocks·H); with CARRY 1 the carry of every step is its block CELL.
        p_out: (R, D, H), with CARRY 2 the carry of every step; if READS_OUT the STEP gets it behind the tape.
        p_before_0: the carry before the first step, (D, N, H), zero without HAS_STATES; with CARRY alone.
        p_weight: (G·H, H) of the first recurrence, p_weight_back of the second.
        FIRST: the gate of the weights to which the first block of d_gates belongs; the next ones follow, and the first again.
        p_reset, p_lengths, p_offsets, p_counters, tiles_each, AHEAD, …: as in the forward, the counters for n + 2 steps.
    """
    K: tl.constexpr = WARPS * PARTS * PART
    i_u = gl.program_id(0)
    i_first = first_tile + gl.program_id(1) * tiles_each
    i_d = first_d + gl.program_id(2)
    slices = gl.num_programs(0)
    o_u = i_u * UNITS + gl.arange(0, UNITS, layout=gl.SliceLayout(1, POINT))[:, None]
    o_tile = gl.arange(0, BATCH, layout=gl.SliceLayout(0, POINT))[None, :]
    m_u = o_u < H
    reverse = (reverse_bits >> i_d) & 1
    p_d_gates += i_d * d_gates_d
    p_d_out += i_d * d_out_d
    p_d_carries += i_d * d_carries_d
    p_tape += i_d * tape_d
    p_out += i_d * out_d
    n = t_end - t_begin
    p_counters += (i_d * tiles + i_first).to(gl.int64) * ((n + 2) * WARPS)

    begin, end = 0, n
    if RAGGED:
        longest = gl.minimum(gl.maximum(gl.load(p_lengths + i_first * BATCH).to(gl.int32) - t_begin, 0), n)
        # The steps in which the first tile has a row; if it has none, no step.
        begin = gl.where(reverse != 0, 0, n - longest)
        end = gl.where(reverse != 0, longest, n)

    tail = p_tape
    TILES: tl.constexpr = GATES if ALONE else PARTS
    if HELD < TILES * PLANES:
        SHAPE: tl.constexpr = [UNITS, UNITS] if ALONE else [WARPS, PILE, PART]
        tail = gl.allocate_shared_memory(DTYPE, [TILES * PLANES - HELD] + SHAPE, TAIL)
    p_w = p_weight
    if i_d > 0:
        p_w = p_weight_back
    weights = _weights(p_w, i_u, H, tail, GATES, FIRST, PARTS, PLANES, HELD, UNITS, WARPS, ALONE, LEFT, TURN, DTYPE)

    if ALONE:
        d_rows = allocate(GATES * PLANES, DTYPE, UNITS, BATCH, ROWS)
    else:
        sums = allocate(1, gl.float32, WARPS * PILE, BATCH, SUMS)
        nothing = allocate_nothing(WARPS, MMA, NOTHING)
        plane_stride = D * ring_rows * K
        i_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))
        needed = expected(i_warp, slices, GATES, PARTS, UNITS)
        o_part = gl.arange(0, PART, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
        o_row = i_first * BATCH + gl.arange(0, BATCH, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
        p_rows = p_ring + ((i_d * ring_rows + o_row) * K + i_warp[:, None, None] * (PARTS * PART) + o_part)
    # The gradients of one tile's states stay in registers; those of several pass through shared memory.
    count = 1
    if MOST > 1:
        count = gl.minimum(tiles_each, tiles - i_first)
        d_hs = gl.allocate_shared_memory(gl.float32, [MOST, UNITS, BATCH], SUMS)
        d_cs = d_hs
        if CARRY == 1:
            d_cs = gl.allocate_shared_memory(gl.float32, [MOST, UNITS, BATCH], SUMS)
    d_h = gl.full((UNITS, BATCH), 0.0, gl.float32, layout=POINT)
    d_carry = d_h
    for i in range(0, count):
        o_b = (i_first + i) * BATCH + o_tile
        m_all = m_u & (o_b < N)
        o_state = (i_d * N + o_b).to(gl.int64) * H + o_u
        if HAS_D_H:
            d_h = gl.load(p_d_h_n + o_state, mask=m_all, other=0.0).to(gl.float32)
        if HAS_D_CARRY:
            d_carry = gl.load(p_d_carry_n + o_state, mask=m_all, other=0.0).to(gl.float32)
        if MOST > 1:
            d_hs.index(i).store(d_h)
            if CARRY == 1:
                d_cs.index(i).store(d_carry)

    o_b = i_first * BATCH + o_tile
    t = gl.where(reverse != 0, t_begin + begin, t_end - 1 - begin)
    tape, before, above, m_b, m_fresh, rows = _read(
        p_tape, p_out, p_before_0, p_d_out, p_d_carries, p_lengths, p_reset, p_offsets, t, t_begin, t_end, o_b, o_u, i_d,
        reverse, T, N, H, tape_row, out_row, d_out_row, d_carries_row, TAPE, CELL, CARRY, READS_OUT, RAGGED, HAS_RESET,
        HAS_STATES, HAS_D_OUT, HAS_D_CARRIES, BATCH, POINT,
    )  # fmt: skip
    # One more step follows the last one, for its product alone.
    for s in range(begin, gl.where(begin < end, end + 1, end)):
        for i in range(0, count):
            # What the next tile, or step, reads of its own is on its way while this one waits.
            s_next = s + 1
            o_next = o_b
            if MOST > 1:
                s_next = gl.where(i + 1 < count, s, s + 1)
                o_next = (i_first + gl.where(i + 1 < count, i + 1, 0)) * BATCH + o_tile
            t_next = gl.where(reverse != 0, t_begin + s_next, t_end - 1 - s_next)
            next_tape, next_before, next_above, next_m_b, next_m_fresh, next_rows = _read(
                p_tape, p_out, p_before_0, p_d_out, p_d_carries, p_lengths, p_reset, p_offsets, t_next, t_begin, t_end,
                o_next, o_u, i_d, reverse, T, N, H, tape_row, out_row, d_out_row, d_carries_row, TAPE, CELL, CARRY, READS_OUT,
                RAGGED, HAS_RESET, HAS_STATES, HAS_D_OUT, HAS_D_CARRIES, BATCH, POINT,
            )  # fmt: skip
            if MOST > 1:
                d_h = d_hs.index(i).load(POINT)
                if CARRY == 1:
                    d_carry = d_cs.index(i).load(POINT)
            if s > begin:
                if ALONE:
                    products = alone_product(weights, tail, d_rows, GATES, GATES, UNITS, BATCH, PLANES, HELD, MMA, LEFT, RIGHT,
                                             POINT)  # fmt: skip
                    for gate in gl.static_range(GATES):
                        d_h += products[gate]
                    barrier()
                else:
                    wait(p_counters + (i * (n + 2) + s) * WARPS, needed, i_warp)
                    p_now = p_rows + ((s % 2) * (PLANES * plane_stride) + i * (BATCH * K))
                    d_h += shared_product(weights, tail, p_now, plane_stride, sums, nothing, 1, PARTS, CHAINS, AHEAD, 1, UNITS,
                                          BATCH, WARPS, PLANES, HELD, MMA, LEFT, POINT)[0]  # fmt: skip
            d_above = d_h
            if HAS_D_OUT:
                d_above += above[0].to(gl.float32)
            if HAS_D_CARRIES:
                d_carry += above[len(above) - 1].to(gl.float32)
            blocks = ()
            for block in gl.static_range(TAPE + READS_OUT):
                blocks = blocks + (tape[block].to(gl.float32),)
            carry_before = d_carry
            if CARRY:
                # Of the step before, or from before the walk: where one was read, the other is zero.
                carry_before = before[0].to(gl.float32)
                if HAS_STATES:
                    carry_before += before[1].to(gl.float32)
            d_gates, d_direct, d_carry_before = STEP(blocks, carry_before, d_above, d_carry)

            o_ring = (i_d * ring_rows + o_b) * K + o_u // PART * (GATES * PART) + o_u % PART
            for gate in gl.static_range(GATES):
                # A row without this step, or reset in it, sends nothing further back.
                planes = in_planes(gl.where(m_fresh, d_gates[gate], 0.0), PLANES, DTYPE)
                for plane in gl.static_range(PLANES):
                    if ALONE:
                        d_rows[gate * PLANES + plane].store(planes[plane])
                    else:
                        p_slot = p_ring + (((s + 1) % 2) * PLANES + plane) * plane_stride
                        gl.store(p_slot + (o_ring + gate * PART), planes[plane], mask=m_u & (o_b < N))
            if ALONE:
                barrier()
            else:
                arrive(p_counters + (i * (n + 2) + s + 1) * WARPS, i_u, GATES, PARTS, UNITS)
            # What no other program waits for.
            for block in gl.static_range(EMITTED):
                stored = d_gates[block].to(p_d_gates.dtype.element_ty)
                gl.store(p_d_gates + ((rows - first_row) * d_gates_row + block * H + o_u), stored, mask=m_u & m_b)
            # A sequence that has no step here keeps its gradients; one that was reset sends none further back.
            d_h = gl.where(m_b, gl.where(m_fresh, d_direct, 0.0), d_h)
            if CARRY == 1:
                d_carry = gl.where(m_b, gl.where(m_fresh, d_carry_before, 0.0), d_carry)
            if MOST > 1:
                d_hs.index(i).store(d_h)
                if CARRY == 1:
                    d_cs.index(i).store(d_carry)
            tape, before, above, m_b, m_fresh, rows, o_b = (
                next_tape, next_before, next_above, next_m_b, next_m_fresh, next_rows, o_next,
            )  # fmt: skip

    for i in range(0, count):
        if MOST > 1:
            d_h = d_hs.index(i).load(POINT)
            if CARRY == 1:
                d_carry = d_cs.index(i).load(POINT)
        o_b = (i_first + i) * BATCH + o_tile
        m_all = m_u & (o_b < N)
        o_state = (i_d * N + o_b).to(gl.int64) * H + o_u
        gl.store(p_d_h_0 + o_state, d_h.to(p_d_h_0.dtype.element_ty), mask=m_all)
        if CARRY == 1:
            gl.store(p_d_carry_0 + o_state, d_carry.to(p_d_carry_0.dtype.element_ty), mask=m_all)
