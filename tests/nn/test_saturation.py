"""Inputs so large that the gates are at their ends: no gradient passes there, however large the input is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused_rnn

MODULES = [(name, getattr(torch.nn, name), getattr(fused_rnn, name)) for name in ("RNN", "GRU", "LSTM")]
every_module = pytest.mark.parametrize(("theirs", "ours"), [pair for _, *pair in MODULES], ids=[name for name, *_ in MODULES])


def gradients(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the parameters, for the sum of the outputs."""
    module(x)[0].sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@every_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", [40.0, 1e4, 1e9, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_large_input(kernels: str, theirs: type, ours: type, dtype: torch.dtype, size: float, sign: int) -> None:
    """Of the weights in front of it, the gradients that torch.nn has: zero where all is saturated, and exactly so."""
    found = []
    for module in (theirs(1, 5).to(dtype), ours(1, 5).to(dtype)):
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
        torch.nn.init.ones_(module.weight_ih_l0)
        found.append(gradients(module, torch.full((3, 2, 1), sign * size, dtype=dtype)))
    expected, actual = (each["weight_ih_l0"] for each in found)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@every_module
def test_time_stamps_beside_a_feature(kernels: str, theirs: type, ours: type) -> None:
    """Seconds since 1970 saturate all gates. What they are multiplied with must be zero, or it is the whole gradient."""
    t = torch.arange(20.0)
    x = torch.stack([1.7e9 + 60 * t, t.sin()], -1)[:, None]
    torch.manual_seed(0)
    module = theirs(2, 8)
    mine = ours(2, 8)
    mine.load_state_dict(module.state_dict())
    expected = gradients(module, x)
    for name, gradient in gradients(mine, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
