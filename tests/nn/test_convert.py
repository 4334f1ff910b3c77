"""Converting a model and back: what is swapped, what is kept, what is left alone and why."""

import copy
import warnings
from typing import Any

import pytest
import torch
from tolerances import assert_close_to_reference
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

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
    assert str(report[0]) == f"(the model): torch.nn.modules.rnn.{name} -> {type(module).__module__}.{name}"
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
    assert [row.also for row in report] == [(), ("again",), ()]
    assert str(report[1]).startswith("encoder.b = again: torch.nn.modules.rnn.GRU -> ")
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
    def make() -> tuple[nn.GRU, list]:
        module, seen = nn.GRU(4, 6), []
        module.register_forward_pre_hook(lambda *_: seen.append("pre"))
        module.register_forward_hook(lambda *_: seen.append("forward"))
        module.register_forward_hook(lambda self, args, kwargs, out: seen.append(sorted(kwargs)), with_kwargs=True)
        module.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
        module.register_full_backward_hook(lambda self, d_in, d_out: seen.append((d_in[0].clone(), d_out[0].clone())))
        module.register_state_dict_pre_hook(lambda *_: seen.append("state pre"))
        module.register_state_dict_post_hook(lambda *_: seen.append("state"))
        module.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
        module.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
        module.weight_ih_l0.register_hook(lambda grad: 2 * grad)
        module.register_buffer("calls", torch.tensor(3))
        module.register_buffer("scratch", torch.ones(2), persistent=False)
        module.note = "mine"
        module.bias_ih_l0.requires_grad_(False)
        return module.eval(), seen

    def use(module: nn.Module) -> torch.Tensor:
        input = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        module(input, hx=None)[0].sum().backward()
        module.load_state_dict(module.state_dict())
        gradient = module.weight_ih_l0.grad
        module.weight_ih_l0.grad = None
        assert module.bias_ih_l0.grad is None
        return gradient

    module, seen = make()
    expected, calls = use(module), list(seen)
    assert len(calls) == 9
    for function in (fused_rnn.convert, fused_rnn.revert):
        seen.clear()
        function(module)
        assert (module.note, module.training, list(module.state_dict())[-1]) == ("mine", False, "calls")
        seen.clear()
        torch.testing.assert_close(use(module), expected)
        assert [call for call in seen if not isinstance(call, tuple)] == [call for call in calls if not isinstance(call, tuple)]
        torch.testing.assert_close(*([call for call in all if isinstance(call, tuple)] for all in (seen, calls)))
        assert "scratch" in dict(module.named_buffers())


def _apply_weight_norm(module: nn.Module, name: str) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, name)


TRANSFORMED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm by hook": _apply_weight_norm,
    "spectral_norm by hook": nn.utils.spectral_norm,
    "pruned": lambda module, name: prune.random_unstructured(module, name, 0.4),
}


@pytest.mark.parametrize("kind", TRANSFORMED)
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_transformed_recurrent_weights(name: str, kind: str) -> None:
    """The weight is computed anew at each call and passes its gradient on; training goes as with torch.nn."""
    weight = "weight_hh" + "_l0" * (not name.endswith("Cell"))
    module = getattr(nn, name)(4, 6, dtype=torch.float64)
    TRANSFORMED[kind](module, weight)
    plain, fused = getattr(nn, name)(4, 6, dtype=torch.float64), module
    TRANSFORMED[kind](plain, weight)
    plain.load_state_dict(module.state_dict())
    before = copy.deepcopy(module.state_dict())
    parameters = list(module.parameters())
    fused_rnn.convert(fused)
    assert isinstance(fused, getattr(fused_rnn, name))
    torch.testing.assert_close(fused.state_dict(), before, rtol=0, atol=0)
    assert all(a is b for a, b in zip(fused.parameters(), parameters, strict=True))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9) for model in (plain, fused)]
    for step in range(5):
        if step == 3:
            fused_rnn.revert(fused)
            assert isinstance(fused, getattr(nn, name))
        input = torch.randn(5, 4, dtype=torch.float64)
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            optimizer.zero_grad()
            # A power iteration happens at each reading of the weight; torch.nn's modules read it several times a call.
            with parametrize.cached():
                model(input)[0].square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)
        for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", [fused_rnn.convert, fused_rnn.revert])
def test_the_change_of_class_reads_no_parametrized_weight(function) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.calls += 1
            return weight

    module = (nn if function is fused_rnn.convert else fused_rnn).LSTM(4, 6)
    parametrize.register_parametrization(module, "weight_hh_l0", Counting())
    counting = module.parametrizations.weight_hh_l0[0]
    before = counting.calls.clone()
    function(module)
    assert counting.calls == before
    assert counting.training


def test_parametrizations_come_and_go_after_the_conversion() -> None:
    module = nn.LSTM(4, 6)
    parametrizations.weight_norm(module, "weight_hh_l0")
    input = torch.randn(5, 2, 4)
    expected = module(input)
    fused_rnn.convert(module)
    assert parametrize.is_parametrized(module, "weight_hh_l0")
    torch.testing.assert_close(copy.deepcopy(module)(input), expected)
    parametrizations.weight_norm(module, "weight_ih_l0")
    torch.testing.assert_close(module(input), expected)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    torch.testing.assert_close(module(input), expected)
    parametrize.remove_parametrizations(module, "weight_ih_l0")
    assert type(module) is fused_rnn.LSTM
    torch.testing.assert_close(module(input), expected)
    assert type(fused_rnn.revert(module)) is nn.LSTM


def test_hooked_weights_come_and_go_after_the_conversion() -> None:
    module = nn.GRU(4, 6)
    input = torch.randn(5, 2, 4)
    expected = module(input)
    fused_rnn.convert(module)
    _apply_weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(module(input), expected)
    with torch.no_grad():
        module.weight_hh_l0_g.mul_(2)
    assert not torch.allclose(module(input)[0], expected[0])
    nn.utils.remove_weight_norm(module, "weight_hh_l0")
    doubled = module(input)
    prune.identity(module, "weight_hh_l0")
    prune.remove(module, "weight_hh_l0")
    torch.testing.assert_close(module(input), doubled)
    torch.testing.assert_close(fused_rnn.revert(module)(input), doubled)


def test_a_weight_set_before_each_call() -> None:
    """DropConnect as it is written over torch.nn: the raw weight is the parameter, the module holds a plain tensor."""
    module = nn.LSTM(4, 6)
    raw = nn.Parameter(module.weight_hh_l0.detach().clone())
    module.flatten_parameters = lambda: None
    del module._parameters["weight_hh_l0"]
    input, gradients = torch.randn(5, 2, 4), []
    for function in (lambda module: module, fused_rnn.convert, fused_rnn.revert):
        function(module)
        module.weight_hh_l0 = torch.dropout(raw, 0.5, torch.manual_seed(1) is not None)
        gradients += torch.autograd.grad(module(input)[0].sum(), raw)
    torch.testing.assert_close(gradients[1:], gradients[:1] * 2)
    assert (gradients[0] == 0).any()


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleList([nn.GRU(6, 6), nn.GRUCell(6, 6), nn.Linear(6, 18)])
    model[1].weight_hh = model[2].weight = model[0].weight_hh_l0
    plain = copy.deepcopy(model)
    fused_rnn.convert(model)
    assert model[1].weight_hh is model[0].weight_hh_l0 is model[2].weight
    for each in (model, plain):
        each[2](each[1](each[0](torch.ones(3, 2, 6))[0][-1])).sum().backward()
    torch.testing.assert_close(model[0].weight_hh_l0.grad, plain[0].weight_hh_l0.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_already_of_another_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.LSTM(4, 6)).to(dtype)
    input = torch.randn(5, 2, 4).to(dtype)
    expected = model(input)[0]
    reference = copy.deepcopy(model).double()(input.double())[0]
    assert_close_to_reference(fused_rnn.convert(model)(input)[0], expected, reference)
    # And once more after the conversion, and after the way back.
    for function in (fused_rnn.convert, fused_rnn.revert):
        assert function(model).float()(input.float())[0].dtype == torch.float32


def test_on_the_meta_device_and_filled_later() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.GRU(4, 6, 2))
    fused_rnn.convert(model)
    assert model(torch.empty(5, 2, 4, device="meta"))[0].shape == (5, 2, 6)
    plain = nn.Sequential(nn.GRU(4, 6, 2))
    model.load_state_dict(plain.state_dict(), assign=True)
    input = torch.randn(5, 2, 4)
    torch.testing.assert_close(model(input), plain(input))


def test_lazy_modules_beside() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.RNN(4, 6))
    fused_rnn.convert(model)
    assert model(torch.randn(5, 2, 3))[0].shape == (5, 2, 6)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager"), torch.fx.symbolic_trace]
)
def test_wrapped_models(wrap) -> None:
    """Swapped inside of the wrapper, also where the wrapper has run before."""
    model = nn.Sequential(nn.LSTM(4, 6))
    wrapped, input = wrap(model), torch.randn(5, 2, 4)
    expected = wrapped(input)
    report: list[fused_rnn.Conversion] = []
    assert fused_rnn.convert(wrapped, report) is wrapped
    assert len(report) == 1
    assert report[0].after is fused_rnn.LSTM
    with fused_rnn.backend("reference"):
        torch.testing.assert_close(wrapped(input), expected)
    with pytest.raises(RuntimeError, match="size"):
        wrapped(input[..., 1:])
    fused_rnn.revert(wrapped)
    torch.testing.assert_close(wrapped(input), expected, rtol=0, atol=0)


class Subclass(nn.LSTM):
    def forward(self, *arguments: Any) -> Any:
        return super().forward(*arguments)


class Own(nn.RNNBase):
    """As libraries derive their own recurrence."""


def test_what_is_left_alone() -> None:
    patched, checked, prepared = nn.GRU(4, 6), nn.LSTM(4, 6), nn.LSTM(4, 6)
    patched.forward = lambda *args: args
    checked.check_input = lambda *args: None
    prepared.qconfig = object()
    wrapped = nn.LSTM(4, 6)
    wrapped.weight_hh_l0 = nn.Parameter(TwoTensor(torch.zeros(24, 6), torch.zeros(24, 6)))
    weight_norm = parametrizations.weight_norm(Subclass(4, 6), "weight_hh_l0")
    with warnings.catch_warnings():
        # Newer versions of torch deprecate all three.
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.GRU(4, 6))
        traced = torch.jit.trace(nn.GRU(4, 6), torch.ones(3, 1, 4), check_trace=False)
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 6)), {nn.LSTM})[0]
    left = {
        "subclass": (Subclass(4, 6), "a subclass of torch.nn.modules.rnn.LSTM"),
        "parametrized subclass": (weight_norm, "a subclass of torch.nn.modules.rnn.LSTM"),
        "own": (Own("GRU", 4, 6), "a recurrent module of its own"),
        "patched": (patched, "its forward was replaced"),
        "checked": (checked, "its check_input was replaced"),
        "prepared": (prepared, "it is prepared for quantization"),
        "wrapped": (wrapped, "its parameters are of the tensor subclass TwoTensor"),
        "scripted": (scripted, "it is scripted"),
        "traced": (traced, "it is scripted"),
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
    assert "left alone: it is scripted or traced" in " ".join(map(str, report))


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


def test_a_report_that_is_no_list_raises_before_anything_is_swapped() -> None:
    model = nn.Sequential(nn.LSTM(3, 4), nn.GRU(4, 5))
    with pytest.raises(TypeError, match="report: expected a list or None, got tuple"):
        fused_rnn.convert(model, ())  # type: ignore[arg-type]
    assert type(model[0]) is nn.LSTM


@pytest.mark.parametrize("name", NAMES)
def test_scripting_says_what_to_do_instead(name: str) -> None:
    model = nn.Sequential(getattr(nn, name)(4, 6))
    expected = model(torch.ones(2, 4))
    fused_rnn.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(NotImplementedError, match=r"script fused_rnn\.revert\(model\)"):
            torch.jit.script(model)
        torch.testing.assert_close(torch.jit.script(fused_rnn.revert(model))(torch.ones(2, 4)), expected)


def test_symbolic_trace_with_fused_leaves() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, (nn.RNNBase, nn.RNNCellBase)) or super().is_leaf_module(m, module_qualified_name)

    model, input = Model(), torch.randn(5, 2, 4)
    expected = model(input)
    fused_rnn.convert(model)
    graph = Tracer().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["encoder.a", "encoder.b", "cell", "head"]
    torch.testing.assert_close(torch.fx.GraphModule(model, graph)(input), expected)
