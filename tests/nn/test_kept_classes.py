"""Converted modules that are instances of torch.nn's classes, or of subclasses of these."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fused_rnn
from tests.calls_support import flat
from tests.older_torch import dynamo_with_values

NAMES = ("RNN", "LSTM", "GRU")
each = pytest.mark.parametrize("name", NAMES)
ROOT = Path(__file__).parents[2]


class LSTM(nn.LSTM):
    """As libraries derive theirs: something is added, nothing that the results come from is replaced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "mine"

    def initial(self, batch: int) -> Tensor:
        return torch.zeros(self.num_layers, batch, self.hidden_size)

    def extra_repr(self) -> str:
        return super().extra_repr() + ", mine"

    def train(self, mode: bool = True) -> LSTM:
        return super().train(mode)


class Handles(ABC, nn.RNNBase):
    """A base beside torch.nn's class, with a method that the class below must have."""

    @abstractmethod
    def one_state(self) -> bool: ...

    def handled(self, value: Tensor) -> Tensor:
        return value * 2


class GRU(Handles, nn.GRU):
    def one_state(self) -> bool:
        return True


class GRUCell(nn.GRUCell):
    def initial(self) -> Tensor:
        return torch.zeros(self.hidden_size)


def converted(module: nn.Module, **options: Any) -> tuple[nn.Module, list[Tensor], Tensor]:
    x = torch.randn((2, 3) if isinstance(module, nn.GRUCell) else (5, 2, 3))
    expected = flat(module(x))
    fused_rnn.convert(module, **options)
    return module, expected, x


@each
def test_keep_class(name: str) -> None:
    plain = getattr(nn, name)
    module, expected, x = converted(plain(3, 4, 2, bidirectional=True), keep_class=True)
    assert isinstance(module, plain)
    assert isinstance(module, getattr(fused_rnn, name))
    torch.testing.assert_close(flat(module(x)), expected)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(made) is type(module)
        torch.testing.assert_close(flat(made(x)), expected)
    assert list(module.state_dict()) == list(plain(3, 4, 2, bidirectional=True).state_dict())
    module.double().float().flatten_parameters()
    module.reset_parameters()
    assert not torch.allclose(flat(module(x))[0], expected[0])
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot compile"):
        torch.jit.script(module)
    made = type(module)(3, 4)
    assert flat(made(x))[0].shape == (5, 2, 4)
    fused_rnn.revert(module)
    assert type(module) is plain
    flat(module(x))


@each
def test_kept_weights_that_are_parametrized(name: str) -> None:
    module = getattr(nn, name)(3, 4)
    parametrizations.weight_norm(module, "weight_hh_l0")
    module, expected, x = converted(module, keep_class=True)
    assert isinstance(module, getattr(nn, name))
    torch.testing.assert_close(flat(module(x)), expected)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert isinstance(module, getattr(fused_rnn, name))
    torch.testing.assert_close(flat(module(x)), expected)
    fused_rnn.revert(module)
    assert type(module) is getattr(nn, name)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_are_instances_anyway(name: str) -> None:
    for module in (getattr(fused_rnn, name)(3, 4), fused_rnn.convert(getattr(nn, name)(3, 4))):
        assert isinstance(module, getattr(nn, name))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(flat(compiled(torch.ones(2, 3))), flat(module(torch.ones(2, 3))))


class Net(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@dynamo_with_values
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN, LSTM, GRU])
def test_compiled_and_exported_as_a_whole(cls: type[nn.Module]) -> None:
    net, x = fused_rnn.convert(Net(cls(3, 4)), keep_class=True).eval(), torch.randn(5, 2, 3)
    assert isinstance(net.rnn, nn.RNN | nn.GRU | nn.LSTM)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), list(net.parameters())), expected)
    alone = torch.compile(net.rnn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(alone(x)), flat(net.rnn(x)))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
    assert not torch._dynamo.config.allow_rnn
    # What torch.nn's own modules do is as before.
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(nn.LSTM(3, 4), fullgraph=True, backend="eager")(x)


@dynamo_with_values
def test_dynamo_is_told_when_it_is_imported() -> None:
    """Not earlier: the import takes seconds. Also where a module is unpickled that another process converted."""
    program = (
        "import pickle, sys, torch, fused_rnn\n"
        "data = pickle.dumps(fused_rnn.convert(torch.nn.GRU(3, 4), keep_class=True)) if {make} else {data!r}\n"
        "module = pickle.loads(data)\n"
        "assert 'torch._dynamo' not in sys.modules and isinstance(module, torch.nn.GRU)\n"
        "x = torch.ones(5, 2, 3)\n"
        "out = torch.compile(module, fullgraph=True, backend='aot_eager')(x)[0]\n"
        "torch.testing.assert_close(out, module(x)[0])\n"
    )
    data = pickle.dumps(fused_rnn.convert(nn.GRU(3, 4), keep_class=True))
    for make in (True, False):
        text = program.format(make=make, data=data)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=ROOT, timeout=300, check=False)
        assert done.returncode == 0


@pytest.mark.parametrize("make", [lambda: LSTM(3, 4, 2), lambda: GRU(3, 4), lambda: GRUCell(3, 4)])
def test_subclasses_that_only_add(make: Any) -> None:
    before = make()
    plain = type(before)
    module, expected, x = converted(before)
    assert isinstance(module, plain)
    assert isinstance(module, getattr(fused_rnn, plain.__name__))
    torch.testing.assert_close(flat(module(x)), expected)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(made) is type(module)
        torch.testing.assert_close(flat(made(x)), expected)
    assert type(fused_rnn.convert(make())) is type(module)
    assert type(type(module)(3, 4)) is type(module)
    fused_rnn.revert(module)
    assert type(module) is plain
    torch.testing.assert_close(flat(module(x)), expected)


def test_what_a_subclass_adds() -> None:
    lstm, gru = fused_rnn.convert(nn.ModuleList([LSTM(3, 4), GRU(3, 4)]))
    assert lstm.initial(2).shape == (1, 2, 4)
    assert lstm.note == "mine"
    assert repr(lstm) == "FusedLSTM(3, 4, mine)"
    assert not lstm.eval().training
    assert gru.one_state()
    assert torch.equal(gru.handled(torch.ones(1)), torch.full((1,), 2.0))
    assert type(lstm)(3, 4).note == "mine"


def replacing(name: str, value: Any) -> type[nn.LSTM]:
    return type("Mine", (nn.LSTM,), {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward", lambda self, x: nn.LSTM.forward(self, x)),
        ("__call__", lambda self, x: x),
        ("__getattr__", nn.LSTM.__getattr__),
        ("check_input", lambda self, *_: None),
        ("permute_hidden", lambda self, hx, _: hx),
        ("_flat_weights", property(lambda self: [], lambda self, value: None)),
        ("weight_hh_l0", property(lambda self: torch.zeros(16, 4), lambda self, value: None)),
        ("bidirectional", property(lambda self: False, lambda self, value: None)),
        ("__setattr__", nn.LSTM.__setattr__),
        ("__setstate__", nn.LSTM.__setstate__),
    ],
)
def test_subclasses_that_replace(name: str, value: Any) -> None:
    cls = replacing(name, value)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    report: list[fused_rnn.Conversion] = []
    fused_rnn.convert(module, report)
    assert type(module) is cls
    assert report[0].reason == f"a subclass of torch.nn.modules.rnn.LSTM that replaces {name} may have changed anything"


def test_a_subclass_of_a_subclass() -> None:
    """What a class between replaces counts too."""

    class Between(replacing("forward", nn.LSTM.forward)):  # type: ignore[misc]
        pass

    assert type(fused_rnn.convert(Between(3, 4), [])) is Between

    class Added(LSTM):
        def initial(self, batch: int) -> Tensor:
            return super().initial(batch) + 1

    module = fused_rnn.convert(Added(3, 4))
    assert isinstance(module, fused_rnn.LSTM)
    assert torch.equal(module.initial(2), torch.ones(1, 2, 4))


def test_a_warning_where_most_are_left() -> None:
    left = replacing("forward", nn.LSTM.forward)
    with pytest.warns(UserWarning, match=r"left 2 of 3 recurrent modules as they were, first of all 0: .*Mine left alone"):
        fused_rnn.convert(nn.ModuleList([left(3, 4), left(3, 4), nn.GRU(3, 4)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_rnn.convert(nn.ModuleList([left(3, 4), nn.GRU(3, 4)]))
        fused_rnn.convert(nn.ModuleList([left(3, 4)]), [])
        fused_rnn.convert(nn.Linear(3, 4))


def test_keep_class_is_a_bool() -> None:
    with pytest.raises(TypeError, match="keep_class: expected a bool, got int"):
        fused_rnn.convert(nn.GRU(3, 4), keep_class=1)  # type: ignore[arg-type]
