"""What may be done with results in place, and how they lie in memory: as with torch.nn, for every module and option."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn

LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in flat(item)]


def options(name: str) -> Iterator[dict[str, Any]]:
    projections = (0, 2) if name == "LSTM" else (0,)
    for bidirectional, batch_first, proj_size, layers in itertools.product((False, True), (False, True), projections, (1, 2)):
        chosen = {"bidirectional": bidirectional, "batch_first": batch_first, "num_layers": layers}
        if proj_size:
            chosen["proj_size"] = proj_size
        yield chosen
        if layers > 1:
            yield chosen | {"dropout": 0.5}


def inputs(batch_first: bool) -> dict[str, Any]:
    x = torch.randn(2, 5, 3) if batch_first else torch.randn(5, 2, 3)
    return {
        "batched": x,
        "one step": x[:, :1] if batch_first else x[:1],
        "unbatched": torch.randn(5, 3),
        "packed": pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=batch_first),
        "packed, unsorted": pack_padded_sequence(x, torch.tensor([3, 5]), batch_first=batch_first, enforce_sorted=False),
    }


def add_without_grad(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


def detach_(tensor: Tensor) -> None:
    assert not tensor.detach_().requires_grad


def trained(tensor: Tensor) -> None:
    """Changed in place and trained through."""
    if tensor.requires_grad:
        tensor.mul_(2).sum().backward()


def part_trained(tensor: Tensor) -> None:
    if tensor.requires_grad:
        tensor[0].mul_(2)
        tensor.sum().backward()


# Each is done to a result that was made with gradients, and to one made without.
DEEDS: dict[str, Callable[[Tensor], Any]] = {
    "detach_": detach_,
    "requires_grad_": lambda tensor: tensor.requires_grad_(),
    "add_": lambda tensor: tensor.add_(1),
    "add_ of what requires gradients": lambda tensor: tensor.add_(torch.ones(1, requires_grad=True)),
    "add_ without grad": add_without_grad,
    "mul_ and backward": trained,
    "mul_ of a part and backward": part_trained,
    "data": lambda tensor: setattr(tensor, "data", torch.zeros(1)),
}


def failure(deed: Callable[[Tensor], Any], tensor: Tensor) -> str | None:
    try:
        deed(tensor)
    except RuntimeError as error:
        return str(error)
    return None


def compare(ours: nn.Module, theirs: nn.Module, arguments: tuple[Any, ...], what: str) -> None:
    ours.load_state_dict(theirs.state_dict())
    for index, grad in itertools.product(range(len(flat(theirs(*arguments)))), (True, False)):

        def result(module: nn.Module, index: int = index, grad: bool = grad) -> Tensor:
            with torch.set_grad_enabled(grad):
                return flat(module(*arguments))[index]

        where = f"{what}, result {index}, grad {grad}"
        actual, expected = result(ours), result(theirs)
        assert actual.shape == expected.shape, where
        assert actual.requires_grad == expected.requires_grad, where
        # torch.nn gives a view of what oneDNN gave where that computes it. No view allows all that a view does.
        assert expected._is_view() or not actual._is_view(), where
        strides = [
            [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
            for tensor in (actual, expected)
        ]
        assert strides[0] == strides[1], where
        assert actual.is_contiguous() == expected.is_contiguous(), where
        for name, deed in DEEDS.items():
            if failure(deed, result(theirs)) is None:
                assert failure(deed, result(ours)) is None, f"{where}: {name}"


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch.nn's of projections, without oneDNN
        for chosen in options(name):
            if backend != "cpp" and chosen["num_layers"] > 1:
                # Layers follow one another in the same way on every backend.
                continue
            ours, theirs = getattr(fused_rnn, name)(3, 4, **chosen), getattr(nn, name)(3, 4, **chosen)
            for kind, x in inputs(chosen["batch_first"]).items():
                compare(ours, theirs, (x,), f"{name} {chosen} {kind}")


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (3,)], ids=["batched", "of one", "unbatched"])
def test_cells(name: str, shape: tuple[int, ...], backend: str) -> None:
    state = torch.randn(*shape[:-1], 4)
    for states in ((), ((state, state + 1) if name == "LSTMCell" else state,)):
        ours, theirs = getattr(fused_rnn, name)(3, 4), getattr(nn, name)(3, 4)
        compare(ours, theirs, (torch.randn(shape), *states), f"{name} {len(states)}")


@pytest.mark.parametrize("name", LAYERS)
def test_batch_first_takes_the_plain_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results change places in place, which is no change of their values: nothing is computed once more."""
    module, x = getattr(fused_rnn, name)(3, 4, 2, bidirectional=True, batch_first=True), torch.randn(2, 5, 3)
    expected = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    from fused_rnn.graph import functions

    calls: list[Any] = []
    general = functions._back_in_general
    monkeypatch.setattr(functions, "_back_in_general", lambda *arguments: calls.append(arguments) or general(*arguments))
    out = module(x)[0]
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), list(module.parameters())), expected)
    assert not calls
    # A change of the values is seen as before.
    doubled = torch.autograd.grad(module(x)[0].mul_(2).square().sum(), list(module.parameters()))
    assert len(calls) == 1
    torch.testing.assert_close(doubled, tuple(4 * grad for grad in expected))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[3, 5], [5, 5]])
def test_what_torch_nn_has_not(lengths: list[int], batch_first: bool, backend: str) -> None:
    """A padded batch with lengths, and the cell states of every step, are no views either."""
    module, x = fused_rnn.LSTM(3, 4, batch_first=batch_first, bidirectional=True), inputs(batch_first)["batched"]
    given = {"lengths": torch.tensor(lengths), "return_cell_states": True}
    expected = torch.autograd.grad([r.sum() for r in flat(module(x, **given))], list(module.parameters()))
    for index in range(4):
        assert not flat(module(x, **given))[index]._is_view()
        for name in ("detach_", "add_ without grad", "add_ of what requires gradients"):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    result = flat(module(x, **given))[index]
                DEEDS[name](result)
    results = flat(module(x, **given))
    for result in results:
        result.mul_(2)
    grads = torch.autograd.grad([result.sum() for result in results], list(module.parameters()))
    torch.testing.assert_close(grads, tuple(2 * grad for grad in expected))
