"""The LSTM's pointwise parts and its kernels (``fused_rnn.kernels.by_walk.walk``).

The numbers are those of the equations in ``fused_rnn.cells.lstm``.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from fused_rnn.cells import LSTM
from fused_rnn.kernels.numba.launch import make_functions
from fused_rnn.kernels.numba.vector import load, ones, sigmoid, splat, store, tanh, vector_bytes
from fused_rnn.kernels.numba.walk import backward, forward


@njit(error_model="numpy")
def _forward(like: Any, sums: int, tape: int, out: int, h: int, c: int, bias: int, block: int, count: Any) -> None:
    vector = vector_bytes(like)
    # (1), (2)
    i = sigmoid(load(like, tape, count) + load(like, bias, count) + load(like, sums, None))
    f = sigmoid(load(like, tape + block, count) + load(like, bias + block, count) + load(like, sums + vector, None))
    g = tanh(load(like, tape + 2 * block, count) + load(like, bias + 2 * block, count) + load(like, sums + 2 * vector, None))
    o = sigmoid(load(like, tape + 3 * block, count) + load(like, bias + 3 * block, count) + load(like, sums + 3 * vector, None))
    c_next = f * load(like, c, count) + i * g  # (3)
    store(tape, i, count)
    store(tape + block, f, count)
    store(tape + 2 * block, g, count)
    store(tape + 3 * block, o, count)
    store(tape + 4 * block, c_next, count)
    store(out, o * tanh(c_next), count)  # (4)


@njit(error_model="numpy")
def _backward(like: Any, d_h: Any, d_c: int, d_cell: int, tape: int, out: int, h: int, c: int, d_gates: int, reset: bool,
              block: int, count: Any) -> Any:  # fmt: skip
    one = ones(like)
    i, f = load(like, tape, count), load(like, tape + block, count)
    g, o = load(like, tape + 2 * block, count), load(like, tape + 3 * block, count)
    tanh_c = tanh(load(like, tape + 4 * block, count))
    d_state = load(like, d_c, count) + load(like, d_cell, count) + d_h * o * (one - tanh_c * tanh_c)  # (4)
    store(d_gates, d_state * g * i * (one - i), count)  # (3), (1)
    store(d_gates + block, d_state * load(like, c, count) * f * (one - f), count)  # (3), (1)
    store(d_gates + 2 * block, d_state * i * (one - g * g), count)  # (3), (2)
    store(d_gates + 3 * block, d_h * tanh_c * o * (one - o), count)  # (4), (1)
    store(d_c, splat(like) if reset else d_state * f, count)  # (3)
    return splat(like)


_walk_forward = forward(LSTM, _forward)
_walk_backward = backward(LSTM, _backward)


def _forward_kernel(like: Any, version: int) -> Any:
    def lstm_forward(p: int) -> None:
        _walk_forward(p, like, version)

    return lstm_forward


def _backward_kernel(like: Any, version: int) -> Any:
    def lstm_backward(p: int) -> None:
        _walk_backward(p, like, version)

    return lstm_backward


lstm_pack, lstm_forward, lstm_backward = make_functions(LSTM, _forward_kernel, _backward_kernel)
