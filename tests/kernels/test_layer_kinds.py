"""Every kind of layer is one call of the extension each way, whatever surrounds it; errors reach the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls_support import count_calls, every_layer, flat, gradients, states_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_rnn

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a layer was a call of the extension, each way."""
    return count_calls(monkeypatch)


KINDS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "plain": lambda module, x: module(x),
    "states": lambda module, x: module(x, states_of(type(module).__name__, module.bidirectional + 1, 3, 8, dtype=x.dtype)),
    "unbatched": lambda module, x: module(x[:, 0]),
    "lengths": lambda module, x: module(x, lengths=torch.tensor([4, 0, 6])),
    "reset": lambda module, x: module(x, reset=torch.rand(6, 3) < 0.3),
    "packed": lambda module, x: module(pack_padded_sequence(x, torch.tensor([4, 1, 6]), enforce_sorted=False)),
}


@every_layer
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_each_way(counted: dict[str, int], name: str, bidirectional: bool, dtype: torch.dtype, kind: str) -> None:
    module = getattr(fused_rnn, name)(5, 8, bidirectional=bidirectional, dtype=dtype)
    out, _ = KINDS[kind](module, torch.randn(6, 3, 5, dtype=dtype))
    (out if isinstance(out, Tensor) else out.data).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert counted == {"forward": 1, "backward": 1}


def test_one_call_each_way_with_a_projection_and_cell_states(counted: dict[str, int]) -> None:
    out, _, cells = fused_rnn.LSTM(5, 8, proj_size=3)(torch.randn(6, 3, 5), return_cell_states=True)
    (out.sum() + cells.sum()).backward()
    assert counted == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_one_call_for_a_step_of_a_cell(counted: dict[str, int], name: str) -> None:
    after = getattr(fused_rnn, name)(5, 8)(torch.randn(3, 5))
    flat(after)[0].sum().backward()
    assert counted == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_an_error_of_the_kernels_reaches_the_user(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("the kernels say so")

    monkeypatch.setattr(_C, f"layer_{way}", fails)
    for module, x in ((fused_rnn.LSTM(5, 8), torch.randn(6, 3, 5)), (fused_rnn.GRUCell(5, 8), torch.randn(3, 5))):
        with pytest.raises(ValueError, match="the kernels say so"):
            flat(module(x))[0].sum().backward()


def test_saved_tensors_are_asked_for_once(counted: dict[str, int]) -> None:
    """As hooks that give each away demand, and non-reentrant checkpoints."""
    torch.manual_seed(0)
    x = torch.randn(20, 10, 300, requires_grad=True)
    few_rows, frozen = fused_rnn.GRU(300, 64), fused_rnn.GRU(300, 150)
    frozen.bias_ih_l0.requires_grad_(False)
    for module in (few_rows, frozen):
        expected = gradients(module, x, Tensor.sum)
        module.zero_grad(set_to_none=True)
        x.grad = None
        checkpoint(lambda x, module=module: module(x)[0], x, use_reentrant=False).sum().backward()
        found = [x.grad, *(parameter.grad for parameter in module.parameters())]
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> int:
            kept[len(kept)] = tensor.detach().clone()
            return len(kept) - 1

        with torch.autograd.graph.saved_tensors_hooks(keep, kept.pop):
            out = module(x)[0]
        wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        hooked = iter(torch.autograd.grad(out.sum(), wanted))
        for one, other in zip(found, expected, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other)
                torch.testing.assert_close(next(hooked), other)
    assert counted["backward"] == 6


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_random_numbers_are_drawn_as_often_as_by_torch(name: str, batch_first: bool) -> None:
    """Also where only the first layer is a plain one."""
    hidden = 600 if name == "RNN" else 300
    ours = getattr(fused_rnn, name)(10, hidden, 3, dropout=0.5, batch_first=batch_first)
    theirs = getattr(nn, name)(10, hidden, 3, dropout=0.5, batch_first=batch_first)
    ours.load_state_dict(theirs.state_dict())
    for weight in ("weight_hh_l1", "weight_hh_l2"):
        # Not read as it is: its rows are not contiguous.
        getattr(ours, weight).data = getattr(ours, weight).data.t().contiguous().t()
    hx = states_of(name, 3, 2, hidden, dtype=torch.float32)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        out, states = module(torch.ones(2, 2, 10), hx)
        found.append([*flat(out, states), *torch.autograd.grad(out.sum(), [*flat(hx), *module.parameters()]), torch.rand(3)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["RNN", "GRU"])
@pytest.mark.parametrize("hx", [[torch.zeros(1, 4, 9)], "zero", 0, (None, None)], ids=str)
def test_states_of_wrong_types_raise_as_torch(name: str, hx: Any) -> None:
    x, caught = torch.randn(5, 4, 6), []
    for package in (fused_rnn, nn):
        with pytest.raises(Exception) as error:  # noqa: PT011
            getattr(package, name)(6, 9)(x, hx)
        caught.append((error.type, str(error.value)))
    assert caught[0] == caught[1]


def test_a_backward_under_a_dispatch_mode(counted: dict[str, int]) -> None:
    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    module, x = fused_rnn.LSTM(6, 13), torch.randn(9, 4, 6, requires_grad=True)
    expected = torch.autograd.grad(module(x)[0].sum(), x)[0]
    out = module(x)[0]
    with Passes():
        found = torch.autograd.grad(out.sum(), x)[0]
    torch.testing.assert_close(found, expected)
    assert counted == {"forward": 2, "backward": 2}


@pytest.mark.parametrize("length", [1 << 40, 1 << 61])
def test_memory_that_is_not_there_raises_as_torch(length: int) -> None:
    module = fused_rnn.LSTM(1, 1)
    x = torch.zeros(1).expand(length, 1, 1)
    with pytest.raises(RuntimeError, match=r"allocate memory|overflow"):
        module(x)


def test_backwards_of_the_backend_of_the_forward(counted: dict[str, int]) -> None:
    module, x = fused_rnn.LSTM(6, 13), torch.randn(9, 4, 6)
    out = module(x)[0]
    with fused_rnn.backend("reference"):
        out.sum().backward()
        module(x)[0].sum().backward()
    assert counted == {"forward": 1, "backward": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lstm, x: lstm(x[..., :-1]), r"input\.size\(-1\) must be equal to input_size"),
        (lambda lstm, x: lstm(x.double()), r"dtype \(torch.float64\) does not match weight dtype \(torch.float32\)"),
        (lambda lstm, x: lstm(x, (torch.zeros(3, 4, 9), torch.zeros(3, 4, 9))), r"Expected hidden\[0\] size \(2, 4, 9\)"),
        (lambda lstm, x: lstm(x, (torch.zeros(2, 5, 9), torch.zeros(2, 5, 9))), r"Expected hidden\[0\] size \(2, 4, 9\)"),
        (lambda lstm, x: lstm(x[:0]), "Expected sequence length to be larger than 0"),
    ],
)
def test_errors_are_torch_s(call: Callable[..., Any], message: str) -> None:
    module, x = fused_rnn.LSTM(6, 9, 2), torch.randn(5, 4, 6)
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(module, x)
