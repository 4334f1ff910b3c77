"""Stacks with connections and masked weights on the Triton backend."""

from __future__ import annotations

import pytest
import torch
from stack_support import CONNECTIONS, MODULES, compared
from torch import nn

import fused_rnn


@pytest.mark.parametrize("kind", CONNECTIONS)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_connections(name: str, kind: str) -> None:
    """As a loop over the steps, with lengths and resets."""
    build, count = MODULES[name]
    module = build(3, 5, 2, bidirectional=True, connections=kind)
    with fused_rnn.backend("triton"):
        compared(module, count, torch.randn(4, 3, 3), [2, 4, 0], torch.rand(4, 3) < 0.3)


def test_no_call_computes_with_an_earlier_mask() -> None:
    module = fused_rnn.GRU(3, 7, weight_dropout=0.5)
    weights = [module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0]
    x = torch.randn(4, 2, 3)
    for _ in range(4):
        state = torch.get_rng_state()
        mask = nn.functional.dropout(torch.ones(21, 7), 0.5)
        torch.set_rng_state(state)
        with fused_rnn.backend("triton"):
            out, _ = module(x)
        with fused_rnn.backend("reference"):
            expected, _ = fused_rnn.functional.gru(x, [fused_rnn.Weights(weights[0], weights[1] * mask, *weights[2:])])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        both = [torch.autograd.grad(each.sin().sum(), weights) for each in (out, expected)]
        torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_heads(name: str) -> None:
    """More recurrences than two, with lengths and resets, against the reference."""
    module = getattr(fused_rnn, name)(3, 15, bidirectional=True, num_heads=3)
    x, reset = torch.randn(4, 3, 3), torch.rand(4, 3) < 0.3
    found = []
    for backend in ("triton", "reference"):
        with fused_rnn.backend(backend):
            out, _ = module(x, lengths=torch.tensor([2, 4, 0]), reset=reset)
            found.append([out, *torch.autograd.grad(out.sin().sum(), list(module.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
