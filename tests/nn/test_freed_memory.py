"""Tensors whose storage was freed: they raise, and no kernel reads where nothing is."""

from __future__ import annotations

import pytest
import torch

import fused_rnn


@pytest.mark.parametrize("what", ["input", "h_0", "weight"])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_freed(name: str, length: int, what: str, backend: str) -> None:
    module, cell = getattr(fused_rnn, name)(3, 4), "Cell" in name
    x, h = torch.randn((2, 3) if cell else (length, 2, 3)), torch.randn((2, 4) if cell else (1, 2, 4))
    hx = (h, torch.zeros_like(h)) if "LSTM" in name else h
    weight = module.weight_hh if cell else module.weight_hh_l0
    {"input": x, "h_0": h, "weight": weight.data}[what].untyped_storage().resize_(0)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="expected a tensor with memory of its own"):
            module(x, hx)
