"""The GRU's pointwise parts and its kernels (``fused_rnn.kernels.by_walk.walk``).

The numbers are those of the equations in ``fused_rnn.cells.gru``.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from fused_rnn.cells import GRU
from fused_rnn.kernels.numba.launch import make_functions
from fused_rnn.kernels.numba.vector import load, ones, sigmoid, store, tanh, vector_bytes
from fused_rnn.kernels.numba.walk import backward, forward


@njit(error_model="numpy")
def _forward(like: Any, sums: int, tape: int, out: int, h: int, c: int, bias: int, block: int, count: Any) -> None:
    vector = vector_bytes(like)
    r = sigmoid(load(like, tape, count) + load(like, bias, count) + load(like, sums, None))  # (1)
    z = sigmoid(load(like, tape + block, count) + load(like, bias + block, count) + load(like, sums + vector, None))  # (2)
    hn = load(like, bias + 3 * block, count) + load(like, sums + 2 * vector, None)
    n = tanh(load(like, tape + 2 * block, count) + load(like, bias + 2 * block, count) + r * hn)  # (3)
    store(tape, r, count)
    store(tape + block, z, count)
    store(tape + 2 * block, n, count)
    store(tape + 3 * block, hn, count)
    store(out, n + z * (load(like, h, count) - n), count)  # (4)


@njit(error_model="numpy")
def _backward(like: Any, d_h: Any, d_c: int, d_cell: int, tape: int, out: int, h: int, c: int, d_gates: int, reset: bool,
              block: int, count: Any) -> Any:  # fmt: skip
    one = ones(like)
    r, z = load(like, tape, count), load(like, tape + block, count)
    n, hn = load(like, tape + 2 * block, count), load(like, tape + 3 * block, count)
    d_n = d_h * (one - z) * (one - n * n)  # (4), (3)
    store(d_gates, d_n * r, count)  # (3)
    store(d_gates + block, d_n * hn * r * (one - r), count)  # (3), (1)
    store(d_gates + 2 * block, d_h * (load(like, h, count) - n) * z * (one - z), count)  # (4), (2)
    store(d_gates + 3 * block, d_n, count)
    return d_h * z  # (4)


_walk_forward = forward(GRU, _forward)
_walk_backward = backward(GRU, _backward)


def _forward_kernel(like: Any, version: int) -> Any:
    def gru_forward(p: int) -> None:
        _walk_forward(p, like, version)

    return gru_forward


def _backward_kernel(like: Any, version: int) -> Any:
    def gru_backward(p: int) -> None:
        _walk_backward(p, like, version)

    return gru_backward


gru_pack, gru_forward, gru_backward = make_functions(GRU, _forward_kernel, _backward_kernel)
