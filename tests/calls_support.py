"""What the tests of layers as calls of the extension share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_rnn.kernels import dispatch

every_layer = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])


def count_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a layer is a call of the extension from now on, each way."""
    assert dispatch.choose(torch.device("cpu")).name == "cpp"
    extension = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")
    counts = {"forward": 0, "backward": 0}
    for name in ("layer_forward", "plain_forward", "layer_backward"):
        way, taken = name.partition("_")[2], getattr(extension, name)

        def count(*arguments: Any, way: str = way, taken: Any = taken) -> Any:
            counts[way] += 1
            return taken(*arguments)

        monkeypatch.setattr(extension, name, count)
    return counts


def states_of(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Any:
    states = [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2 if name == "LSTM" else 1)]
    return tuple(states) if name == "LSTM" else states[0]


def flat(*values: Any) -> list[Tensor]:
    return [part for value in values for part in (flat(*value) if isinstance(value, tuple) else [value])]


def gradients(module: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    module.zero_grad(set_to_none=True)
    x.grad = None
    loss(module(x)[0]).backward()
    return [x.grad, *(parameter.grad for parameter in module.parameters())]
