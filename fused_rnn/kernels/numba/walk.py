"""The time loops, forward and backward, written once for every cell.

Each runs on all threads of a team for the whole sequence. The threads share the work by direction first, then by row (no
two rows ever meet, so no synchronisation) or by hidden unit (each keeps its part of the weights in its own cache; all wait
for each other once a step). The recurrent product of a small tile stays in registers, then in the nearest cache, where the
cell's pointwise part picks it up.

A row of a step is found by its number alone, so ragged batches, resets and initial states only change the table of
addresses that a product reads its rows from. Addresses and strides are int64, in bytes.
"""

from __future__ import annotations

from typing import Any

from fused_rnn.data.cell import Cell
from fused_rnn.kernels.numba.arguments import (
    Arg,
    before,
    compiled_as,
    compiled_helper,
    first_at,
    get,
    is_reset,
    last_step,
    previous,
    rows_at,
)
from fused_rnn.kernels.numba.memory import read_byte, read_int64, write_int64
from fused_rnn.kernels.numba.product import PLAIN_VECTORS, PRODUCTS, max_rows, panel_vectors
from fused_rnn.kernels.numba.share import arrive, meet, panels_of, part, share
from fused_rnn.kernels.numba.stage import forward_stage, later_backward_stage
from fused_rnn.kernels.numba.vector import load, splat, store

_A = Arg


@compiled_helper
def _copy(like: Any, source: int, target: int, length: int, lanes: int, item: int) -> None:
    for k in range(0, length, lanes):
        count = min(lanes, length - k)
        store(target + k * item, load(like, source + k * item, count), count)


@compiled_helper
def _store_sum(like: Any, target: int, sums: int, first: int, second: int, count: Any) -> None:
    store(target, load(like, sums, None) + load(like, first, count) + load(like, second, count), count)


def _make_multiply(name: str) -> Any:
    product = PRODUCTS[PLAIN_VECTORS]

    @compiled_as(f"{name}_multiply")
    def multiply(p: int, like: Any, tables: tuple[int, int, int, int], rows: int, weights: int, length: int,
                  width: int, panels: tuple[int, int], sums: int) -> None:  # fmt: skip
        """A product that no cell follows: target = A · weights + first + second.

        tables: the addresses of the rows of A, target, first and second. length: columns of A; 0 leaves the product out.
        width: columns of target. panels: those of this thread.
        """
        lanes, item, tile, vectors = get(p, _A.LANES), get(p, _A.ITEM), get(p, _A.PLAIN_ROWS), get(p, _A.PLAIN_VECTORS)
        vector = lanes * item
        tiles = (rows + tile - 1) // tile
        for panel in range(panels[0], panels[1]):
            for number in range(tiles):
                begin, end = rows * number // tiles, rows * (number + 1) // tiles
                if length == 0:
                    for k in range((end - begin) * vectors):
                        store(sums + k * vector, splat(like), None)
                else:
                    product(like, tables[0] + 8 * begin, end - begin, weights + panel * length * vectors * vector, length, sums)
                for i in range(begin, end):
                    for u in range(vectors):
                        column = (panel * vectors + u) * lanes
                        if column >= width:
                            break
                        block = column * item
                        total = sums + ((i - begin) * vectors + u) * vector
                        target, first = read_int64(tables[1] + 8 * i) + block, read_int64(tables[2] + 8 * i) + block
                        second = read_int64(tables[3] + 8 * i) + block
                        if column + lanes <= width:
                            _store_sum(like, target, total, first, second, None)
                        else:
                            _store_sum(like, target, total, first, second, width - column)

    return multiply


@compiled_helper
def no_stage(*_: Any) -> None:
    """In the place of a second stage, for a cell that has one alone."""


def forward(row: Cell, cell: Any, later: Any = None) -> Any:
    """Make the forward walk of a cell, ``walk(p, like, version)``, which every thread of a team calls.

    Args:
        row: which cell.
        p: address of the arguments, an int64 for each member of ``Arg``.
        like: zero, float32 or float64: the type of all buffers.
        cell: the pointwise part, ``cell(like, sums, tape, out, h, c, bias, block, count)``. sums: address of G vectors,
            the recurrent product. block: bytes from one block of the tape to the next. count: lanes to use, None for all.
        later: for a cell with later gates, the pointwise part of the second stage, called in the same way: sums are of these
            gates alone. ``cell`` then has those of the others, and writes the operand to the tape.
        version: not used; as a constant of the caller it makes Numba's cache forget kernels of other versions.
    """
    name = f"{row.name}_forward_walk"
    multiply = _make_multiply(name)
    first_gates, later_gates = len(row.first), len(row.later)
    first_stage = forward_stage(f"{name}_stage", row.name, first_gates, cell)
    two_stages = later_gates > 0
    second_stage = forward_stage(f"{name}_second", row.name, later_gates, later) if two_stages else no_stage
    vectors, later_vectors = panel_vectors(first_gates), panel_vectors(later_gates)
    operand_block = 0 if row.operand is None else row.tape.index(row.operand)

    @compiled_as(name)
    def walk(p: int, like: Any, version: int) -> None:
        lanes, item, units, size = get(p, _A.LANES), get(p, _A.ITEM), get(p, _A.UNITS), get(p, _A.STATE_SIZE)
        length, batch, block = get(p, _A.LENGTH), get(p, _A.BATCH), units * item
        projected = get(p, _A.PROJECTION) != 0
        thread, threads = arrive(p)
        all_panels = panels_of(units, lanes, vectors)
        d_share, d_shares, row_share, row_shares, unit_share, unit_shares = share(p, thread, threads, all_panels)
        panels = part(all_panels, unit_share, unit_shares)
        h_panels = part(panels_of(size, lanes, get(p, _A.PLAIN_VECTORS)), unit_share, unit_shares)
        group, meeting = d_share * row_shares + row_share, 0
        sums = get(p, _A.SCRATCH) + thread * get(p, _A.SCRATCH_THREAD)
        table = sums + get(p, _A.SCRATCH_ROWS)
        hs, cs, hiddens, outs, zeros = table, table + 8 * batch, table + 16 * batch, table + 24 * batch, table + 32 * batch
        state_h, state_c = get(p, _A.STATE_H), get(p, _A.STATE_C)
        later_panels = part(panels_of(units, lanes, later_vectors), unit_share, unit_shares)

        for d in range(d_share, get(p, _A.DIRECTIONS), d_shares):
            reverse = read_byte(get(p, _A.REVERSE) + d) != 0
            weights = get(p, _A.WEIGHTS) + d * get(p, _A.WEIGHTS_DIRECTION)
            stored = 0 if get(p, _A.STORED) == 0 else read_int64(get(p, _A.STORED) + 8 * d)
            bias = get(p, _A.BIAS) + d * get(p, _A.BIAS_DIRECTION)
            tape_d, tape_row = get(p, _A.TAPE) + d * get(p, _A.TAPE_DIRECTION), get(p, _A.TAPE_ROW)
            out_d, out_row = get(p, _A.OUT) + d * get(p, _A.OUT_DIRECTION), get(p, _A.OUT_ROW)
            for s in range(length):
                t = length - 1 - s if reverse else s
                first = first_at(p, t)
                earlier = before(p, reverse, t)
                rows = max(0, (rows_at(p, t) - row_share + row_shares - 1) // row_shares)
                for i in range(rows):
                    row = row_share + i * row_shares
                    previous(p, d, t, row, earlier, (state_h, state_c), hs + 8 * i, cs + 8 * i)
                    write_int64(outs + 8 * i, out_d + (first + row) * out_row)
                    if two_stages:
                        write_int64(hiddens + 8 * i, tape_d + (first + row) * tape_row + operand_block * block)
                    else:
                        write_int64(hiddens + 8 * i, get(p, _A.HIDDEN) + (d * batch + row) * block)
                    write_int64(zeros + 8 * i, get(p, _A.ZEROS))
                tape = (tape_d + (first + row_share) * tape_row, row_shares * tape_row)
                targets = hiddens if projected else outs
                first_stage(p, like, (hs, hs, cs, targets), tape, rows, weights, stored, panels, bias, sums)
                meeting += 1
                meet(p, group, meeting, unit_shares)
                if two_stages:
                    w = get(p, _A.LATER) + d * get(p, _A.LATER_DIRECTION)
                    later_stored = 0 if stored == 0 else stored + first_gates * units * size * item
                    second_stage(p, like, (hiddens, hs, cs, outs), tape, rows, w, later_stored, later_panels, bias, sums)
                    meeting += 1
                    meet(p, group, meeting, unit_shares)
                if projected:
                    w = get(p, _A.PROJECTION) + d * get(p, _A.PROJECTION_DIRECTION)
                    multiply(p, like, (hiddens, outs, zeros, zeros), rows, w, units, size, h_panels, sums)
                    meeting += 1
                    meet(p, group, meeting, unit_shares)
            if unit_share == 0:
                # Only now: until here other threads may have read the states before the walk.
                for row in range(row_share, rows_at(p, 0), row_shares):
                    index = first_at(p, last_step(p, reverse, row, 0, length)) + row
                    number = d * batch + row
                    _copy(like, out_d + index * out_row, state_h + number * size * item, size, lanes, item)
                    if state_c != 0:
                        c = tape_d + index * tape_row + get(p, _A.CELL_STATE)
                        _copy(like, c, state_c + number * block, units, lanes, item)

    return walk


def backward(row: Cell, cell: Any, later: Any = None) -> Any:
    """Make the backward walk of a cell, ``walk(p, like, version)``, which every thread of a team calls.

    Args:
        row: which cell.
        p: address of the arguments, an int64 for each member of ``Arg``.
        like: zero, float32 or float64: the type of all buffers.
        cell: the pointwise part, ``cell(like, d_h, d_c, d_cell, tape, out, h, c, d_gates, reset, block, count) -> direct``.
            d_h: vector, the gradient of h. d_c: address, in place, zero after a reset. d_cell: address, what c of this step
            receives as an output. direct: vector, the part of the gradient of the h before that the recurrent product does
            not bring.
        later: for a cell with later gates, the pointwise part of the second stage,
            ``later(like, d_operand, tape, h, d_gates, block, count) -> direct``. d_operand: vector, the gradient of the
            operand. direct: vector, what the h before receives of it beside the product.
        version: not used; as a constant of the caller it makes Numba's cache forget kernels of other versions.
    """
    name = f"{row.name}_backward_walk"
    product, multiply = PRODUCTS[PLAIN_VECTORS], _make_multiply(name)
    first_gates, two_stages = len(row.first), len(row.later) > 0
    second_stage = later_backward_stage(f"{name}_second", len(row.later), later) if two_stages else no_stage
    vectors, tile = PLAIN_VECTORS, max_rows(PLAIN_VECTORS)

    @compiled_as(f"{name}_step")
    def step(like: Any, has_product: bool, projected: bool, reset: bool, sums: int, d_out: int, state_h: int, d_c: int,
              d_cell: int, tape: int, out: int, h: int, c: int, d_gates: int, block: int, count: Any) -> None:  # fmt: skip
        """Backward of one vector of one row."""
        d_h = load(like, d_out, count) + load(like, state_h, count)
        if has_product:
            d_h = d_h + load(like, sums, None)
        direct = cell(like, d_h, d_c, d_cell, tape, out, h, c, d_gates, reset, block, count)
        if not projected:
            store(state_h, splat(like) if reset else direct, count)

    @compiled_as(name)
    def walk(p: int, like: Any, version: int) -> None:
        lanes, item, units, size = get(p, _A.LANES), get(p, _A.ITEM), get(p, _A.UNITS), get(p, _A.STATE_SIZE)
        batch, vector, block = get(p, _A.BATCH), lanes * item, units * item
        t_begin, t_end = get(p, _A.BEGIN), get(p, _A.END)
        projected = get(p, _A.PROJECTION) != 0
        thread, threads = arrive(p)
        all_panels = panels_of(units, lanes, vectors)
        d_share, d_shares, row_share, row_shares, unit_share, unit_shares = share(p, thread, threads, all_panels)
        panels = part(all_panels, unit_share, unit_shares)
        h_panels = part(panels_of(size, lanes, get(p, _A.PLAIN_VECTORS)), unit_share, unit_shares)
        group, meeting = d_share * row_shares + row_share, 0
        sums = get(p, _A.SCRATCH) + thread * get(p, _A.SCRATCH_THREAD)
        table = sums + get(p, _A.SCRATCH_ROWS)
        hs, cs, sources, d_outs, d_hs, d_rows = (
            table, table + 8 * batch, table + 16 * batch, table + 24 * batch, table + 32 * batch, table + 40 * batch,
        )  # fmt: skip
        states = (get(p, _A.FIRST_H), get(p, _A.FIRST_C))
        zeros, base = get(p, _A.ZEROS), first_at(p, t_begin)
        depth = first_gates * units

        for d in range(d_share, get(p, _A.DIRECTIONS), d_shares):
            reverse = read_byte(get(p, _A.REVERSE) + d) != 0
            weights = get(p, _A.WEIGHTS) + d * get(p, _A.WEIGHTS_DIRECTION)
            projection = get(p, _A.PROJECTION) + d * get(p, _A.PROJECTION_DIRECTION)
            tape_d, tape_row = get(p, _A.TAPE) + d * get(p, _A.TAPE_DIRECTION), get(p, _A.TAPE_ROW)
            out_d, out_row = get(p, _A.OUT) + d * get(p, _A.OUT_DIRECTION), get(p, _A.OUT_ROW)
            d_out_d, d_out_row = get(p, _A.D_OUT) + d * get(p, _A.D_OUT_DIRECTION), get(p, _A.D_OUT_ROW)
            d_cells_d, d_cells_row = get(p, _A.D_CELLS) + d * get(p, _A.D_CELLS_DIRECTION), get(p, _A.D_CELLS_ROW)
            d_gates_d, d_gates_row = get(p, _A.D_GATES) + d * get(p, _A.D_GATES_DIRECTION), get(p, _A.D_GATES_ROW)
            state_h, state_c = get(p, _A.STATE_H) + d * batch * size * item, get(p, _A.STATE_C) + d * batch * block
            for s in range(t_end - t_begin):
                t = t_begin + s if reverse else t_end - 1 - s
                first = first_at(p, t)
                earlier = before(p, reverse, t)
                after = t - 1 if reverse else t + 1
                after_rows = rows_at(p, after) if s > 0 else 0
                rows = max(0, (rows_at(p, t) - row_share + row_shares - 1) // row_shares)
                for i in range(rows):
                    row = row_share + i * row_shares
                    previous(p, d, t, row, earlier, states, hs + 8 * i, cs + 8 * i)
                    d_gates = d_gates_d + (first - base + row) * d_gates_row
                    source, d_h = zeros, zeros
                    if row >= after_rows:
                        d_h = state_h + row * size * item
                    elif not is_reset(p, first_at(p, after) + row):
                        source = d_gates_d + (first_at(p, after) - base + row) * d_gates_row
                    if not projected:
                        # Holds the direct part even where the product adds to it.
                        d_h = state_h + row * size * item
                    write_int64(sources + 8 * i, source)
                    write_int64(d_outs + 8 * i, d_out_d + (first + row) * d_out_row)
                    write_int64(d_hs + 8 * i, d_h)
                    write_int64(d_rows + 8 * i, d_gates + get(p, _A.D_PROJECTED) if projected else d_gates)
                length = depth if s > 0 else 0
                if projected:
                    multiply(p, like, (sources, d_rows, d_outs, d_hs), rows, weights, length, size, h_panels, sums)
                    meeting += 1
                    meet(p, group, meeting, unit_shares)
                    length = size
                a, w = (d_rows, projection) if projected else (sources, weights)
                tiles = (rows + tile - 1) // tile
                for panel in range(panels[0], panels[1]):
                    for number in range(tiles):
                        begin, end = rows * number // tiles, rows * (number + 1) // tiles
                        if length > 0:
                            product(like, a + 8 * begin, end - begin, w + panel * length * vectors * vector, length, sums)
                        for i in range(begin, end):
                            row = row_share + i * row_shares
                            tape, out = tape_d + (first + row) * tape_row, out_d + (first + row) * out_row
                            d_gates = d_gates_d + (first - base + row) * d_gates_row
                            reset = is_reset(p, first + row)
                            h, c = read_int64(hs + 8 * i), read_int64(cs + 8 * i)
                            d_out, d_h, d_c = d_outs + 8 * i, state_h + row * size * item, state_c + row * block
                            d_cell = d_cells_d + (first + row) * d_cells_row
                            for u in range(vectors):
                                unit = (panel * vectors + u) * lanes
                                if unit >= units:
                                    break
                                at = unit * item
                                total = sums + ((i - begin) * vectors + u) * vector
                                if projected:
                                    d_o, d_s = zeros, zeros
                                else:
                                    d_o, d_s = read_int64(d_out) + at, d_h + at
                                if unit + lanes <= units:
                                    step(like, length > 0, projected, reset, total, d_o, d_s, d_c + at, d_cell + at,
                                          tape + at, out + at, h + at, c + at, d_gates + at, block, None)  # fmt: skip
                                else:
                                    step(like, length > 0, projected, reset, total, d_o, d_s, d_c + at, d_cell + at,
                                          tape + at, out + at, h + at, c + at, d_gates + at, block, units - unit)  # fmt: skip
                if two_stages:
                    meeting += 1
                    meet(p, group, meeting, unit_shares)
                    for i in range(rows):
                        write_int64(sources + 8 * i, read_int64(d_rows + 8 * i) + depth * item)
                    w = get(p, _A.LATER) + d * get(p, _A.LATER_DIRECTION)
                    row = first + row_share
                    tapes = (tape_d + row * tape_row, row_shares * tape_row)
                    carries = (state_h + row_share * block, row_shares * block)
                    second_stage(p, like, (sources, d_rows, hs), tapes, carries, rows, (row, row_shares), w, panels, sums)
                meeting += 1
                meet(p, group, meeting, unit_shares)

            rows = max(0, (rows_at(p, t_begin) - row_share + row_shares - 1) // row_shares)
            for i in range(rows):
                row = row_share + i * row_shares
                # The step that this walk came to last is the forward's first.
                first = first_at(p, last_step(p, not reverse, row, t_begin, t_end))
                source = zeros if is_reset(p, first + row) else d_gates_d + (first - base + row) * d_gates_row
                write_int64(sources + 8 * i, source)
                write_int64(d_rows + 8 * i, state_h + row * size * item)
                write_int64(d_hs + 8 * i, zeros if projected else state_h + row * size * item)
                write_int64(d_outs + 8 * i, zeros)
            multiply(p, like, (sources, d_rows, d_outs, d_hs), rows, weights, depth, size, h_panels, sums)

    return walk
