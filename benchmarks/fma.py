"""Peak rate of fused multiply-adds: a loop over registers alone, compiled by Numba for this CPU."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

# A few milliseconds: threads start within tens of microseconds of one another.
ITERATIONS = 1_000_000

# Enough independent chains for the latency of an FMA times the units of a core (4 to 5 cycles × 2), few enough that they and
# the two factors fit the 16 registers of AVX2.
CHAINS = 12


def _lanes(bits: int) -> int:
    import llvmlite.binding as llvm

    features = dict(llvm.get_host_cpu_features())
    register = 512 if features.get("avx512f") else 256 if features.get("avx2") or features.get("avx") else 128
    return register // bits


@functools.cache
def _kernel(bits: int) -> tuple[Callable[[int, float], float], int]:
    """A function ``(iterations, factor) -> a sum that needs all of them``, and the flops of an iteration.

    It runs without the interpreter lock.
    """
    import numba
    from llvmlite import ir
    from numba.core import types
    from numba.core.extending import intrinsic
    from numba.core.typing import signature

    lanes = _lanes(bits)
    element: Any = ir.FloatType() if bits == 32 else ir.DoubleType()
    vector = ir.VectorType(element, lanes)
    scalar = types.float32 if bits == 32 else types.float64

    @intrinsic  # type: ignore[untyped-decorator]
    def chains(context: Any, iterations: Any, factor: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            count, value = arguments
            name = f"llvm.fma.v{lanes}f{bits}"
            fma = builder.module.declare_intrinsic(name, (), ir.FunctionType(vector, [vector] * 3))
            spread = ir.Constant(vector, ir.Undefined)
            for i in range(lanes):
                spread = builder.insert_element(spread, value, ir.Constant(ir.IntType(32), i))
            before = builder.block
            body, after = builder.append_basic_block("fma"), builder.append_basic_block("end")
            builder.branch(body)
            builder.position_at_end(body)
            counter = builder.phi(ir.IntType(64))
            sums = [builder.phi(vector) for _ in range(CHAINS)]
            # x := x · factor + factor, factor < 1: stays finite and away from denormal numbers.
            nexts = [builder.call(fma, [x, spread, spread]) for x in sums]
            following = builder.add(counter, ir.Constant(ir.IntType(64), 1))
            counter.add_incoming(ir.Constant(ir.IntType(64), 0), before)
            counter.add_incoming(following, body)
            for i, (x, x_next) in enumerate(zip(sums, nexts, strict=True)):
                # Chains that began alike would be one chain to the compiler.
                x.add_incoming(ir.Constant(vector, [ir.Constant(element, float(i))] * lanes), before)
                x.add_incoming(x_next, body)
            builder.cbranch(builder.icmp_signed("<", following, count), body, after)
            builder.position_at_end(after)
            total = nexts[0]
            for x in nexts[1:]:
                total = builder.fadd(total, x)
            result = builder.extract_element(total, ir.Constant(ir.IntType(32), 0))
            for i in range(1, lanes):
                result = builder.fadd(result, builder.extract_element(total, ir.Constant(ir.IntType(32), i)))
            return result

        return signature(scalar, types.int64, scalar), generate

    @numba.njit(f"{scalar}(int64, {scalar})", nogil=True)  # type: ignore[untyped-decorator]
    def run(iterations: int, factor: float) -> Any:
        return chains(iterations, factor)

    return run, 2 * CHAINS * lanes


def fma_rate(threads: int, bits: int = 32, iterations: int = ITERATIONS) -> float:
    """Flop/s of ``threads`` threads that do nothing else, each vector as wide as the registers; compiled at the first call."""
    kernel, flops = _kernel(bits)
    ready = threading.Barrier(threads)
    times: list[tuple[float, float]] = []

    def work() -> None:
        kernel(iterations // 10, 0.5)
        ready.wait()
        begin = time.perf_counter()
        kernel(iterations, 0.5)
        times.append((begin, time.perf_counter()))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = max(end for _, end in times) - min(begin for begin, _ in times)
    return flops * iterations * threads / seconds
