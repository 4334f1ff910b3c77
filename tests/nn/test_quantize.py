"""fused_rnn.quantize_dynamic: what it swaps and leaves, what of a module is kept, and how torch's function gets there."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from int8_support import states_of
from torch import nn
from torch.nn.utils import parametrizations, prune

import fused_rnn
from fused_rnn.cells import tanh
from fused_rnn.nn import quantized
from fused_rnn.nn.quantized import Quantized

pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
torch_quantize: Any = torch.ao.quantization.quantize_dynamic


def test_in_place_with_all_that_users_keep() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(6, 19)
            self.again = self.rnn
            self.cells = nn.ModuleList([nn.LSTMCell(6, 19), fused_rnn.RNNCell(6, 19, nonlinearity="relu")])
            self.head = nn.Linear(19, 2)

    model = Model()
    rnn, calls = model.rnn, []
    rnn.register_forward_hook(lambda *_: calls.append(1))
    rnn.note = "kept"
    report: list[fused_rnn.Conversion] = []
    assert fused_rnn.quantize_dynamic(model, report) is model
    assert model.rnn is rnn is model.again
    assert [str(row) for row in report] == [
        "rnn = again: torch.nn.modules.rnn.GRU -> fused_rnn.nn.quantized.QuantizedGRU",
        "cells.0: torch.nn.modules.rnn.LSTMCell -> fused_rnn.nn.quantized_cells.QuantizedLSTMCell",
        "cells.1: fused_rnn.nn.cells.RNNCell -> fused_rnn.nn.quantized_cells.QuantizedRNNCell",
    ]
    rnn(torch.randn(2, 1, 6))
    assert calls == [1]
    assert rnn.note == "kept"
    assert not model.training
    assert [name for name, _ in model.named_parameters()] == ["head.weight", "head.bias"]
    assert type(model.head) is nn.Linear
    again: list[fused_rnn.Conversion] = []
    fused_rnn.quantize_dynamic(model, again)
    assert not again
    fused_rnn.convert(model)
    fused_rnn.revert(model)
    assert type(rnn) is quantized.QuantizedGRU
    assert repr(model.cells[1]) == "QuantizedRNNCell(6, 19, nonlinearity=relu)"


def test_what_is_meant_can_be_named() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.GRU(3, 4), "c": fused_rnn.LSTM(3, 4)})
    fused_rnn.quantize_dynamic(model, only={"b"})
    assert [type(each).__name__ for each in model.values()] == ["LSTM", "QuantizedGRU", "LSTM"]
    fused_rnn.quantize_dynamic(model, only={nn.LSTM})
    assert [type(each).__name__ for each in model.values()] == ["QuantizedLSTM", "QuantizedGRU", "QuantizedLSTM"]
    model = nn.ModuleDict({"a": nn.LSTM(3, 4)})
    with pytest.raises(ValueError, match=r"only: expected paths of recurrent modules \(a\), got 'x'"):
        fused_rnn.quantize_dynamic(model, only={"x"})
    with pytest.raises(ValueError, match=r"only: expected classes of RNN, LSTM, .* got torch.nn.modules.linear.Linear"):
        fused_rnn.quantize_dynamic(model, only={nn.Linear})
    for wrong in ("a", nn.LSTM, {3}):
        with pytest.raises(TypeError, match=r"only: expected"):
            fused_rnn.quantize_dynamic(model, only=wrong)  # type: ignore[arg-type]
    assert type(model["a"]) is nn.LSTM


def test_what_is_left_alone_says_why() -> None:
    class Own(nn.LSTM):
        pass

    @fused_rnn.cell(gates="n", states="h")
    def minimal(x: Any, W: Any, h: Any) -> Any:
        return tanh(x.n + W.n(h))

    pruned, weird = nn.GRU(3, 4), nn.LSTM(3, 4)
    prune.l1_unstructured(pruned, "weight_hh_l0", 0.5)
    weird.forward = lambda x: x  # type: ignore[assignment]
    model = nn.ModuleDict(
        {
            "projected": nn.LSTM(3, 4, proj_size=2),
            "before": fused_rnn.GRU(3, 4, reset_after=False),
            "own": Own(3, 4),
            "normed": parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
            "pruned": pruned,
            "weird": weird,
            "meta": nn.LSTM(3, 4, device="meta"),
            "equations": fused_rnn.Recurrent(minimal, 3, 4),
            "fine": nn.LSTM(3, 4),
        }
    )
    report: list[fused_rnn.Conversion] = []
    fused_rnn.quantize_dynamic(model, report)
    reasons = {row.name: row.reason for row in report}
    assert reasons.pop("fine") is None
    assert {name: reason.split(":")[0] for name, reason in reasons.items() if reason} == {
        "projected": "no int8 kernel has a projection (proj_size)",
        "before": "no int8 kernel has reset_after=False",
        "own": "a subclass of torch.nn.modules.rnn.LSTM may have changed anything",
        "normed": "its weights are computed from others, or sharded",
        "pruned": "weight_hh_l0 is no parameter",
        "weird": "its forward was replaced on the instance",
        "meta": "its parameters are on meta",
        "equations": "no int8 kernel has a cell that is made of equations",
    }
    with pytest.warns(UserWarning, match=r"left 1 of 1 recurrent modules as they were: .the model.: .* .proj_size"):
        fused_rnn.quantize_dynamic(nn.LSTM(3, 4, proj_size=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_rnn.quantize_dynamic(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        fused_rnn.quantize_dynamic(3)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"report: expected a list or None, got dict"):
        fused_rnn.quantize_dynamic(model, {})  # type: ignore[arg-type]


def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.LSTM(3, 4)})
    with torch.no_grad():
        model["b"].weight_hh_l0[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"quantize_dynamic: b: weight: expected finite numbers"):
        fused_rnn.quantize_dynamic(model)
    assert [type(each) for each in model.values()] == [nn.LSTM, nn.LSTM]
    assert model.training


def example() -> tuple[Quantized, torch.Tensor, torch.Tensor]:
    rnn = fused_rnn.quantize_dynamic(nn.LSTM(6, 19, 2, bidirectional=True))
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        return rnn, x, rnn(x)[0]  # type: ignore[return-value]


def test_state_dict_goes_to_another_module() -> None:
    rnn, x, expected = example()
    state = rnn.state_dict()
    assert state["weight_ih_l1_reverse"].dtype == torch.int8
    assert state["weight_ih_l1_reverse"].shape == (76, 38)
    assert state["scale_hh_l0"].shape == (76,)
    assert {name.rsplit("_l", 1)[0] for name in state} == {
        f"{a}_{b}" for a in ("weight", "scale", "bias") for b in ("ih", "hh")
    }
    other = quantized.QuantizedLSTM(6, 19, 2, bidirectional=True)
    assert not other(x)[0].any()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert str(other.load_state_dict(torch.load(buffer))) == "<All keys matched successfully>"
    assert torch.equal(other(x)[0], expected)
    del state["scale_hh_l0"]
    with pytest.raises(RuntimeError, match=r"Missing key.*scale_hh_l0"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"weight_ih_l0: expected torch.int8 of shape \(76, 6\).*quantize_dynamic"):
        other.load_state_dict(rnn.dequantize().state_dict() | {"scale_ih_l0": torch.ones(76), "scale_hh_l0": torch.ones(76)})
    with torch.device("meta"):
        empty = quantized.QuantizedLSTM(6, 19, 2, bidirectional=True)
    empty.load_state_dict(rnn.state_dict(), assign=True)
    assert torch.equal(empty(x)[0], expected)
    nested = nn.Sequential(quantized.QuantizedLSTM(6, 19, 2, bidirectional=True))
    nested.load_state_dict({f"0.{name}": value for name, value in rnn.state_dict().items()})
    assert torch.equal(nested(x)[0], expected)


def test_copies() -> None:
    rnn, x, expected = example()
    buffer = io.BytesIO()
    torch.save(rnn, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x)[0], expected)
    for moved in (rnn.half(), rnn.double(), rnn.to(torch.bfloat16), rnn.to("cpu")):
        assert torch.equal(moved(x)[0], expected)
    # A quarter of float32's, and for each row two scales, two sums and two biases.
    sizes = sum(buffer.numel() * buffer.element_size() for buffer in rnn.buffers())
    floats = sum(parameter.numel() * 4 for parameter in rnn.dequantize().parameters())
    assert sizes < floats
    big = nn.LSTM(512, 512)
    floats = sum(parameter.numel() * 4 for parameter in big.parameters())
    fused_rnn.quantize_dynamic(big)
    assert sum(buffer.numel() * buffer.element_size() for buffer in big.buffers()) < 0.27 * floats


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_torchs_function_quantizes_what_its_set_names(name: str) -> None:
    cls = getattr(fused_rnn, name)
    model = nn.Sequential(cls(6, 19))
    x = torch.randn(5, 3, 6) if name in LAYERS else torch.randn(3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made = torch_quantize(model, {cls})
    assert type(model[0]) is cls
    assert type(made[0]).__name__ == f"Quantized{name}"
    assert not made[0].training
    expected = fused_rnn.quantize_dynamic(copy.deepcopy(model))
    with torch.no_grad():
        for one, other in zip(states_of(made(x)), states_of(expected(x)), strict=True):
            assert torch.equal(*(each[0] if isinstance(each, tuple) else each for each in (one, other)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(NotImplementedError, match=r"its qconfig asks for weights of torch.float16, expected torch.qint8"):
            torch_quantize(model, {cls}, dtype=torch.float16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchs_function_says_once_what_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.nn.qconfig._told", False)
    model = nn.Sequential(fused_rnn.convert(nn.LSTM(6, 19)), nn.Linear(19, 2))
    with pytest.warns(
        UserWarning, match=r"leaves fused_rnn.LSTM in floating point .* call fused_rnn.quantize_dynamic\(model\)"
    ):
        made = torch_quantize(model)
    assert type(made[0]) is fused_rnn.LSTM
    assert not hasattr(made[0], "qconfig")
    assert type(made[1]) is not nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = torch_quantize(model)
    fused_rnn.quantize_dynamic(made)
    assert type(made[0]) is quantized.QuantizedLSTM
