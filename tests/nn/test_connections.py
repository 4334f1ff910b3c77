"""``connections=``: residual, highway and dense stacks, against loops written from the papers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from calls_support import count_calls
from sequences_support import given, listed
from stack_support import CONNECTIONS, FIELDS, MODULES, compared, of_torch, stacked, states_for
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn

LENGTHS = [3, 6, 0, 1, 5]
every_kind = pytest.mark.parametrize("kind", CONNECTIONS)


def make(kind: str, name: str = "lstm", sizes: tuple[int, ...] = (3, 17, 3), **options: Any) -> tuple[Any, int]:
    """Three layers in both directions, where the options do not say otherwise; and how many states it has."""
    build, count = MODULES[name]
    return build(*sizes, **{"bidirectional": True, "dtype": torch.float64, **options}, connections=kind), count


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_are_a_loop(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Outputs, last states and all gradients."""
    module, count = make(kind, dtype=dtype)
    compared(module, count, torch.randn(6, 5, 3, dtype=dtype))


@every_kind
@pytest.mark.parametrize("name", MODULES)
def test_lengths_and_resets(kind: str, name: str, backend: str) -> None:
    """Of every module; without biases but for the highway's."""
    module, count = make(kind, name, bias=name != "gru")
    compared(module, count, torch.randn(6, 5, 3, dtype=torch.float64), LENGTHS, torch.rand(6, 5) < 0.4)


@every_kind
@pytest.mark.parametrize("name", ["rnn", "lstm", "projected"])
def test_layers_are_those_of_torch(kind: str, name: str) -> None:
    """Modules of torch.nn with one layer each, and what is between them as one would write it."""
    module, _ = make(kind, name)
    input = x = torch.randn(6, 5, 3, dtype=torch.float64)
    expected = x
    for layer, one in enumerate(of_torch(module)):
        out, _ = one(x)
        if kind == "dense":
            expected, x = out, torch.cat([x, out], 2)
            continue
        if kind == "residual" and layer:
            out = x + out
        elif layer:
            weight, bias = getattr(module, f"weight_t_l{layer}"), getattr(module, f"bias_t_l{layer}")
            gate = nn.functional.linear(x, weight, bias).sigmoid()
            out = x * (1 - gate) + out * gate
        expected = x = out
    torch.testing.assert_close(module(input)[0], expected)


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_an_input_as_wide_as_the_output(kind: str, bidirectional: bool, layers: int, backend: str) -> None:
    """The first layer has a residual and a highway too; one layer alone is a stack then."""
    if (kind, layers) == ("dense", 1):
        pytest.skip("a dense stack joins outputs of layers before, and there is none")
    width = 8 if bidirectional else 4
    for name in ("gru", "lstm"):
        module, count = make(kind, name, (width, 4, layers), bidirectional=bidirectional)
        assert ("weight_t_l0" in module.state_dict()) == (kind == "highway")
        compared(module, count, torch.randn(6, 5, width, dtype=torch.float64))


@every_kind
def test_layouts(kind: str, backend: str) -> None:
    """Batch first, unbatched, packed in any order, without given states."""
    module, count = make(kind)
    x, hx = torch.randn(6, 5, 3, dtype=torch.float64), states_for(module, count, 5)

    def of_batch_first(first: Tensor, states: list[Tensor]) -> Any:
        module.batch_first = True
        out, after = module(first.transpose(0, 1), given(states))
        module.batch_first = False
        return out.transpose(0, 1), after

    compared(module, count, x, run=of_batch_first)
    lengths = torch.tensor([3, 6, 2, 1, 5])

    def of_packed(first: Tensor, states: list[Tensor]) -> Any:
        out, after = module(pack_padded_sequence(first, lengths, enforce_sorted=False), given(states))
        return pad_packed_sequence(out)[0], after

    compared(module, count, x, lengths.tolist(), run=of_packed)
    whole, (h, c) = module(x, given(hx))
    out, (h_n, c_n) = module(x[:, 2], tuple(state[:, 2] for state in hx))
    torch.testing.assert_close((out, h_n, c_n), (whole[:, 2], h[:, 2], c[:, 2]))
    zeros = given([torch.zeros_like(state) for state in hx])
    torch.testing.assert_close(module(x), module(x, zeros))


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_states_are_the_layers_own(kind: str, batch_first: bool, backend: str) -> None:
    """The cell states are the last layer's; h_n ends its output without the connection."""
    module, count = make(kind, bidirectional=False, batch_first=batch_first)
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    hx = states_for(module, count, 5)
    *expected, cells = stacked(module, x, hx)
    out, (h, c), found = module(x.transpose(0, 1) if batch_first else x, given(hx), return_cell_states=True)
    if batch_first:
        out, found = out.transpose(0, 1), found.transpose(0, 1)
    torch.testing.assert_close([out, h, c, found], [*expected, cells])
    assert torch.allclose(out[-1], h[-1]) == (kind == "dense")


@every_kind
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_is_inside_of_the_connection(kind: str, p: float, backend: str) -> None:
    """The same masks in the same order; in evaluation none. With all dropped, what is carried arrives all the same."""
    module, count = make(kind, dropout=p)
    x, hx = torch.randn(6, 5, 3, dtype=torch.float64), states_for(module, count, 5)
    torch.manual_seed(7)
    expected = stacked(module, x, hx, drop=lambda values: nn.functional.dropout(values, p))[: 1 + count]
    torch.manual_seed(7)
    out, after = module(x, given(hx))
    torch.testing.assert_close([out, *listed(after)], expected)
    module.eval()
    out, after = module(x, given(hx))
    torch.testing.assert_close([out, *listed(after)], stacked(module, x, hx)[: 1 + count])


@every_kind
def test_single_steps_in_a_loop(kind: str, backend: str) -> None:
    """States handed from call to call, whose weights' gradients are summed up over the loop."""
    module, count = make(kind, bidirectional=False)
    x = torch.randn(5, 4, 3, dtype=torch.float64)

    def steps(first: Tensor, states: list[Tensor]) -> Any:
        after, outs = given(states), []
        for step in first:
            out, after = module(step[None], after)
            outs.append(out)
        return torch.cat(outs), after

    compared(module, count, x, run=steps)


@every_kind
def test_second_derivatives(kind: str, backend: str) -> None:
    module, _ = make(kind, "gru", (4, 2, 2), dropout=0.0)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)
    weights = [parameter for name, parameter in module.named_parameters() if name.startswith(("weight_ih_l1", "weight_t_l1"))]
    (first,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), weights)
    hx = given([torch.zeros(4, 2, 2, dtype=torch.float64)])
    (expected,) = torch.autograd.grad(stacked(module, x, [hx])[0].sin().sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), weights))


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_function_transforms(kind: str, batch_first: bool, backend: str) -> None:
    """A mapped batch, gradients of each sample, stacked parameters, and a tangent."""
    module, _ = make(kind, "gru", (3, 5, 2), batch_first=batch_first)
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    x = torch.randn(4, 6, 2, 3, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, x)[0].sin().sum()

    torch.testing.assert_close(torch.func.vmap(lambda x: module(x)[0])(x), torch.stack([module(each)[0] for each in x]))
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, each in enumerate(x):
        expected = torch.func.grad(loss)(parameters, each)
        torch.testing.assert_close({name: grad[i] for name, grad in per_sample.items()}, expected)
    ensemble = {name: torch.stack([value, -value]) for name, value in parameters.items()}
    of_members = torch.func.vmap(loss, in_dims=(0, None))(ensemble, x[0])
    torch.testing.assert_close(of_members[1], loss({name: -value for name, value in parameters.items()}, x[0]))
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(tangent, torch.func.grad(loss, argnums=1)(parameters, x[0]).sum())


@every_kind
def test_autocast(kind: str) -> None:
    """The dtypes that the same stack of torch.nn's layers has there, and numbers near them."""
    module, _ = make(kind, "gru", (8, 4, 2), dtype=torch.float32)
    x = torch.randn(6, 5, 8)
    exact = module(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, h = module(x)
        first, second = of_torch(module)
        y, _ = first(x)
        theirs, end = second(y if kind != "dense" else torch.cat([x, y], 2))
    assert h.dtype == end.dtype
    # The input's float32 is carried through.
    assert out.dtype == (theirs.dtype if kind == "dense" else torch.promote_types(theirs.dtype, x.dtype))
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(out.float().sum(), list(module.parameters()))
    assert all(grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in grads)


def test_parameters_and_their_first_values() -> None:
    """Torch's names and shapes, torch's values at the same seed where torch.nn has the parameter too; a highway carries."""
    torch.manual_seed(3)
    plain = nn.LSTM(6, 4, 3, bidirectional=True, proj_size=2)
    theirs = plain.state_dict()
    found = {}
    for kind in CONNECTIONS:
        torch.manual_seed(3)
        found[kind] = fused_rnn.LSTM(6, 4, 3, bidirectional=True, proj_size=2, connections=kind)
    torch.testing.assert_close(dict(found["residual"].state_dict()), dict(theirs), rtol=0, atol=0)
    highway = dict(found["highway"].state_dict())
    assert highway.keys() - theirs.keys() == {f"{name}_t_l{layer}" for name in ("weight", "bias") for layer in (1, 2)}
    torch.testing.assert_close({name: highway[name] for name in theirs}, dict(theirs), rtol=0, atol=0)
    assert highway["weight_t_l2"].shape == (4, 4)
    assert 0.3 < float(highway["weight_t_l2"].abs().max()) <= 0.5
    dense = found["dense"]
    shapes = [tuple(getattr(dense, f"weight_ih_l{layer}_reverse").shape) for layer in range(3)]
    assert shapes == [(16, 6), (16, 10), (16, 14)]
    assert dense.state_dict().keys() == theirs.keys()
    assert all(parameter.abs().max() <= 0.5 for parameter in dense.parameters())
    torch.nn.init.ones_(found["highway"].bias_t_l1)
    for module in found.values():
        module.reset_parameters()
    for module in (found["highway"], fused_rnn.Recurrent(fused_rnn.cells.lstm, 6, 4, 3, connections="highway")):
        for layer in (1, 2):
            assert getattr(module, f"bias_t_l{layer}").tolist() == [-1.0] * 4
    without = fused_rnn.GRU(3, 4, 2, bias=False, connections="highway")
    assert [name for name, _ in without.named_parameters() if name.startswith("bias")] == ["bias_t_l1"]


def test_on_the_meta_device_with_other_options() -> None:
    options: dict[str, Any] = {"forget_bias": 1.0, "recurrent_init": "orthogonal", "connections": "highway"}
    module = fused_rnn.LSTM(3, 4, 2, device="meta", dtype=torch.float64, **options)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float64)}
    assert module(torch.randn(5, 2, 3, device="meta", dtype=torch.float64))[0].shape == (5, 2, 4)
    module.to_empty(device="cpu").reset_parameters()
    assert (module.bias_ih_l1 + module.bias_hh_l1)[4:8].tolist() == [1.0] * 4
    block = module.weight_hh_l1[:4]
    torch.testing.assert_close(block @ block.t(), torch.eye(4, dtype=torch.float64))
    assert module.bias_t_l1.tolist() == [-1.0] * 4


@every_kind
@pytest.mark.parametrize("name", ["lstm", "recurrent"])
def test_what_a_module_keeps(kind: str, name: str) -> None:
    """A pickle, a copy and the text of a module; its numbers in another one; nothing in a plain one."""
    module, _ = make(kind, name, (3, 5, 2), dtype=torch.float32)
    x = torch.randn(2, 4, 3)
    other, _ = make(kind, name, (3, 5, 2), dtype=torch.float32)
    other.load_state_dict(module.state_dict())
    for each in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), other):
        assert each.connections == kind
        torch.testing.assert_close(each(x), module(x), rtol=0, atol=0)
    assert f", bidirectional=True, connections={kind!r})" in repr(module)
    plain, _ = make(None, name, (3, 5, 2))  # type: ignore[arg-type]
    assert plain.connections is None
    assert "connections" not in repr(plain)
    assert "_stack_options" not in vars(plain)
    with pytest.raises(AttributeError):
        module.connections = None


def test_parametrized_gates() -> None:
    """A weight that is computed from others is read at each call."""
    module, _ = make("highway", "gru", (3, 5, 2), bidirectional=False)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    expected = module(x)
    nn.utils.parametrizations.weight_norm(module, "weight_t_l1")
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        module.parametrizations.weight_t_l1.original0.mul_(3)
    assert not torch.allclose(module(x)[0], expected[0])


@every_kind
def test_each_layer_is_one_call_of_the_extension(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_calls(monkeypatch)
    module, _ = make(kind, batch_first=True, dtype=torch.float32)
    out, _ = module(torch.randn(5, 6, 3))
    out.sum().backward()
    assert counts == {"forward": 3, "backward": 3}


@every_kind
def test_an_output_that_is_changed_in_place(kind: str, backend: str) -> None:
    module, _ = make(kind, batch_first=True)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    expected = torch.autograd.grad(module(x)[0].relu().square().sum(), list(module.parameters()))
    out, _ = module(x)
    out.relu_()
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), list(module.parameters())), expected)
    with torch.no_grad():
        module(x)[0].detach_().mul_(2)


@pytest.mark.parametrize("build", [fused_rnn.LSTM, lambda *s, **o: fused_rnn.Recurrent(fused_rnn.cells.lstm, *s, **o)])
def test_what_does_not_fit(build: Any) -> None:
    """The message names what was expected and what came."""
    with pytest.raises(ValueError, match=r"connections: expected one of residual, highway, dense or None, got 'skip'"):
        build(3, 4, 2, connections="skip")
    with pytest.raises(TypeError, match="connections: expected a str or None, got bool"):
        build(3, 4, 2, connections=True)
    for kind in ("residual", "highway"):
        message = f"'{kind}' expects num_layers of 2 or more, or for one layer an input_size of 8, .*; got num_layers=1"
        with pytest.raises(ValueError, match=message):
            build(4, 4, bidirectional=True, connections=kind)
    with pytest.raises(ValueError, match="'dense' expects num_layers of 2 or more; got num_layers=1 and input_size=4"):
        build(4, 4, connections="dense")


@every_kind
def test_errors_of_a_call(kind: str, backend: str) -> None:
    """Torch's, with the shapes of this stack."""
    module, count = make(kind)
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    h, c = states_for(module, count, 5)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 2"):
        module(x[..., :2])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(6, 5, 17\), got \[2, 5, 17\]"):
        module(x, (h[:2], c[:2]))
    module.weight_ih_l2 = nn.Parameter(torch.zeros(68, 11, dtype=torch.float64))
    columns = 71 if kind == "dense" else 34
    for input in (x, pack_padded_sequence(x, torch.tensor([6, 5, 4, 3, 2]))):
        with pytest.raises(RuntimeError, match=rf"layer 2, direction 0: expected shape \(68, {columns}\), got \(68, 11\)"):
            module(input)


def test_conversions() -> None:
    """What torch.nn makes has none; what has some is left alone, with the reason."""
    model = nn.ModuleList([nn.GRU(3, 2), nn.LSTM(3, 2, 2)])
    for module in fused_rnn.convert(model):
        assert module.connections is None
    ours = nn.ModuleList([fused_rnn.GRU(3, 2, 2, connections="residual"), fused_rnn.LSTM(3, 2, weight_dropout=0.1)])
    report: list[fused_rnn.Conversion] = []
    fused_rnn.revert(ours, report)
    assert [each.reason for each in report] == [
        "torch.nn has no connections",
        "torch.nn has no weight_dropout: set it to 0 first",
    ]
    assert isinstance(ours[0], fused_rnn.GRU)
    theirs = nn.LSTM(3, 2)
    theirs.weight_dropout = 0.5
    report.clear()
    fused_rnn.convert(theirs, report)
    assert report[0].reason == "its attribute weight_dropout would be hidden by the option of that name"
    assert type(theirs) is nn.LSTM


@every_kind
def test_quantization_says_that_it_has_none(kind: str) -> None:
    pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")
    module, _ = make(kind, dtype=torch.float32)
    model, report = nn.Sequential(module), []
    fused_rnn.quantize_dynamic(model, report)
    assert report[0].reason == f"no int8 module has connections between its layers ({kind!r})"
    assert model[0] is module
    with pytest.warns(UserWarning, match="no int8 module has connections"):
        fused_rnn.quantize_dynamic(model)
    with pytest.raises(NotImplementedError, match="LSTM cannot be quantized: no int8 module has connections"):
        torch.ao.quantization.quantize_dynamic(model, {fused_rnn.LSTM})


@every_kind
def test_a_cell_made_of_equations(kind: str) -> None:
    """Layers of ``Recurrent`` with one layer each, and what is between them."""
    module = fused_rnn.Recurrent(fused_rnn.cells.mgu, 4, 4, 2, connections=kind)
    x = torch.randn(5, 3, 4)
    outs, read = [], x
    for layer in range(2):
        one = fused_rnn.Recurrent(fused_rnn.cells.mgu, read.shape[2], 4)
        one.load_state_dict({f"{field}_l0": getattr(module, f"{field}_l{layer}") for field in FIELDS[:4]})
        out, _ = one(read)
        if kind == "residual":
            out = out + read
        elif kind == "highway":
            t = (read @ getattr(module, f"weight_t_l{layer}").t() + getattr(module, f"bias_t_l{layer}")).sigmoid()
            out = t * out + (1 - t) * read
        outs.append(out)
        read = torch.cat([x, out], 2) if kind == "dense" else out
    torch.testing.assert_close(module(x)[0], outs[-1])
