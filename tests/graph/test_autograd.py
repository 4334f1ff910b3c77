"""The layer around the kernels: chunks of time, repeated and partial backwards, determinism, NaN and Inf."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn.kernels.by_walk import backward as by_walk_backward
from fused_rnn.kernels.by_walk import forward as by_walk_forward

NAMES = ("RNN", "LSTM", "GRU")
each = pytest.mark.parametrize("name", NAMES)


def make(name: str, dtype: torch.dtype = torch.float64, **options: object) -> torch.nn.Module:
    module: torch.nn.Module = getattr(fused_rnn, name)(5, 19, bidirectional=True, dtype=dtype, **options)
    return module


def outputs(module: torch.nn.Module, input: object) -> list[Tensor]:
    out, states = module(input)
    return [
        getattr(out, "data", out) if not isinstance(out, Tensor) else out,
        *(states if isinstance(states, tuple) else (states,)),
    ]


def gradients(module: torch.nn.Module, x: Tensor, lengths: list[int] | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    input = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    given = outputs(module, input)
    loss = sum((value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum() for value in given)
    return [value.detach() for value in given] + list(torch.autograd.grad(loss, [x, *module.parameters()]))


def set_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for module in (by_walk_forward, by_walk_backward):
        monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
        monkeypatch.setattr(module, "_CHUNK_ROWS", rows)


@pytest.mark.parametrize(("name", "projection"), [("RNN", 0), ("LSTM", 0), ("LSTM", 7), ("GRU", 0)])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "packed"])
def test_chunks_of_time_change_nothing(
    name: str, ragged: bool, projection: int, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    module = make(name, **({"proj_size": projection} if projection else {}))
    x = torch.randn(11, 4, 5, dtype=torch.float64)
    lengths = [3, 11, 1, 8] if ragged else None
    whole = gradients(module, x, lengths)
    with torch.no_grad():
        inferred = outputs(module, x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False))
    for rows in (1, 8, 20):
        set_chunks(monkeypatch, rows)
        for actual, expected in zip(gradients(module, x, lengths), whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            again = outputs(module, x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False))
        for actual, expected in zip(again, inferred, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_chunks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """One rounding per stored value, however the walk is cut: the states between chunks stay in float32."""
    module, x = make(name, dtype), torch.randn(11, 4, 5, dtype=dtype)
    whole = gradients(module, x)
    set_chunks(monkeypatch, 8)
    for actual, expected in zip(gradients(module, x), whole, strict=True):
        # Sums over chunks round in another order before they are stored: the last bit of the storage may differ.
        torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_packed(name: str, dtype: torch.dtype, backend: str) -> None:
    """Against float64 from the same rounded numbers, as near as one rounding per stored value allows."""
    module = make(name, dtype)
    exact = make(name)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(6, 3, 5, dtype=dtype)
    for actual, expected in zip(gradients(module, x, [4, 6, 1]), gradients(exact, x.double(), [4, 6, 1]), strict=True):
        scale = expected.abs().max().clamp(min=1)
        assert (actual.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * scale


@each
@pytest.mark.parametrize("lengths", [None, [4, 6, 1]], ids=["dense", "packed"])
def test_output_may_be_changed_in_place(name: str, lengths: list[int] | None, backend: str) -> None:
    """Without a graph, and with one: the gradients are those of the same change on a copy, to the bit."""
    module, x = make(name), torch.randn(6, 3, 5, dtype=torch.float64)
    input = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    with torch.no_grad():
        outputs(module, input)[0].relu_()
    found = []
    for copied in (True, False):
        leaf = x.clone().requires_grad_()
        input = leaf if lengths is None else pack_padded_sequence(leaf, lengths, enforce_sorted=False)
        out = outputs(module, input)[0]
        out = out.clone() if copied else out
        out.mul_(2)
        out[0] += 1
        torch.relu_(out)
        found.append(torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()], create_graph=copied))
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(actual, expected)


@each
def test_second_gradient_after_a_change_in_place(name: str, backend: str) -> None:
    module, x = make(name), torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for copied in (True, False):
        out = outputs(module, x)[0]
        out = (out.clone() if copied else out).mul_(2)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), [x, *module.parameters()])))
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(actual, expected)


@each
def test_output_changed_in_place_under_saved_tensor_hooks(name: str) -> None:
    """What the hooks keep is read, and the memory of the output is not held beside them."""
    module, x = make(name), torch.randn(6, 3, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad((outputs(module, x)[0] * 2).sum(), module.weight_hh_l0)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.clone())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = outputs(module, x)[0]
    (actual,) = torch.autograd.grad(out.mul_(2).sum(), module.weight_hh_l0)
    assert torch.equal(actual, expected)
    assert any(torch.equal(tensor, out.detach().view_as(tensor) / 2) for tensor in kept if tensor.numel() == out.numel())


@each
def test_weights_changed_in_place_raise(name: str, backend: str) -> None:
    module, x = make(name), torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    out = outputs(module, x)[0]
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each
def test_biases_may_change_before_the_backward(name: str, backend: str) -> None:
    """No first gradient reads a bias, as in torch.nn; what reads one raises."""
    module, x = make(name), torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(outputs(module, x)[0].sum(), [x, *module.parameters()])
    out = outputs(module, x)[0]
    with torch.no_grad():
        module.bias_ih_l0.add_(1)
    actual = torch.autograd.grad(out.sum(), [x, *module.parameters()], retain_graph=True)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"inplace operation: a bias of shape .* expected version"):
        torch.autograd.grad(out.sum(), x, create_graph=True, retain_graph=True)
    out.detach().zero_()
    with pytest.raises(RuntimeError, match=r"inplace operation: a bias of shape"):
        out.sum().backward()


@each
def test_vjp_after_the_function_returned(name: str, backend: str) -> None:
    module, x = make(name), torch.randn(6, 3, 5, dtype=torch.float64)
    out, pull = torch.func.vjp(lambda input: outputs(module, input)[0], x)
    (actual,) = pull(torch.ones_like(out))
    input = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(outputs(module, input)[0].sum(), input)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@each
def test_second_backward_sees_the_same(name: str, backend: str) -> None:
    module, x = make(name), torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    loss = sum(value.square().sum() for value in outputs(module, x))
    inputs = [x, *module.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    third = torch.autograd.grad(loss, inputs, create_graph=True)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)
        assert c.requires_grad


@each
def test_only_what_is_asked_for(name: str, backend: str) -> None:
    """Every subset of frozen tensors: the gradients that remain are those of the whole."""
    module, x = make(name), torch.randn(6, 3, 5, dtype=torch.float64)
    names = [key for key, _ in module.named_parameters()]
    full = dict(zip(["x", *names], gradients(module, x)[-1 - len(names) :], strict=True))
    for kept in (["x"], [names[0]], [names[1]], [names[2]], [names[3]], [names[1], names[-1]]):
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(key in kept)
        input = x.clone().requires_grad_("x" in kept)
        given = outputs(module, input)
        loss = sum((value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum() for value in given)
        asked = [input if key == "x" else module.get_parameter(key) for key in kept]
        for key, actual in zip(kept, torch.autograd.grad(loss, asked), strict=True):
            torch.testing.assert_close(actual, full[key], rtol=1e-12, atol=1e-12)


@each
def test_gradient_through_one_output_alone(name: str, backend: str) -> None:
    theirs = getattr(torch.nn, name)(5, 19, bidirectional=True, dtype=torch.float64)
    ours = make(name)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    for index in range(3 if name == "LSTM" else 2):
        actual = torch.autograd.grad(outputs(ours, x)[index].sum(), [x, *ours.parameters()])
        expected = torch.autograd.grad(outputs(theirs, x)[index].sum(), [x, *theirs.parameters()])
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@each
def test_same_bits_at_every_run(name: str, backend: str) -> None:
    module, x = make(name, torch.float32), torch.randn(40, 30, 5)
    first = gradients(module, x)
    for _ in range(3):
        for a, b in zip(gradients(module, x), first, strict=True):
            assert torch.equal(a, b)


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_flow_as_in_torch(name: str, value: float, backend: str) -> None:
    theirs = getattr(torch.nn, name)(5, 19)
    ours = copy.deepcopy(theirs)
    fused_rnn.convert(ours)
    x = torch.randn(6, 3, 5)
    x[2, 1, 3] = value
    for actual, expected in zip(outputs(ours, x), outputs(theirs, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@each
def test_gradients_do_not_share_memory(name: str, backend: str) -> None:
    """bias_ih and bias_hh have the same gradient in most cells, but each parameter owns its own."""
    module = make(name)
    sum(value.sum() for value in outputs(module, torch.randn(6, 3, 5, dtype=torch.float64))).backward()
    pointers = [parameter.grad.data_ptr() for parameter in module.parameters() if parameter.grad is not None]
    assert len(set(pointers)) == len(list(module.parameters()))
