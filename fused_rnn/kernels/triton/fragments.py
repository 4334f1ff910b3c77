"""The recurrent product in registers, and how programs exchange what it reads: what both walks share.

The products are those of ``mma.sync``, a warp's matrix instruction on every chip since sm_80. Its left operand, the weights,
stays in registers for the whole walk. Gates are computed with the operands swapped, gatesᵀ = W · hᵀ, so that the weights fill
the 16 rows of an instruction however few sequences there are.

Two forms, chosen by ``ALONE``:

- Shared: many programs own ``UNITS`` units each. What a step needs comes from all of them, through memory that the second-level
  cache holds (``p_ring``), straight into the registers of the right operand: a thread's eight consecutive k are one load of 16
  bytes, and since both operands permute k in the same way (``k_width`` 8), nothing has to be rearranged. The warps share K:
  each waits for the programs that make its slice alone, and their partial sums meet in shared memory.
- Alone: one program owns all units, and shared memory holds what a step needs. A warp owns all gates of its units, so a step's
  sums are where its pointwise part wants them.

float32 is cut into ``PLANES`` of bfloat16, the first with the leading 8 bits, the next with the 8 bits after those, and so on.
Two planes and the three products of the largest parts are a hundred times more exact than TF32; three planes and six products
are as exact as float32. Numbers of 16 bits are one plane.

A *part* is 32 of K: of one gate, with its 32 units, in the backward.
"""

from __future__ import annotations

import triton.language as tl

from fused_rnn.kernels.triton import plan
from fused_rnn.kernels.triton.language import barrier, constant, gl, jit, mma, narrow, wait_each

PART = constant(plan.PART)
PILE = constant(plan.PILE)


@jit
def in_planes(x, PLANES: tl.constexpr, DTYPE: tl.constexpr):
    """Cut x into planes of DTYPE, whose sum it is."""
    planes = (narrow(x, DTYPE),)
    if PLANES > 1:
        rest = x.to(gl.float32)
        for _ in gl.static_range(1, PLANES):
            last = planes[len(planes) - 1].to(gl.float32)
            # What is left of an infinite number would be NaN.
            rest = gl.where(gl.abs(last) == float("inf"), 0.0, rest - last)
            planes = planes + (narrow(rest, DTYPE),)
    return planes


@jit
def allocate(COUNT: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr):
    """Pieces of shared memory, one by one: between writes to parts of a whole, Triton 3.6 would put barriers."""
    pieces = ()
    for _ in gl.static_range(COUNT):
        pieces = pieces + (gl.allocate_shared_memory(DTYPE, [ROWS, COLUMNS], LAYOUT),)
    return pieces


@jit
def allocate_nothing(WARPS: tl.constexpr, MMA: tl.constexpr, LAYOUT: tl.constexpr):
    """A zero for each warp, in shared memory."""
    nothing = gl.allocate_shared_memory(gl.float32, [WARPS], LAYOUT)
    nothing.store(gl.full((WARPS,), 0.0, gl.float32, layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA))))
    return nothing


@jit
def hold(weights, tail, tile, place: tl.constexpr, TILES: tl.constexpr, PLANES: tl.constexpr, HELD: tl.constexpr,
         DTYPE: tl.constexpr):  # fmt: skip
    """Put away tile ``place`` of TILES.

    Of all planes of all tiles, the first HELD go to registers (the leading planes before the others), the rest to ``tail``,
    which is shared memory.
    """
    ALL: tl.constexpr = HELD // TILES
    MORE: tl.constexpr = HELD % TILES
    planes = in_planes(tile, PLANES, DTYPE)
    for plane in gl.static_range(PLANES):
        if plane < ALL + (place < MORE):
            weights = weights + (planes[plane],)
        else:
            tail.index(place * (PLANES - ALL) - min(place + 1, MORE) + plane - ALL).store(planes[plane])
    return weights


@jit
def held(weights, tail, place: tl.constexpr, plane: tl.constexpr, TILES: tl.constexpr, PLANES: tl.constexpr,
         HELD: tl.constexpr, LEFT: tl.constexpr):  # fmt: skip
    """A plane of a tile that ``hold`` has put away."""
    ALL: tl.constexpr = HELD // TILES
    MORE: tl.constexpr = HELD % TILES
    if plane < ALL + (place < MORE):
        found = weights[place * ALL + min(place, MORE) + plane]
    else:
        found = tail.index(place * (PLANES - ALL) - min(place + 1, MORE) + plane - ALL).load(LEFT)
    return found


@jit
def multiply(weights, tail, place: tl.constexpr, planes, first: tl.constexpr, total, TILES: tl.constexpr,
             PLANES: tl.constexpr, HELD: tl.constexpr, LEFT: tl.constexpr):  # fmt: skip
    """Total + tile · what planes[first], planes[first + 1], … sum to; the smallest products first."""
    for step in gl.static_range(PLANES):
        for plane in gl.static_range(PLANES - step):
            left = held(weights, tail, place, plane, TILES, PLANES, HELD, LEFT)
            total = mma(left, planes[first + PLANES - 1 - step - plane], total)
    return total


@jit
def _summed(sums, row: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr, POINT: tl.constexpr):
    """The sum over the warps of UNITS rows of the product, from ``row`` on."""
    FIRST: tl.constexpr = row % PILE
    pile = sums[row // PILE]
    total = pile.slice(FIRST, UNITS, 0).load(POINT)
    for warp in gl.static_range(1, WARPS):
        total += pile.slice(FIRST + warp * PILE, UNITS, 0).load(POINT)
    return total


@jit
def shared_product(
    weights, tail, p_rows, plane_stride, sums, nothing, PILES: tl.constexpr, PARTS: tl.constexpr, CHAINS: tl.constexpr,
    AHEAD: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr, BATCH: tl.constexpr, WARPS: tl.constexpr,
    PLANES: tl.constexpr, HELD: tl.constexpr, MMA: tl.constexpr, LEFT: tl.constexpr, POINT: tl.constexpr,
):  # fmt: skip
    """The shared form's product: a tile of (UNITS, BATCH) for each of BLOCKS.

    Args:
        p_rows: pointers to the first part of each warp, (WARPS, PART, BATCH), and plane_stride from plane to plane.
        sums: shared memory, (WARPS·PILE, BATCH) for each pile. nothing: a zero for each warp there.
        PILES: instructions' rows that a part has, PILE each. CHAINS: sums that are kept of each, so that a product need not
            wait for the one before. AHEAD: parts under way at once.
    """
    zero = gl.full((WARPS, PILE, BATCH), 0.0, gl.float32, layout=MMA)
    totals = ()
    for first in gl.static_range(0, PARTS, AHEAD):
        rows = ()
        for part in gl.static_range(first, min(first + AHEAD, PARTS)):
            for plane in gl.static_range(PLANES):
                rows = rows + (gl.load(p_rows + (plane * plane_stride + part * PART), cache_modifier=".cg"),)
        if first == 0:
            if PARTS * PLANES * BATCH > 32:
                # The compiler would put each load beside its product, and every one would be waited for. So the sums begin with
                # a zero that is read behind a barrier, which no load may pass.
                barrier()
                read = nothing.load(gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
                zero = gl.broadcast(read, zero)[0]
            for _ in gl.static_range(PILES * CHAINS):
                totals = totals + (zero,)
        for part in gl.static_range(first, min(first + AHEAD, PARTS)):
            added = ()
            for i in gl.static_range(PILES * CHAINS):
                total = totals[i]
                if i % CHAINS == part % CHAINS:
                    total = multiply(weights, tail, (i // CHAINS) * PARTS + part, rows, (part - first) * PLANES, total,
                                     PILES * PARTS, PLANES, HELD, LEFT)  # fmt: skip
                added = added + (total,)
            totals = added
    for pile in gl.static_range(PILES):
        total = totals[pile * CHAINS]
        for chain in gl.static_range(1, CHAINS):
            total += totals[pile * CHAINS + chain]
        sums[pile].store(total.reshape((WARPS * PILE, BATCH)))
    barrier()
    products = ()
    for block in gl.static_range(BLOCKS):
        products = products + (_summed(sums, block * UNITS, UNITS, WARPS, POINT),)
    return products


@jit
def in_units(rows, UNITS: tl.constexpr, COLUMNS: tl.constexpr):
    """(UNITS, COLUMNS) in the order of rows → in that of units, in the alone form.

    Of each 16 units, the even ones are the first eight rows, the odd ones the others.
    """
    return rows.reshape((UNITS // PILE, 2, PILE // 2, COLUMNS)).permute((0, 2, 1, 3)).reshape((UNITS, COLUMNS))


@jit
def in_rows(units, UNITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The reverse of ``in_units``."""
    return units.reshape((UNITS // PILE, PILE // 2, 2, COLUMNS)).permute((0, 2, 1, 3)).reshape((UNITS, COLUMNS))


@jit
def alone_product(
    weights, tail, rows, GATES: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr, BATCH: tl.constexpr,
    PLANES: tl.constexpr, HELD: tl.constexpr, MMA: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, POINT: tl.constexpr,
):  # fmt: skip
    """The product of a program that is alone: a tile of (UNITS, BATCH) for each gate.

    rows: shared memory, plane by plane, in BLOCKS: one that all gates multiply, or one for each of them.
    """
    products = ()
    planes = ()
    for gate in gl.static_range(GATES):
        if gate < BLOCKS:
            # When they are needed: the planes of all blocks would take too many registers.
            planes = ()
            for plane in gl.static_range(PLANES):
                planes = planes + (rows[gate * PLANES + plane].load(RIGHT),)
        total = gl.full((UNITS, BATCH), 0.0, gl.float32, layout=MMA)
        total = multiply(weights, tail, gate, planes, 0, total, GATES, PLANES, HELD, LEFT)
        products = products + (gl.convert_layout(in_units(total, UNITS, BATCH), POINT),)
    return products


@jit
def expected(i_warp, slices, GATES: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr):
    """How many programs make what a warp's slice of K holds: of its PARTS parts, GATES belong to the same 32 units."""
    first = i_warp * PARTS // GATES
    last = ((i_warp + 1) * PARTS - 1) // GATES + 1
    return gl.minimum(last * (PART // UNITS), slices) - gl.minimum(first * (PART // UNITS), slices)


@jit
def arrive(p_counter, i_u, GATES: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr):
    """Publish what this program has written, to every slice of K in which it lies. p_counter: that of the first slice."""
    barrier()
    block = i_u * UNITS // PART
    for gate in gl.static_range(GATES):
        part = block * GATES + gate
        if gate == 0 or part % PARTS == 0:
            gl.atomic_add(p_counter + part // PARTS, 1, sem="release", scope="gpu")


@jit
def wait(p_counter, needed, i_warp):
    """Wait, each warp for its own slice of K; what its programs have written is visible afterwards."""
    wait_each(p_counter + i_warp, needed)
