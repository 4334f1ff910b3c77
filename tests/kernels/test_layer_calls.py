"""Layers as calls of the extension: their results and gradients are torch's, in one call each way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from calls_support import count_calls, every_layer, flat, gradients, states_of
from tolerances import assert_close_to_reference
from torch import Tensor, nn

import fused_rnn

pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

# T, N, I, H: one step; one and two sequences, for many steps and for few; units and inputs across vectors; several blocks of
# inputs; more columns than rows in the input's weights.
SIZES = [
    (1, 3, 5, 7),
    (130, 1, 17, 20),
    (12, 1, 40, 21),
    (40, 2, 3, 33),
    (15, 2, 37, 16),
    (9, 50, 16, 16),
    (30, 20, 40, 48),
    (6, 4, 150, 9),
]
# Weights that outgrow the caches and rows so few that they are laid out in one turn, in two, and as a whole.
LARGE_SIZES = [
    (8, 1, 300, 500),
    (50, 1, 300, 512),
    (70, 1, 300, 512),
    (10, 2, 520, 400),
    (19, 5, 300, 500),
    (30, 6, 300, 500),
    (20, 10, 500, 400),
]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a layer was a call of the extension, each way."""
    return count_calls(monkeypatch)


def results(module: nn.Module, x: Tensor, hx: Any, seeds: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs, and the gradients of everything, from the same gradients of the outputs."""
    x = x.detach().clone().requires_grad_()
    hx = None if hx is None else [state.detach().clone().requires_grad_() for state in flat(hx)]
    given = None if hx is None else hx[0] if len(hx) == 1 else tuple(hx)
    outputs = flat(*module(x, given))
    torch.manual_seed(1)
    grads = [torch.randn(out.shape, dtype=torch.float64).to(out.dtype) for out in outputs]
    operands = [x, *(hx or []), *module.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, operands, grads)]


def check(ours: nn.Module, x: Tensor, hx: Any) -> None:
    """Forward and gradients, against torch.nn in the same dtype and in float64."""
    options = {"bias": ours.bias, "batch_first": ours.batch_first}
    theirs = getattr(nn, type(ours).__name__)(ours.input_size, ours.hidden_size, ours.num_layers, **options)
    theirs = theirs.to(x.dtype)
    theirs.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(theirs).double()
    hx64 = None if hx is None else tuple(state.double() for state in hx) if isinstance(hx, tuple) else hx.double()
    found = zip(results(ours, x, hx), results(theirs, x, hx), results(exact, x.double(), hx64), strict=True)
    for i, values in enumerate(found):
        assert_close_to_reference(*values, name=f"result {i}")


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
def test_as_torch(isa: str, counted: dict[str, int], name: str, dtype: torch.dtype, size: Any, given: bool) -> None:
    torch.manual_seed(0)
    length, batch, inputs, hidden = size
    module = getattr(fused_rnn, name)(inputs, hidden, dtype=dtype)
    hx = states_of(name, 1, batch, hidden, dtype=dtype) if given else None
    check(module, torch.randn(length, batch, inputs, dtype=dtype), hx)
    assert counted == {"forward": 1, "backward": 1}


@every_layer
@pytest.mark.parametrize("size", LARGE_SIZES, ids=str)
def test_few_rows_of_large_weights(isa: str, counted: dict[str, int], name: str, size: Any) -> None:
    torch.manual_seed(0)
    length, batch, inputs, hidden = size
    # The simple recurrence has a gate's weights only.
    hidden *= 2 if name == "RNN" else 1
    hx = states_of(name, 1, batch, hidden, dtype=torch.float32)
    check(getattr(fused_rnn, name)(inputs, hidden), torch.randn(length, batch, inputs), hx)
    assert counted == {"forward": 1, "backward": 1}


@every_layer
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
def test_stacks(counted: dict[str, int], name: str, bias: bool, batch_first: bool, given: bool) -> None:
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(5, 19, 3, bias=bias, batch_first=batch_first)
    hx = states_of(name, 3, 12 if batch_first else 7, 19, dtype=torch.float32) if given else None
    check(module, torch.randn(12, 7, 5), hx)
    assert counted == {"forward": 3, "backward": 3}


@every_layer
def test_gradients_in_chunks_of_time(counted: dict[str, int], name: str) -> None:
    torch.manual_seed(0)
    hidden = {"RNN": 512, "LSTM": 160, "GRU": 160}[name]
    module = getattr(fused_rnn, name)(8, hidden)
    x = torch.randn(175, 50, 8)
    assert x.shape[0] * x.shape[1] * module.weight_hh_l0.nbytes / hidden > 16 << 20, "more than one chunk"
    check(module, x, None)
    assert counted == {"forward": 1, "backward": 1}


@every_layer
def test_without_gradients(counted: dict[str, int], name: str) -> None:
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(6, 21, 2)
    x = torch.randn(11, 4, 6)
    recorded = flat(*module(x))
    with torch.no_grad():
        plain = flat(*module(x))
    with torch.inference_mode():
        inference = flat(*module(x))
    module.requires_grad_(False)
    frozen = flat(*module(x))
    assert counted == {"forward": 8, "backward": 0}
    for first, *others in zip(recorded, plain, inference, frozen, strict=True):
        assert first.requires_grad
        assert not any(other.requires_grad for other in others)
        assert all(torch.equal(first, other) for other in others)


@every_layer
def test_dropout_between_layers(counted: dict[str, int], name: str) -> None:
    module = getattr(fused_rnn, name)(6, 10, 2, dropout=1.0)
    x = torch.randn(5, 3, 6)
    silent = copy.deepcopy(module)
    with torch.no_grad():
        silent.weight_ih_l1.zero_()
    assert torch.equal(module(x)[0], silent(x)[0]), "nothing of the first layer comes through"
    assert not torch.equal(module.eval()(x)[0], silent.eval()(x)[0])
    assert counted["forward"] == 8


@every_layer
def test_frozen_parts(counted: dict[str, int], name: str) -> None:
    """Where only some gradients are wanted, they are what they are where all are."""
    torch.manual_seed(0)
    module, x = getattr(fused_rnn, name)(6, 13), torch.randn(9, 4, 6, requires_grad=True)
    everything = gradients(module, x, lambda out: out.square().sum())
    names = ["input", *(parameter for parameter, _ in module.named_parameters())]
    for kept in [("input",), ("weight_hh_l0",), ("bias_ih_l0",), ("bias_hh_l0",), ("input", "weight_ih_l0"), tuple(names[1:])]:
        x.requires_grad_("input" in kept)
        for parameter, value in module.named_parameters():
            value.requires_grad_(parameter in kept)
        for key, found, expected in zip(names, gradients(module, x, lambda out: out.square().sum()), everything, strict=True):
            if key in kept:
                torch.testing.assert_close(found, expected)
            else:
                assert found is None
    assert counted == {"forward": 7, "backward": 7}


@every_layer
def test_gradients_of_other_layouts(counted: dict[str, int], name: str) -> None:
    torch.manual_seed(0)
    module, x = getattr(fused_rnn, name)(6, 13), torch.randn(9, 4, 6, requires_grad=True)
    expected = gradients(module, x, lambda out: (out * torch.ones_like(out)).sum())
    for loss in (Tensor.sum, lambda out: out.mT.contiguous().sum(), lambda out: out.resolve_neg().neg().neg().sum()):
        for one, other in zip(gradients(module, x, loss), expected, strict=True):
            torch.testing.assert_close(one, other)
    assert counted == {"forward": 4, "backward": 4}


@every_layer
def test_of_the_states_alone(name: str, counted: dict[str, int]) -> None:
    """No gradient of the output; one state's gradient, not contiguous; states that want none."""
    torch.manual_seed(0)
    ours, theirs = getattr(fused_rnn, name)(6, 13), getattr(nn, name)(6, 13)
    theirs.load_state_dict(ours.state_dict())
    x, hx = torch.randn(9, 4, 6), states_of(name, 1, 4, 13, dtype=torch.float32)
    found = []
    for module in (ours, theirs):
        last = flat(module(x, hx)[1])[-1]
        found.append(torch.autograd.grad(last.expand(3, 4, 13).sum(), [flat(hx)[0], *module.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counted == {"forward": 1, "backward": 1}


@every_layer
@pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
def test_second_gradients(counted: dict[str, int], name: str, given: bool) -> None:
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(3, 4, dtype=torch.float64)
    hx = states_of(name, 1, 2, 4) if given else None

    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        names = dict(zip([key for key, _ in module.named_parameters()], parameters, strict=True))
        return tuple(flat(*torch.func.functional_call(module, names, (x, hx))))

    operands = (torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True), *module.parameters())
    assert torch.autograd.gradcheck(function, operands, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, operands)
    assert counted["forward"] > 0


@every_layer
def test_an_output_that_was_changed_in_place(name: str) -> None:
    torch.manual_seed(0)
    module, x = getattr(fused_rnn, name)(6, 13), torch.randn(9, 4, 6, requires_grad=True)
    expected = gradients(module, x, lambda out: (2 * out).square().sum())
    for one, other in zip(gradients(module, x, lambda out: out.mul_(2).square().sum()), expected, strict=True):
        torch.testing.assert_close(one, other)
    out = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_layer
def test_the_same_bits_twice(name: str) -> None:
    torch.manual_seed(0)
    module, x = getattr(fused_rnn, name)(24, 40), torch.randn(30, 20, 24)
    for one, other in zip(results(module, x, None), results(module, x, None), strict=True):
        assert torch.equal(one, other)
    out = module(x.requires_grad_())[0]
    first = torch.autograd.grad(out.sum(), module.parameters(), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(out.sum(), module.parameters()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("length", [2, 7, 8])
def test_the_fewest_rows_of_large_weights(counted: dict[str, int], length: int) -> None:
    torch.manual_seed(0)
    check(fused_rnn.LSTM(512, 512), torch.randn(length, 1, 512), None)
    assert counted == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("length", [20, 900], ids=["one stretch of time", "several"])
def test_more_columns_of_inputs_than_rows_of_weights(counted: dict[str, int], length: int) -> None:
    """The gradient of the input's weights is summed as its transpose."""
    torch.manual_seed(0)
    hidden = 40 if length == 20 else 250
    check(fused_rnn.RNN(300, hidden), torch.randn(length, 20, 300), None)
    assert counted == {"forward": 1, "backward": 1}
