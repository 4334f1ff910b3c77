"""torch.func.functionalize of calls of the modules, alone, around torch.func.grad, and in a trace of make_fx."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, functionalize, grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fused_rnn

IN, H, T, N = 5, 8, 4, 3
CALLS: dict[str, Any] = {
    "dense": lambda rnn, x: rnn(x),
    "lengths": lambda rnn, x: rnn(x, lengths=torch.tensor([2, 4, 1])),
    "reset": lambda rnn, x: rnn(x, reset=torch.tensor([[False] * N, [True] * N, [False] * N, [False] * N])),
    "packed": lambda rnn, x: rnn(pack_padded_sequence(x, [4, 2, 1]))[0].data,
}


def assert_same(found: Any, expected: Any) -> None:
    for actual, value in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layers(name: str, call: str) -> None:
    rnn, x = getattr(fused_rnn, name)(IN, H, 2, bidirectional=True), torch.randn(T, N, IN)
    run = CALLS[call]
    found = functionalize(lambda x: run(rnn, x))(x)
    assert_same(found, run(rnn, x))
    sum(value.sum() for value in tree_leaves(found)).backward()
    actual = [weight.grad.clone() for weight in rnn.parameters()]
    rnn.zero_grad()
    sum(value.sum() for value in tree_leaves(run(rnn, x))).backward()
    assert_same(actual, [weight.grad for weight in rnn.parameters()])


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name: str) -> None:
    cell, x = getattr(fused_rnn, name)(IN, H), torch.randn(N, IN)
    assert_same(functionalize(lambda x: cell(x))(x), cell(x))


def test_around_a_gradient_and_in_a_trace() -> None:
    rnn = fused_rnn.GRU(IN, H)
    parameters = {name: weight.detach() for name, weight in rnn.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(rnn, parameters, (x,))[0].sin().sum()

    x, other = torch.randn(T, N, IN), torch.randn(T, N, IN)
    assert_same(functionalize(grad(loss))(parameters, x), grad(loss)(parameters, x))
    traced = make_fx(functionalize(grad(loss)))(parameters, x)
    assert_same(traced(parameters, other), grad(loss)(parameters, other))
