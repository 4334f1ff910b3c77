"""The recurrent product's microkernel: a few rows times one packed panel of weights, accumulated in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from fused_rnn.kernels.numba.vector import ACCUMULATORS, CONTRACT, INT64, broadcast, llvm_vector, pointer, splat_of

# A multiply-add takes 4 cycles and two start in every one: so many must be under way.
_IN_FLIGHT = 8

# Steps of K that one chain of sums runs over. A chain over all of K would round some times worse at K = 4096.
_PASS = 256


def max_rows(columns: int) -> int:
    """How many rows a tile of ``columns`` vectors holds."""
    return min(8, ACCUMULATORS // columns)


def _emit_tile(builder: ir.IRBuilder, rows: int, columns: int, vector_type: ir.VectorType, args: tuple[Any, ...]) -> None:
    """Emit the tile for a fixed number of rows: passes over K, each a loop over k with every sum in a register of its own."""
    a_rows, weights, length, target = args
    scalar = vector_type.element
    table = pointer(builder, a_rows, INT64)
    a = [pointer(builder, builder.load(builder.gep(table, [INT64(row)])), scalar) for row in range(rows)]
    w = pointer(builder, weights, vector_type)
    zero = splat_of(vector_type, 0.0)
    # Few sums cannot hide the latency: then every k of a group has sums of its own, added up at the end.
    group = min(4, max(1, -(-_IN_FLIGHT // (rows * columns))))
    align = 4 if isinstance(scalar, ir.FloatType) else 8

    def step(k: Any, sums: list[Any]) -> list[Any]:
        base = builder.mul(k, INT64(columns))
        panel = [builder.load(builder.gep(w, [builder.add(base, INT64(c))]), align=align) for c in range(columns)]
        result = []
        for row in range(rows):
            factor = broadcast(builder, builder.load(builder.gep(a[row], [k])), vector_type)
            for c in range(columns):
                result.append(
                    builder.fadd(builder.fmul(factor, panel[c], flags=CONTRACT), sums[row * columns + c], flags=CONTRACT)
                )
        return result

    def loop(begin: Any, end: Any, stride: int, sums: list[list[Any]]) -> list[list[Any]]:
        before = builder.block
        head = builder.append_basic_block("head")
        body = builder.append_basic_block("body")
        after = builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(INT64)
        k.add_incoming(begin, before)
        phis = [[builder.phi(vector_type) for _ in part] for part in sums]
        for part, values in zip(phis, sums, strict=True):
            for phi, value in zip(part, values, strict=True):
                phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", k, end), body, after)
        builder.position_at_end(body)
        for offset, part in enumerate(phis):
            for phi, value in zip(part, step(builder.add(k, INT64(offset)), part), strict=True):
                phi.add_incoming(value, body)
        k.add_incoming(builder.add(k, INT64(stride)), body)
        builder.branch(head)
        builder.position_at_end(after)
        return phis

    out = pointer(builder, target, vector_type)
    entry, pass_, done = builder.block, builder.append_basic_block("pass"), builder.append_basic_block("passed")
    builder.branch(pass_)
    builder.position_at_end(pass_)
    begin = builder.phi(INT64)
    begin.add_incoming(INT64(0), entry)
    limit = builder.add(begin, INT64(_PASS))
    end = builder.select(builder.icmp_signed("<", limit, length), limit, length)
    whole = builder.add(begin, builder.mul(builder.sdiv(builder.sub(end, begin), INT64(group)), INT64(group)))
    sums = loop(begin, whole, group, [[zero] * (rows * columns) for _ in range(group)])
    total = sums[0]
    for part in sums[1:]:
        total = [builder.fadd(left, right) for left, right in zip(total, part, strict=True)]
    if group > 1:
        (total,) = loop(whole, end, 1, [total])
    first = builder.icmp_signed("==", begin, INT64(0))
    for index, value in enumerate(total):
        place = builder.gep(out, [INT64(index)])
        before = builder.select(first, zero, builder.load(place, align=align))
        builder.store(builder.fadd(before, value), place, align=align)
    begin.add_incoming(end, builder.block)
    builder.cbranch(builder.icmp_signed("<", end, length), pass_, done)
    builder.position_at_end(done)


def _make_product(columns: int) -> Any:
    @intrinsic
    def product(typingctx: Any, like: Any, a_rows: Any, rows: Any, weights: Any, length: Any, target: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            _, a_rows, rows, weights, length, target = args
            done = builder.append_basic_block("done")
            switch = builder.switch(rows, done)
            for count in range(1, max_rows(columns) + 1):
                case = builder.append_basic_block(f"rows{count}")
                switch.add_case(INT64(count), case)
                builder.position_at_end(case)
                _emit_tile(builder, count, columns, llvm_vector(like), (a_rows, weights, length, target))
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(like, a_rows, rows, weights, length, target), codegen

    return product


# product(like, a_rows, rows, weights, length, target): target (rows, columns, LANES) = A · panel.
# a_rows: address of ``rows`` addresses, each of a row of ``length`` floats; 1 <= rows <= max_rows(columns).
# weights: address of a panel, (length, columns, LANES).
PRODUCTS = {columns: _make_product(columns) for columns in (2, 3, 4)}

# Vectors of columns in a panel of a product that no cell follows, and of the backward's.
PLAIN_VECTORS = 2


def panel_vectors(gates: int) -> int:
    """Vectors of units in a panel of a forward product of so many gates; each has a vector for every gate."""
    return PLAIN_VECTORS if gates == 1 else 1


def product_of(name: str, gates: int) -> Any:
    """The microkernel of a forward product of so many gates of the cell ``name``.

    Raises:
        ValueError: if a panel would hold more vectors than a tile has registers for.
    """
    columns = panel_vectors(gates) * gates
    if columns not in PRODUCTS:
        raise ValueError(f"cell {name}: gates: expected at most {max(PRODUCTS)} for Numba's kernels, got {gates}")
    return PRODUCTS[columns]
