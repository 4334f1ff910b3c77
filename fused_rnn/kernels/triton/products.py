"""The products around a walk: in float32 by cuBLAS in TF32, where the switch that cuDNN's RNNs follow allows it.

torch.mm follows another switch, ``torch.backends.cuda.matmul``, which is of the whole process: to set it for a call would
change what other threads compute. cuBLAS itself is told for each product.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.kernels.triton.launch import allows_tf32
from fused_rnn.kernels.weight_gradients import multiply as plain_multiply
from fused_rnn.kernels.weight_gradients import weight_gradient as plain_weight_gradient

# cublas_api.h: cublasOperation_t, cudaDataType_t (library_types.h), cublasComputeType_t, cublasGemmAlgo_t.
_NO_TRANSPOSE, _TRANSPOSE = 0, 1
_FLOAT32, _FAST_TF32, _EXACT, _ANY_ALGORITHM = 0, 77, 69, -1
# Elements of a weight up to which cuDNN's RNNs stay exact themselves: those that one of its programs holds (H = 64 does, on an
# H100 with cuDNN 9.19; H = 256 does not). To round there would make us less exact than what we replace.
_MOST_EXACT = 128 * 512


@functools.cache
def _cublas() -> Any:
    """CublasGemmEx of the library that torch has loaded, or None where it is not found: torch then multiplies."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/libcublas.so" in line}
        if len(paths) != 1:
            # Of two, only one made the handle.
            return None
        function = ctypes.CDLL(paths.pop()).cublasGemmEx
    except (OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [
        pointer, number, number, number, number, number, pointer, pointer, number, number, pointer, number, number, pointer,
        pointer, number, number, number, number,
    ]  # fmt: skip
    function.restype = number
    return function


def _takes(tensor: Tensor) -> bool:
    """Whether cuBLAS can read a matrix as it lies: one of its strides is one, the other no less than a row."""
    first, second = tensor.stride()
    rows, columns = tensor.shape
    return (second == 1 and first >= max(1, columns)) or (first == 1 and second >= max(1, rows))


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """Write left · right to ``out``, or add it; float32 in TF32 where that is allowed, and nowhere else."""
    if left.dtype == torch.float32 and left.is_cuda:
        compute = _computed_in(left, right)
        if compute is not None and _by_cublas(left, right, out, add, compute):
            return
    plain_multiply(left, right, out, add)


def _computed_in(left: Tensor, right: Tensor) -> int | None:
    """What cuBLAS is told of a float32 product, or None where torch's own does the same."""
    # Two of the three sizes are those of the weight, the third, as a rule the largest, is the number of rows.
    if allows_tf32() and math.prod(sorted((*left.shape, right.shape[1]))[:2]) > _MOST_EXACT:
        return _FAST_TF32
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    rounds = matmul.allow_tf32 if precision is None else precision == "tf32"
    return _EXACT if rounds else None


def _by_cublas(left: Tensor, right: Tensor, out: Tensor, add: bool, compute: int) -> bool:
    """The product by cuBLAS, or False where it can't: nothing has been done then."""
    gemm = _cublas()
    if gemm is None or out.stride(1) != 1 or not (_takes(left) and _takes(right)) or 0 in (*left.shape, *right.shape):
        return False
    (m, k), n = left.shape, right.shape[1]
    # cuBLAS has columns where torch has rows: outᵀ = rightᵀ · leftᵀ.
    ops, strides = [], []
    for factor in (right, left):
        by_rows = factor.stride(1) == 1 and factor.stride(0) >= max(1, factor.shape[1])
        ops.append(_NO_TRANSPOSE if by_rows else _TRANSPOSE)
        strides.append(factor.stride(0) if by_rows else factor.stride(1))
    with torch.cuda.device(left.device):
        handle = torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        one, beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if add else 0.0)
        status = gemm(
            handle, ops[0], ops[1], n, m, k, ctypes.addressof(one), right.data_ptr(), _FLOAT32, strides[0], left.data_ptr(),
            _FLOAT32, strides[1], ctypes.addressof(beta), out.data_ptr(), _FLOAT32, out.stride(0), compute, _ANY_ALGORITHM,
        )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"cublasGemmEx: expected status 0, got {status}, for ({m}, {k}) · ({k}, {n})")
    return True


def weight_gradient(
    d_gates: Tensor, inputs: Sequence[Tensor], d_weight: Tensor | None, d_bias: Tensor | None, add: bool
) -> None:
    """Sum a weight's gradient; arguments as of ``fused_rnn.kernels.weight_gradient``."""
    if d_weight is None or d_gates.dtype != torch.float32 or not d_gates.is_cuda:
        plain_weight_gradient(d_gates, inputs, d_weight, d_bias, add)
        return
    row = 0
    for part in inputs:
        multiply(d_gates[row : row + part.shape[0]].t(), part, d_weight, add=add or row > 0)
        row += part.shape[0]
    plain_weight_gradient(d_gates, (), None, d_bias, add)
