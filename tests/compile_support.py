"""What the tests of compiled modules and those of the operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn

IN, H = 5, 7
MODULES = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "batch_first": True}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {"bias": False}),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What one test compiled, or the dynamic sizes that it made torch guess, must not reach the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(case: str, **options: Any) -> torch.nn.Module:
    name, own = MODULES[case]
    module: torch.nn.Module = getattr(fused_rnn, name)(IN, H, **{"dtype": torch.float64, **own, **options})
    return module


def packed(x: Tensor, lengths: Sequence[int], enforce_sorted: bool) -> PackedSequence:
    return pack_padded_sequence(x, list(lengths), enforce_sorted=enforce_sorted)


def flat(result: Any) -> list[Tensor]:
    out, states, *cells = result
    states = states if isinstance(states, tuple) else (states,)
    return [out.data if isinstance(out, PackedSequence) else out, *states, *cells]


def states_of(module: torch.nn.Module, batch: int) -> list[Tensor]:
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or H, H] if isinstance(module, fused_rnn.LSTM) else [H]
    return [torch.randn(count, batch, size, dtype=torch.float64) for size in sizes]


def results(
    function: Callable[..., Any],
    module: torch.nn.Module,
    data: Tensor,
    given: PackedSequence | None,
    states: Sequence[Tensor],
    dynamic: Sequence[int] = (),
) -> list[Tensor]:
    """The outputs, and the gradients of input, initial states and parameters."""
    data = data.detach().clone().requires_grad_()
    torch._dynamo.mark_dynamic(data, dynamic)
    states = [state.detach().clone().requires_grad_() for state in states]
    hx = () if not states else (states[0],) if len(states) == 1 else (tuple(states),)
    torch.manual_seed(1)
    values = flat(function(data if given is None else PackedSequence(data, *given[1:]), *hx))
    loss = sum((value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum() for value in values)
    return [*(value.detach() for value in values), *torch.autograd.grad(loss, [data, *states, *module.parameters()])]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
