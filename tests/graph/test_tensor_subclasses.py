"""Tensors of subclasses: results have their class, by torch's protocol, as those of torch.nn's modules have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode

import fused_rnn

every = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])


class Plain(Tensor):
    """With torch's own protocol."""


class Seeing(Tensor):
    """One that counts what it is asked for, and keeps its class, as those of fastai."""

    asked = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked += 1
        return super().__torch_function__(func, types, args, kwargs or {})


classes = pytest.mark.parametrize("cls", [Plain, Seeing])


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in flat(item)]


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    ours, theirs = getattr(fused_rnn, name)(3, 4, **options), getattr(nn, name)(3, 4, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def compare(ours: nn.Module, theirs: nn.Module, *arguments: Any) -> None:
    actual, expected = flat(ours(*arguments)), flat(theirs(*arguments))
    assert [type(each) for each in actual] == [type(each) for each in expected]
    as_plain = [[each.as_subclass(Tensor) for each in results] for results in (actual, expected)]
    torch.testing.assert_close(*as_plain)
    grads = [
        torch.autograd.grad(sum(each.square().sum() for each in results), list(module.parameters()))
        for module, results in ((ours, as_plain[0]), (theirs, as_plain[1]))
    ]
    torch.testing.assert_close(*[[grad.as_subclass(Tensor) for grad in each] for each in grads])
    with torch.no_grad():
        assert [type(each) for each in flat(ours(*arguments))] == [type(each) for each in expected]


@classes
@every
def test_inputs_and_states(name: str, cls: type[Tensor], backend: str) -> None:
    ours, theirs = pair(name)
    cell = "Cell" in name
    x, h = torch.randn((2, 3) if cell else (5, 2, 3)), torch.randn((2, 4) if cell else (1, 2, 4))

    def states(of: type[Tensor]) -> Any:
        return (h.as_subclass(of), h.as_subclass(of)) if "LSTM" in name else h.as_subclass(of)

    compare(ours, theirs, x.as_subclass(cls))
    compare(ours, theirs, x, states(cls))
    compare(ours, theirs, x.as_subclass(cls), states(Tensor))
    # Those of torch alone give those of torch.
    assert all(type(each) is Tensor for each in flat(ours(x, states(Tensor))))


@classes
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_options(name: str, cls: type[Tensor]) -> None:
    x = torch.randn(4, 4, 3).as_subclass(cls)
    for options in ({"batch_first": True}, {"num_layers": 2, "bidirectional": True}):
        compare(*pair(name, **options), x)
    compare(*pair(name), x[:, 0])
    packed = pack_padded_sequence(x.as_subclass(Tensor), torch.tensor([2, 4, 1, 1]), enforce_sorted=False)
    compare(*pair(name), packed._replace(data=packed.data.as_subclass(cls)))
    module = getattr(fused_rnn, name)(3, 4)
    assert type(module(x, lengths=torch.tensor([2, 4, 1, 1]))[0]) is cls


@classes
def test_weights(cls: type[Tensor]) -> None:
    ours, theirs = pair("GRU")
    for module in (ours, theirs):
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().as_subclass(cls))
        assert type(module.weight_hh_l0) is cls
    compare(ours, theirs, torch.randn(5, 2, 3))


def test_a_class_sees_the_call() -> None:
    module, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3).as_subclass(Seeing)
    before = Seeing.asked
    module(x)
    assert Seeing.asked > before


def test_a_mode_is_no_class() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    module, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    expected = module(x)[0]
    with Mode():
        torch.testing.assert_close(module(x)[0], expected)
