"""``coupled=True``: the LSTM whose forget gate is 1 − i, against torch.nn's with σ(−i) there; and the option itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import Weights, functional

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 3, "bidirectional": True},
    "projected": {"proj_size": 4, "num_layers": 2},
    "no_bias": {"bias": False, "bidirectional": True},
    "batch_first": {"batch_first": True},
}


def of_torch(module: Any, theirs: Any) -> dict[str, Tensor]:
    """Torch's parameters from those of a coupled module, as functions of them: σ(−a) is 1 − σ(a)."""
    found = {}
    for name, value in module.named_parameters():
        if name.startswith("weight_hr"):
            found[name] = value
        else:
            i, g, o = value.chunk(3)
            found[name] = torch.cat([i, -i, g, o])
    assert {name: value.shape for name, value in theirs.named_parameters()} == {
        name: value.shape for name, value in found.items()
    }
    return found


def results(module: Any, parameters: dict[str, Tensor], leaves: list[Tensor], *args: Any) -> list[Tensor]:
    """Outputs, last states, and gradients of all leaves."""
    out, states = torch.func.functional_call(module, parameters, args)
    out = pad_packed_sequence(out)[0] if isinstance(out, tuple) else out
    loss = out.sin().sum() + sum(state.cos().sum() for state in states)
    return [out, *states, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("hidden", [1, 16, 35])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers(options: dict[str, Any], hidden: int, backend: str) -> None:
    if options.get("proj_size", 0) >= hidden:
        options = {**options, "proj_size": 0}
    ours = fused_rnn.LSTM(5, hidden, **options, dtype=torch.float64, coupled=True)
    theirs = torch.nn.LSTM(5, hidden, **options, dtype=torch.float64)
    x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *ours.parameters()]
    expected = results(theirs, of_torch(ours, theirs), leaves, x)
    torch.testing.assert_close(results(ours, dict(ours.named_parameters()), leaves, x), expected)


def test_packed_lengths_and_states(backend: str) -> None:
    ours = fused_rnn.LSTM(5, 20, num_layers=2, bidirectional=True, dtype=torch.float64, coupled=True)
    theirs = torch.nn.LSTM(5, 20, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(4, 4, 20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([6, 4, 3, 1])
    leaves = [x, *hx, *ours.parameters()]
    expected = results(theirs, of_torch(ours, theirs), leaves, pack_padded_sequence(x, lengths), hx)
    actual = results(ours, dict(ours.named_parameters()), leaves, pack_padded_sequence(x, lengths), hx)
    torch.testing.assert_close(actual, expected)
    out, _, cells = ours(x, hx, lengths=lengths, return_cell_states=True)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(cells[2, 2, :20], ours(x[:3], hx)[1][1][2, 2])


def test_resets(backend: str) -> None:
    """As the pieces between them."""
    ours = fused_rnn.LSTM(5, 20, dtype=torch.float64, coupled=True)
    x, reset = torch.randn(6, 1, 5, dtype=torch.float64), torch.tensor([[0], [0], [1], [0], [1], [0]], dtype=torch.bool)
    out, states = ours(x, reset=reset)
    pieces = [ours(piece) for piece in x.split(2)]
    torch.testing.assert_close((out, states), (torch.cat([piece[0] for piece in pieces]), pieces[-1][1]))


def test_cells_in_a_loop(backend: str) -> None:
    layer = fused_rnn.LSTM(5, 20, dtype=torch.float64, coupled=True)
    cell = fused_rnn.LSTMCell(5, 20, dtype=torch.float64, coupled=True)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x, states = torch.randn(6, 3, 5, dtype=torch.float64), None
    for step in x:
        states = cell(step, states)
    assert states is not None
    expected = layer(x)[1]
    torch.testing.assert_close(list(states), [state[0] for state in expected])
    by_cell = torch.autograd.grad(states[0].sin().sum(), list(cell.parameters()))
    torch.testing.assert_close(by_cell, torch.autograd.grad(expected[0].sin().sum(), list(layer.parameters())))


def test_second_derivatives_transforms_and_compiling() -> None:
    module = fused_rnn.LSTM(2, 3, dtype=torch.float64, coupled=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)
    many = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(lambda x: module(x)[0])(many), torch.stack([module(each)[0] for each in many]))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    expected = module(x)
    torch.testing.assert_close(compiled, expected)
    grads = [torch.autograd.grad(result[0].sin().sum(), list(module.parameters())) for result in (compiled, expected)]
    torch.testing.assert_close(*grads)


def test_functions() -> None:
    layer, cell = fused_rnn.LSTM(5, 4, coupled=True), fused_rnn.LSTMCell(5, 4, coupled=True)
    x = torch.randn(6, 3, 5)
    torch.testing.assert_close(functional.lstm(x, [Weights(*layer.parameters())], coupled=True), layer(x))
    torch.testing.assert_close(functional.lstm_cell(x[0], Weights(*cell.parameters()), coupled=True), cell(x[0]))


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_what_a_module_keeps(name: str) -> None:
    module = getattr(fused_rnn, name)(3, 5, coupled=True, recurrent_init="orthogonal")
    x = torch.randn(2, 3)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        torch.testing.assert_close(other(x), module(x))
        assert other.coupled
    assert repr(module) == f"{name}(3, 5, recurrent_init='orthogonal', coupled=True)"
    assert "coupled" not in vars(getattr(fused_rnn, name)(3, 5))
    # Each gate's block is a rotation.
    recurrent = module.weight_hh if name == "LSTMCell" else module.weight_hh_l0
    for block in recurrent.chunk(3):
        torch.testing.assert_close(block @ block.t(), torch.eye(5))
    before = recurrent.detach().clone()
    module.reset_parameters()
    assert recurrent.shape == (15, 5)
    assert not torch.equal(recurrent, before)


def test_what_is_refused() -> None:
    for value in (0, None, "no"):
        for cls in (fused_rnn.LSTM, fused_rnn.LSTMCell):
            with pytest.raises(TypeError, match="coupled: expected a bool, got"):
                cls(3, 2, coupled=value)  # type: ignore[arg-type]
    for cls in (fused_rnn.LSTM, fused_rnn.LSTMCell):
        with pytest.raises(ValueError, match=r"expected None with coupled=True, whose forget gate is 1 - i, got 1\.0"):
            cls(3, 2, coupled=True, forget_bias=1.0)
        with pytest.raises(ValueError, match="forget_bias: expected None for a module without a forget gate"):
            fused_rnn.init_(cls(3, 2, coupled=True), forget_bias=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'coupled'"):
        fused_rnn.GRU(3, 2, coupled=True)
    ours = torch.nn.ModuleList([fused_rnn.LSTM(3, 2, coupled=True), fused_rnn.LSTMCell(3, 2, coupled=True)])
    report: list[fused_rnn.Conversion] = []
    fused_rnn.revert(ours, report)
    assert [each.reason for each in report] == ["torch.nn has no LSTM with coupled=True"] * 2
    fused_rnn.quantize_dynamic(ours, report=report)
    assert [each.reason for each in report[2:]] == ["no int8 kernel has coupled=True"] * 2
