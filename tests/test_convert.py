"""Converting a model and back: what is swapped, what is kept, what is left alone and why."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fused_rnn

NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"a": nn.LSTM(4, 6, 2, bidirectional=True), "b": nn.GRU(12, 6)})
        self.again = self.encoder["b"]
        self.cell = nn.RNNCell(6, 4, nonlinearity="relu")
        self.head = nn.Linear(4, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = self.again(self.encoder["a"](input)[0])[0]
        return self.head(self.cell(hidden[-1]))


@pytest.mark.parametrize("name", NAMES)
def test_the_model_itself_there_and_back(name: str) -> None:
    module = getattr(nn, name)(4, 6).eval()
    parameters = dict(module.named_parameters())
    state = {key: value.clone() for key, value in module.state_dict().items()}
    input = torch.randn(5, 4)
    expected = module(input)
    report: list[fused_rnn.Conversion] = []
    assert fused_rnn.convert(module, report) is module
    assert type(module) is getattr(fused_rnn, name)
    assert not module.training
    assert all(value is parameters[key] for key, value in module.named_parameters())
    torch.testing.assert_close(module(input), expected)
    assert [(row.name, row.before, row.after, row.reason) for row in report] == [("", getattr(nn, name), type(module), None)]
    place = "cell_modules" if name.endswith("Cell") else "modules"
    assert str(report[0]) == f"(the model): torch.nn.modules.rnn.{name} -> fused_rnn.{place}.{name}"
    assert fused_rnn.revert(module) is module
    assert type(module) is getattr(nn, name)
    torch.testing.assert_close(module(input), expected, rtol=0, atol=0)
    assert list(module.state_dict()) == list(state)
    if isinstance(module, nn.RNNBase):
        assert all(a is b for a, b in zip(module._flat_weights, parameters.values(), strict=True))


def test_a_whole_model_with_a_shared_module() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = copy.deepcopy(model)
    input = torch.randn(5, 3, 4)
    report: list[fused_rnn.Conversion] = []
    fused_rnn.convert(model, report)
    assert [row.name for row in report] == ["encoder.a", "encoder.b", "cell"]
    assert model.again is model.encoder["b"]
    assert type(model.again) is fused_rnn.GRU
    assert type(model.head) is nn.Linear
    torch.testing.assert_close(model(input), twin(input))
    # The optimizer made before the conversion trains the converted model.
    model(input).sum().backward()
    optimizer.step()
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(input).sum().backward()
    other.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    again: list[fused_rnn.Conversion] = []
    fused_rnn.convert(model, again)
    assert again == []
    fused_rnn.revert(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in twin.modules()]


def test_hooks_and_attributes_stay() -> None:
    module = nn.GRU(4, 6)
    seen = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.note = "mine"
    fused_rnn.convert(module)(torch.randn(2, 1, 4))
    assert seen == ["before", "forward"]
    assert module.note == "mine"
    fused_rnn.revert(module)(torch.randn(2, 1, 4))
    assert seen == ["before", "forward"] * 2


def test_parametrized_weights_stay_parametrized() -> None:
    module = nn.LSTM(4, 6)
    parametrizations.weight_norm(module, "weight_hh_l0")
    input = torch.randn(5, 2, 4)
    expected = module(input)
    fused_rnn.convert(module)
    assert isinstance(module, fused_rnn.LSTM)
    assert parametrize.is_parametrized(module, "weight_hh_l0")
    torch.testing.assert_close(module(input), expected)
    torch.testing.assert_close(copy.deepcopy(module)(input), expected)
    fused_rnn.revert(module)
    assert isinstance(module, nn.LSTM)
    torch.testing.assert_close(module(input), expected)
    fused_rnn.convert(module)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is fused_rnn.LSTM
    torch.testing.assert_close(module(input), expected)


def test_weight_norm_by_hook() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        module = nn.utils.weight_norm(nn.GRU(4, 6), "weight_hh_l0")
    input = torch.randn(5, 2, 4)
    expected = module(input)
    torch.testing.assert_close(fused_rnn.convert(module)(input), expected)
    with torch.no_grad():
        module.weight_hh_l0_g.mul_(2)
    assert not torch.allclose(module(input)[0], expected[0])


class Subclass(nn.LSTM):
    pass


def test_what_is_left_alone() -> None:
    patched = nn.GRU(4, 6)
    patched.forward = lambda *args: args
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.GRU(4, 6))
    with pytest.warns(DeprecationWarning, match="quantization"):
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 6)), {nn.LSTM})[0]
    left = {
        "subclass": (Subclass(4, 6), "a subclass of torch.nn.modules.rnn.LSTM"),
        "patched": (patched, "its forward was replaced"),
        "scripted": (scripted, "it is scripted"),
        "quantized": (quantized, "it is quantized"),
        "complex": (nn.RNN(4, 6, dtype=torch.complex64), "its parameters are torch.complex64"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in left.items()})
    before = [type(module) for module in model.modules()]
    report: list[fused_rnn.Conversion] = []
    fused_rnn.convert(model, report)
    assert [type(module) for module in model.modules()] == before
    reasons = {row.name: row.reason for row in report}
    assert set(reasons) == set(left)
    for name, (_, reason) in left.items():
        assert reasons[name].startswith(reason), name
    assert all(row.before is row.after for row in report)
    assert "left alone: it is scripted" in " ".join(map(str, report))


def test_fused_subclasses_are_not_reverted() -> None:
    class Mine(fused_rnn.GRU):
        pass

    module = Mine(4, 6)
    report: list[fused_rnn.Conversion] = []
    fused_rnn.revert(module, report)
    assert type(module) is Mine
    assert report[0].reason is not None


@pytest.mark.parametrize("function", [fused_rnn.convert, fused_rnn.revert])
def test_not_a_module(function) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        function(3)


def test_a_converted_model_saves_and_loads(tmp_path) -> None:
    model = fused_rnn.convert(Model())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    plain = Model()
    plain.load_state_dict(torch.load(tmp_path / "state.pt"))
    input = torch.randn(5, 3, 4)
    torch.testing.assert_close(plain(input), model(input))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(loaded(input), model(input), rtol=0, atol=0)
