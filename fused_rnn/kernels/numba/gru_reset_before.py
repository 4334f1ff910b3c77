"""The pointwise parts of the GRU with the reset gate before the product (``fused_rnn.kernels.by_walk.walk``).

The numbers are those of the equations in ``fused_rnn.cells.gru_reset_before``.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from fused_rnn.cells import GRU_RESET_BEFORE
from fused_rnn.kernels.numba.launch import make_functions
from fused_rnn.kernels.numba.vector import load, ones, sigmoid, store, tanh, vector_bytes
from fused_rnn.kernels.numba.walk import backward, forward


@njit(error_model="numpy")
def _forward(like: Any, sums: int, tape: int, out: int, h: int, c: int, bias: int, block: int, count: Any) -> None:
    vector = vector_bytes(like)
    r = sigmoid(load(like, tape, count) + load(like, bias, count) + load(like, sums, None))  # (1)
    z = sigmoid(load(like, tape + block, count) + load(like, bias + block, count) + load(like, sums + vector, None))  # (3)
    store(tape, r, count)
    store(tape + block, z, count)
    store(tape + 3 * block, r * load(like, h, count), count)  # (2)


@njit(error_model="numpy")
def _later(like: Any, sums: int, tape: int, out: int, h: int, c: int, bias: int, block: int, count: Any) -> None:
    n = tanh(load(like, tape + 2 * block, count) + load(like, bias + 2 * block, count) + load(like, sums, None))  # (4)
    store(tape + 2 * block, n, count)
    store(out, n + load(like, tape + block, count) * (load(like, h, count) - n), count)  # (5)


@njit(error_model="numpy")
def _backward(like: Any, d_h: Any, d_c: int, d_cell: int, tape: int, out: int, h: int, c: int, d_gates: int, reset: bool,
              block: int, count: Any) -> Any:  # fmt: skip
    one = ones(like)
    z, n = load(like, tape + block, count), load(like, tape + 2 * block, count)
    store(d_gates + block, d_h * (load(like, h, count) - n) * z * (one - z), count)  # (5), (3)
    store(d_gates + 2 * block, d_h * (one - z) * (one - n * n), count)  # (5), (4)
    return d_h * z  # (5)


@njit(error_model="numpy")
def _later_backward(like: Any, d_m: Any, tape: int, h: int, d_gates: int, block: int, count: Any) -> Any:
    r = load(like, tape, count)
    store(d_gates, d_m * load(like, tape + 3 * block, count) * (ones(like) - r), count)  # (2), (1): h₋ r = m
    return d_m * r  # (2)


_walk_forward = forward(GRU_RESET_BEFORE, _forward, _later)
_walk_backward = backward(GRU_RESET_BEFORE, _backward, _later_backward)


def _forward_kernel(like: Any, version: int) -> Any:
    def gru_reset_before_forward(p: int) -> None:
        _walk_forward(p, like, version)

    return gru_reset_before_forward


def _backward_kernel(like: Any, version: int) -> Any:
    def gru_reset_before_backward(p: int) -> None:
        _walk_backward(p, like, version)

    return gru_reset_before_backward


gru_reset_before_pack, gru_reset_before_forward, gru_reset_before_backward = make_functions(
    GRU_RESET_BEFORE, _forward_kernel, _backward_kernel
)
