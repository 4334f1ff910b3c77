"""Integers in memory, atomics and calls through an address, for Numba."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.extending import intrinsic

from fused_rnn.kernels.numba.vector import INT32, INT64, pointer

_X86 = llvm.get_process_triple().startswith(("x86_64", "i686", "i386"))


def _reader(pointee: ir.IntType, ordering: str | None) -> Any:
    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            source = pointer(builder, args[0], pointee)
            value = builder.load(source) if ordering is None else builder.load_atomic(source, ordering, 8)
            return value if pointee is INT64 else builder.zext(value, INT64)

        return types.int64(types.int64), codegen

    return read


# read(address) -> int64
read_int64 = _reader(INT64, None)
read_byte = _reader(ir.IntType(8), None)
read_acquire = _reader(INT64, "acquire")


@intrinsic
def write_int64(typingctx: Any, address: Any, value: Any) -> Any:
    """Store an int64."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        builder.store(args[1], pointer(builder, args[0], INT64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to an int64 that several threads share; returns what it was."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], INT64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the CPU that this thread spins."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        if _X86:
            function_type = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_int(typingctx: Any, address: Any) -> Any:
    """Call the C function ``int f(void)`` at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        function = pointer(builder, args[0], ir.FunctionType(INT32, []))
        return builder.sext(builder.call(function, []), INT64)

    return types.int64(types.int64), codegen


@njit(error_model="numpy")
def wait_for(counter: int, value: int, give_way: int) -> None:
    """Wait until the counter at an address reaches ``value``.

    Spins first, then lets others run (``give_way``: address of ``sched_yield``, or 0): with more threads than cores, the
    one that is waited for may need this core.
    """
    spins = 0
    while read_acquire(counter) < value:
        spins += 1
        if spins > 4000 and give_way != 0:
            call_int(give_way)
        else:
            pause()
