"""SIMD vectors for Numba: a value type of ``LANES`` floats, its arithmetic, its memory accesses and its nonlinearities.

LLVM's loop vectoriser gives up on a cell's pointwise part (too many arrays that might overlap) and never vectorises
``math.exp``. So the kernels say what they mean: they work on vectors as wide as the machine's registers, and LLVM only
chooses instructions.

A *like* argument is a scalar whose type, float32 or float64, decides that of the vector. Addresses are int64, in bytes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.extending import intrinsic, models, register_model
from numba.core.imputils import lower_builtin
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global

INT32, INT64 = ir.IntType(32), ir.IntType(64)

# Only contraction (fused multiply-add): the rest of fastmath would let LLVM assume that NaN and Inf never come.
CONTRACT = ("contract",)


def _register_bytes() -> int:
    """Width of the SIMD registers of the CPU that Numba compiles for."""
    if config.CPU_FEATURES is not None:
        features = {name[1:]: name[0] == "+" for name in config.CPU_FEATURES.split(",") if name}
    elif config.CPU_NAME in (None, "host"):
        features = dict(llvm.get_host_cpu_features())
    else:
        features = {}
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


REGISTER_BYTES = _register_bytes()
# AVX-512 and aarch64 have 32 registers, of which a product keeps 24 accumulators; AVX2 and SSE have 16.
ACCUMULATORS = 12 if REGISTER_BYTES == 32 or (REGISTER_BYTES == 16 and "x86" in llvm.get_process_triple()) else 24


class Vector(types.Type):  # type: ignore[misc]
    """Numba's type of a register full of floats."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        self.lanes = lanes_of(dtype)
        super().__init__(name=f"Vector({dtype} x {self.lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, llvm_vector(fe_type.dtype))


def lanes_of(dtype: types.Float) -> int:
    """How many floats of a Numba type fill a register."""
    return REGISTER_BYTES * 8 // int(dtype.bitwidth)


def llvm_vector(dtype: types.Float) -> ir.VectorType:
    """The LLVM type of ``Vector(dtype)``."""
    return ir.VectorType(ir.FloatType() if dtype.bitwidth == 32 else ir.DoubleType(), lanes_of(dtype))


def splat_of(vector_type: ir.VectorType, value: float) -> ir.Constant:
    """The constant vector that holds ``value`` in every lane."""
    return ir.Constant(vector_type, [ir.Constant(vector_type.element, value)] * vector_type.count)


def broadcast(builder: ir.IRBuilder, scalar: Any, vector_type: ir.VectorType) -> Any:
    """Emit a vector with ``scalar`` in every lane."""
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, INT32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT32, vector_type.count), [0] * vector_type.count))


def pointer(builder: ir.IRBuilder, address: Any, pointee: ir.Type) -> Any:
    """Emit the cast of an int64 address to a pointer."""
    return builder.inttoptr(address, pointee.as_pointer())


def _define_operator(operation: Callable[..., Any], method: str) -> None:
    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
            if not kws and len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return getattr(builder, method)(*args, flags=CONTRACT)

    infer_global(operation)(Template)
    lower_builtin(operation, Vector, Vector)(emit)


for _operation, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_operation, _method)


def _mask(builder: ir.IRBuilder, count: Any, lanes: int) -> Any:
    numbers = ir.Constant(ir.VectorType(INT64, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, broadcast(builder, count, ir.VectorType(INT64, lanes)))


def _masked(builder: ir.IRBuilder, action: str, vector_type: ir.VectorType, result: ir.Type, arguments: list[Any]) -> Any:
    suffix = f"v{vector_type.count}{'f32' if isinstance(vector_type.element, ir.FloatType) else 'f64'}"
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.masked.{action}.{suffix}.p0")
    return builder.call(function, arguments)


@intrinsic
def load(typingctx: Any, like: Any, address: Any, count: Any) -> Any:
    """Load a vector; with a count (not None) only that many lanes, the others are zero and their memory is not touched."""
    vector = Vector(like)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        vector_type = llvm_vector(like)
        source = pointer(builder, args[1], vector_type)
        align = like.bitwidth // 8
        if isinstance(count, types.NoneType):
            return builder.load(source, align=align)
        arguments = [source, INT32(align), _mask(builder, args[2], vector_type.count), splat_of(vector_type, 0.0)]
        return _masked(builder, "load", vector_type, vector_type, arguments)

    return vector(like, address, count), codegen


@intrinsic
def store(typingctx: Any, address: Any, value: Any, count: Any) -> Any:
    """Store a vector; with a count (not None) only that many lanes."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        vector_type = args[1].type
        target = pointer(builder, args[0], vector_type)
        align = value.dtype.bitwidth // 8
        if isinstance(count, types.NoneType):
            builder.store(args[1], target, align=align)
        else:
            arguments = [args[1], target, INT32(align), _mask(builder, args[2], vector_type.count)]
            _masked(builder, "store", vector_type, ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(address, value, count), codegen


@intrinsic
def store_total(typingctx: Any, address: Any, value: Any) -> Any:
    """Store the sum of a vector's lanes, one float."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        total, lanes = args[1], args[1].type.count
        while lanes > 1:
            lanes //= 2
            halves = [
                builder.shuffle_vector(
                    total, total, ir.Constant(ir.VectorType(INT32, lanes), list(range(start, start + lanes)))
                )
                for start in (0, lanes)
            ]
            total = builder.fadd(*halves)
        builder.store(builder.extract_element(total, INT32(0)), pointer(builder, args[0], args[1].type.element))
        return context.get_dummy_value()

    return types.void(address, value), codegen


@intrinsic
def gather(typingctx: Any, like: Any, address: Any, stride: Any, count: Any) -> Any:
    """Load the floats that lie ``stride`` bytes apart; with a count (not None) only that many, the other lanes are zero."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        vector_type = llvm_vector(like)
        zero = splat_of(vector_type, 0.0)
        result = zero
        for lane in range(vector_type.count):
            offset: Any = INT64(lane)
            if not isinstance(count, types.NoneType):
                # Past the count, lane 0 once more, so that every address is valid.
                offset = builder.select(builder.icmp_signed("<", offset, args[3]), offset, INT64(0))
            source = pointer(builder, builder.add(args[1], builder.mul(offset, args[2])), vector_type.element)
            result = builder.insert_element(result, builder.load(source), INT32(lane))
        if isinstance(count, types.NoneType):
            return result
        return builder.select(_mask(builder, args[3], vector_type.count), result, zero)

    return Vector(like)(like, address, stride, count), codegen


@intrinsic
def splat(typingctx: Any, scalar: Any) -> Any:
    """A vector with the float ``scalar`` in every lane."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return broadcast(builder, args[0], llvm_vector(scalar))

    return Vector(scalar)(scalar), codegen


@intrinsic
def ones(typingctx: Any, like: Any) -> Any:
    """A vector of ones."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return splat_of(llvm_vector(like), 1.0)

    return Vector(like)(like), codegen


def constant(value: float) -> Any:
    """The function like -> a vector with ``value`` in every lane."""

    @intrinsic
    def filled(typingctx: Any, like: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            return splat_of(llvm_vector(like), value)

        return Vector(like)(like), codegen

    return filled


@intrinsic
def vector_bytes(typingctx: Any, like: Any) -> Any:
    """Size of a vector."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return INT64(REGISTER_BYTES)

    return types.int64(like), codegen


@intrinsic
def where_positive(typingctx: Any, condition: Any, value: Any) -> Any:
    """``value`` where ``condition`` is above zero or NaN, else zero."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        zero = splat_of(args[0].type, 0.0)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[1])

    return condition(condition, value), codegen


def _clamp_above(builder: ir.IRBuilder, x: Any, bound: float) -> Any:
    limit = splat_of(x.type, bound)
    # An ordered comparison is false for NaN, which so passes.
    return builder.select(builder.fcmp_ordered(">", x, limit), limit, x)


def _exp_parts(builder: ir.IRBuilder, x: Any) -> tuple[Any, Any]:
    """Emit p and s with exp(x) = s·(1 + p), |x| small enough that s is a normal number.

    s = 2^n with n = round(x / ln 2); p = exp(r) - 1 for r = x - n·ln 2, |r| <= ln 2 / 2, by its Taylor series, whose first
    dropped term is below 6e-9 (float32, degree 7) and 5e-18 (float64, degree 13). ln 2 comes in two parts, the first with
    trailing zero bits so that n times it is exact (Cody & Waite 1980). NaN makes p NaN.
    """
    single = isinstance(x.type.element, ir.FloatType)
    mantissa, degree = (23, 7) if single else (52, 13)
    bits = 12 if single else 32
    ln2_high = math.floor(math.log(2.0) * 2.0**bits) / 2.0**bits
    # ln 2 = 0.693147180559945309417232121458; the difference to its double is 2.3190468138462996e-17.
    ln2_low = (math.log(2.0) - ln2_high) + 2.3190468138462996e-17

    def fused(a: Any, b: float, c: Any) -> Any:
        return builder.fadd(builder.fmul(a, splat_of(x.type, b), flags=CONTRACT), c, flags=CONTRACT)

    # Adding 1.5·2^mantissa rounds to an integer and leaves that integer in the lowest bits.
    shifter = splat_of(x.type, 1.5 * 2.0**mantissa)
    shifted = fused(x, 1.0 / math.log(2.0), shifter)
    n = builder.fsub(shifted, shifter)
    r = fused(n, -ln2_low, fused(n, -ln2_high, x))
    p = splat_of(x.type, 1.0 / math.factorial(degree))
    for k in range(degree - 1, 0, -1):
        p = builder.fadd(builder.fmul(p, r, flags=CONTRACT), splat_of(x.type, 1.0 / math.factorial(k)), flags=CONTRACT)
    p = builder.fmul(p, r)

    integers = ir.VectorType(INT32 if single else INT64, x.type.count)
    exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [mantissa] * x.type.count))
    one = builder.bitcast(splat_of(x.type, 1.0), integers)
    return p, builder.bitcast(builder.add(exponent, one), x.type)


def _largest(x: Any) -> float:
    """An exponent, short of overflow, whose exp is negligible beside 1 when inverted."""
    return 88.0 if isinstance(x.type.element, ir.FloatType) else 709.0


@intrinsic
def sigmoid(typingctx: Any, x: Any) -> Any:
    """1 / (1 + exp(-x)); 0 and 1 at the infinities, NaN at NaN."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        one = splat_of(args[0].type, 1.0)
        limit = _largest(args[0])
        negative = builder.fsub(splat_of(args[0].type, -0.0), args[0])
        low = splat_of(args[0].type, -limit)
        clamped = _clamp_above(builder, negative, limit)
        clamped = builder.select(builder.fcmp_ordered("<", clamped, low), low, clamped)
        p, scale = _exp_parts(builder, clamped)
        exponential = builder.fadd(builder.fmul(scale, p, flags=CONTRACT), scale, flags=CONTRACT)
        result = builder.fdiv(one, builder.fadd(one, exponential))
        # Past the clamp the true value is below the smallest normal number.
        return builder.select(
            builder.fcmp_ordered(">", negative, splat_of(args[0].type, limit)), splat_of(one.type, 0.0), result
        )

    return x(x), codegen


@intrinsic
def tanh(typingctx: Any, x: Any) -> Any:
    """-m / (2 + m) with m = exp(-2|x|) - 1, and the sign of x: exact to a few ulp near zero too; -1 and 1 at the infinities."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        kind = args[0].type
        bits = ir.VectorType(INT32 if isinstance(kind.element, ir.FloatType) else INT64, kind.count)
        given, sign = (builder.bitcast(vector, bits) for vector in (args[0], splat_of(kind, -0.0)))
        magnitude = builder.bitcast(builder.and_(given, builder.not_(sign)), kind)
        clamped = _clamp_above(builder, magnitude, _largest(args[0]) / 4.0)
        p, scale = _exp_parts(builder, builder.fmul(clamped, splat_of(kind, -2.0)))
        minus_one = builder.fsub(scale, splat_of(kind, 1.0))
        m = builder.fadd(builder.fmul(scale, p, flags=CONTRACT), minus_one, flags=CONTRACT)
        ratio = builder.fdiv(m, builder.fadd(m, splat_of(kind, 2.0)))
        # The ratio is not above zero, but for a zero, which has no sign yet.
        size = builder.and_(builder.bitcast(ratio, bits), builder.not_(sign))
        return builder.bitcast(builder.or_(size, builder.and_(given, sign)), kind)

    return x(x), codegen
