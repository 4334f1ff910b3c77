"""The stages of a step: a product, and the cell's pointwise part of its sums while they are in the nearest cache.

Every cell has the first one, whose product in the forward is with h. The second is that of the later gates (``Cell.later``),
between two meetings of the threads: its product reads all units of what the first one made. Addresses and strides are int64, in
bytes.
"""

from __future__ import annotations

from typing import Any

from fused_rnn.kernels.numba.arguments import Arg, compiled_as, compiled_helper, get, is_reset
from fused_rnn.kernels.numba.memory import read_int64
from fused_rnn.kernels.numba.product import PLAIN_VECTORS, PRODUCTS, max_rows, panel_vectors, product_of
from fused_rnn.kernels.numba.vector import load, splat, store, store_total

_A = Arg


@compiled_helper
def _dots(p: int, like: Any, weights: int, rows: int, number: int, gates: int, vectors: int, panel: int, sums: int) -> None:
    """The sums of one panel for a few rows, with weights as torch stores them: a dot product for each gate and unit.

    rows: address of the rows' addresses. number: how many. vectors: of units in a panel.
    """
    lanes, item, units, size = get(p, _A.LANES), get(p, _A.ITEM), get(p, _A.UNITS), get(p, _A.STATE_SIZE)
    stride, whole = size * item, size // lanes * lanes
    for i in range(number):
        a = read_int64(rows + 8 * i)
        for u in range(vectors):
            unit = (panel * vectors + u) * lanes
            count = min(lanes, units - unit)
            for gate in range(gates):
                target = sums + ((i * vectors + u) * gates + gate) * lanes * item
                first = weights + (gate * units + unit) * stride
                # Four at a time: that many sums hide most of the latency, and share their loads of h.
                for lane in range(0, count, 4):
                    w0 = first + lane * stride
                    w1 = first + min(lane + 1, count - 1) * stride
                    w2 = first + min(lane + 2, count - 1) * stride
                    w3 = first + min(lane + 3, count - 1) * stride
                    s0, s1, s2, s3 = splat(like), splat(like), splat(like), splat(like)
                    for k in range(0, whole * item, lanes * item):
                        x = load(like, a + k, None)
                        s0 = s0 + x * load(like, w0 + k, None)
                        s1 = s1 + x * load(like, w1 + k, None)
                        s2 = s2 + x * load(like, w2 + k, None)
                        s3 = s3 + x * load(like, w3 + k, None)
                    if whole < size:
                        k = whole * item
                        x = load(like, a + k, size - whole)
                        s0 = s0 + x * load(like, w0 + k, size - whole)
                        s1 = s1 + x * load(like, w1 + k, size - whole)
                        s2 = s2 + x * load(like, w2 + k, size - whole)
                        s3 = s3 + x * load(like, w3 + k, size - whole)
                    store_total(target + lane * item, s0)
                    if lane + 1 < count:
                        store_total(target + (lane + 1) * item, s1)
                    if lane + 2 < count:
                        store_total(target + (lane + 2) * item, s2)
                    if lane + 3 < count:
                        store_total(target + (lane + 3) * item, s3)


def forward_stage(name: str, cell_name: str, gates: int, cell: Any) -> Any:
    """Make a stage of the forward.

    Args:
        name: of the function.
        gates: how many gates the product has.
        cell: the pointwise part, as ``walk.forward`` takes it.
    """
    product, vectors = product_of(cell_name, gates), panel_vectors(gates)
    tile = max_rows(vectors * gates)

    @compiled_as(name)
    def stage(p: int, like: Any, tables: tuple[int, int, int, int], tape: tuple[int, int], rows: int, weights: int,
              stored: int, panels: tuple[int, int], bias: int, sums: int) -> None:  # fmt: skip
        """Take the units of some panels.

        tables: the addresses of the rows that the product reads, of h and c before, and of what is written. tape: of the first
        row, and from one to the next. stored: weights as torch stores them, in place of panels; or 0.
        """
        lanes, item, units, size = get(p, _A.LANES), get(p, _A.ITEM), get(p, _A.UNITS), get(p, _A.STATE_SIZE)
        vector, block = lanes * item, units * item
        tiles = (rows + tile - 1) // tile
        for panel in range(panels[0], panels[1]):
            for number in range(tiles):
                begin, end = rows * number // tiles, rows * (number + 1) // tiles
                if stored != 0:
                    _dots(p, like, stored, tables[0] + 8 * begin, end - begin, gates, vectors, panel, sums)
                else:
                    panel_bytes = size * vectors * gates * vector
                    product(like, tables[0] + 8 * begin, end - begin, weights + panel * panel_bytes, size, sums)
                for i in range(begin, end):
                    row, target = tape[0] + i * tape[1], read_int64(tables[3] + 8 * i)
                    h, c = read_int64(tables[1] + 8 * i), read_int64(tables[2] + 8 * i)
                    for u in range(vectors):
                        unit = (panel * vectors + u) * lanes
                        if unit >= units:
                            break
                        total = sums + ((i - begin) * vectors + u) * gates * vector
                        at = unit * item
                        if unit + lanes <= units:
                            cell(like, total, row + at, target + at, h + at, c + at, bias + at, block, None)
                        else:
                            cell(like, total, row + at, target + at, h + at, c + at, bias + at, block, units - unit)

    return stage


def later_backward_stage(name: str, gates: int, cell: Any) -> Any:
    """Make the backward's stage of so many later gates: the gradient of their operand, and what the cell makes of it.

    Args:
        name: of the function.
        cell: ``cell(like, d_operand, tape, h, d_gates, block, count) -> direct``, as ``walk.backward`` takes it.
    """
    product, vectors = PRODUCTS[PLAIN_VECTORS], PLAIN_VECTORS
    tile = max_rows(vectors)

    @compiled_as(name)
    def stage(p: int, like: Any, tables: tuple[int, int, int], tape: tuple[int, int], d_h: tuple[int, int], rows: int,
              first: tuple[int, int], weights: int, panels: tuple[int, int], sums: int) -> None:  # fmt: skip
        """Take the units of some panels.

        tables: the addresses of the later gates' gradients, of d_gates and of h before. tape, d_h: of the first row, and from
        one to the next. first: the number of the first row among all, and from one to the next.
        """
        lanes, item, units = get(p, _A.LANES), get(p, _A.ITEM), get(p, _A.UNITS)
        vector, block, depth = lanes * item, units * item, gates * units
        tiles = (rows + tile - 1) // tile
        for panel in range(panels[0], panels[1]):
            for number in range(tiles):
                begin, end = rows * number // tiles, rows * (number + 1) // tiles
                product(like, tables[0] + 8 * begin, end - begin, weights + panel * depth * vectors * vector, depth, sums)
                for i in range(begin, end):
                    row, carry = tape[0] + i * tape[1], d_h[0] + i * d_h[1]
                    d_gates, h = read_int64(tables[1] + 8 * i), read_int64(tables[2] + 8 * i)
                    reset = is_reset(p, first[0] + i * first[1])
                    for u in range(vectors):
                        unit = (panel * vectors + u) * lanes
                        if unit >= units:
                            break
                        total, at = load(like, sums + ((i - begin) * vectors + u) * vector, None), unit * item
                        if unit + lanes <= units:
                            direct = cell(like, total, row + at, h + at, d_gates + at, block, None)
                            if not reset:
                                store(carry + at, load(like, carry + at, None) + direct, None)
                        else:
                            direct = cell(like, total, row + at, h + at, d_gates + at, block, units - unit)
                            if not reset:
                                store(carry + at, load(like, carry + at, units - unit) + direct, units - unit)

    return stage
