"""The plain RNN's pointwise parts and its kernels, tanh and relu (``fused_rnn.kernels.by_walk.walk``).

The numbers are those of the equations in ``fused_rnn.cells.rnn``.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from fused_rnn.cells import RNN_RELU, RNN_TANH
from fused_rnn.kernels.numba.launch import make_functions
from fused_rnn.kernels.numba.vector import load, splat, store, tanh, where_positive
from fused_rnn.kernels.numba.walk import backward, forward


@njit(error_model="numpy")
def _forward_tanh(like: Any, sums: int, tape: int, out: int, h: int, c: int, bias: int, block: int, count: Any) -> None:
    store(out, tanh(load(like, tape, count) + load(like, bias, count) + load(like, sums, None)), count)  # (1)


@njit(error_model="numpy")
def _backward_tanh(like: Any, d_h: Any, d_c: int, d_cell: int, tape: int, out: int, h: int, c: int, d_gates: int, reset: bool,
                   block: int, count: Any) -> Any:  # fmt: skip
    h_next = load(like, out, count)
    store(d_gates, d_h - d_h * h_next * h_next, count)  # (1)
    return splat(like)


@njit(error_model="numpy")
def _forward_relu(like: Any, sums: int, tape: int, out: int, h: int, c: int, bias: int, block: int, count: Any) -> None:
    gate = load(like, tape, count) + load(like, bias, count) + load(like, sums, None)
    store(out, where_positive(gate, gate), count)  # (1)


@njit(error_model="numpy")
def _backward_relu(like: Any, d_h: Any, d_c: int, d_cell: int, tape: int, out: int, h: int, c: int, d_gates: int, reset: bool,
                   block: int, count: Any) -> Any:  # fmt: skip
    store(d_gates, where_positive(load(like, out, count), d_h), count)  # (1)
    return splat(like)


_walk_forward_tanh = forward(RNN_TANH, _forward_tanh)
_walk_backward_tanh = backward(RNN_TANH, _backward_tanh)
_walk_forward_relu = forward(RNN_RELU, _forward_relu)
_walk_backward_relu = backward(RNN_RELU, _backward_relu)


def _forward_tanh_kernel(like: Any, version: int) -> Any:
    def rnn_tanh_forward(p: int) -> None:
        _walk_forward_tanh(p, like, version)

    return rnn_tanh_forward


def _backward_tanh_kernel(like: Any, version: int) -> Any:
    def rnn_tanh_backward(p: int) -> None:
        _walk_backward_tanh(p, like, version)

    return rnn_tanh_backward


def _forward_relu_kernel(like: Any, version: int) -> Any:
    def rnn_relu_forward(p: int) -> None:
        _walk_forward_relu(p, like, version)

    return rnn_relu_forward


def _backward_relu_kernel(like: Any, version: int) -> Any:
    def rnn_relu_backward(p: int) -> None:
        _walk_backward_relu(p, like, version)

    return rnn_relu_backward


rnn_tanh_pack, rnn_tanh_forward, rnn_tanh_backward = make_functions(RNN_TANH, _forward_tanh_kernel, _backward_tanh_kernel)
rnn_relu_pack, rnn_relu_forward, rnn_relu_backward = make_functions(RNN_RELU, _forward_relu_kernel, _backward_relu_kernel)
