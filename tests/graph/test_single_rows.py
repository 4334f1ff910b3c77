"""Maps over the gradients of few rows, and tensors in unusual layouts: every backend reads them, whatever their strides are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vjp, vmap

import fused_rnn
from tests.calls_support import flat

# (class, options, shape of the input)
CALLS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "RNNCell": ("RNNCell", {}, (3,)),
    "GRUCell": ("GRUCell", {}, (1, 3)),
    "LSTMCell": ("LSTMCell", {}, (3,)),
    "LSTMCell of two": ("LSTMCell", {}, (2, 3)),
    "RNN": ("RNN", {}, (1, 1, 3)),
    "GRU, unbatched": ("GRU", {}, (1, 3)),
    "LSTM": ("LSTM", {"batch_first": True}, (1, 1, 3)),
    "LSTM of two directions": ("LSTM", {"bidirectional": True, "num_layers": 2}, (1, 1, 3)),
    "LSTM with a projection": ("LSTM", {"proj_size": 2}, (1, 1, 3)),
    "GRU of two steps": ("GRU", {}, (2, 1, 3)),
    "RNN of two sequences": ("RNN", {}, (1, 2, 3)),
    "GRU of one unit": ("GRU", {"hidden_size": 1}, (1, 1, 3)),
}
calls = pytest.mark.parametrize("call", CALLS)


def made(call: str) -> tuple[nn.Module, nn.Module, Tensor]:
    name, options, shape = CALLS[call]
    options = {"hidden_size": 4, "dtype": torch.float64} | options
    ours, theirs = getattr(fused_rnn, name)(3, **options), getattr(nn, name)(3, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, torch.randn(shape, dtype=torch.float64)


def is_grads_batched(module: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    outs = flat(module(x))
    torch.manual_seed(1)
    grads = [torch.randn(5, *out.shape, dtype=out.dtype) for out in outs]
    return torch.autograd.grad(outs, [x, *module.parameters()], grads, is_grads_batched=True)


def is_grads_batched_over_one(module: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    out = flat(module(x))[0]
    return torch.autograd.grad(out, x, torch.ones(1, *out.shape, dtype=out.dtype), is_grads_batched=True)


def jacobian(module: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.jacobian(lambda x: flat(module(x))[0], x, vectorize=True)


def jacobian_of_states(module: nn.Module, x: Tensor) -> Any:
    return jacrev(lambda x: flat(module(x))[-1])(x)


def jacobian_of_parameters(module: nn.Module, x: Tensor) -> Any:
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    return list(jacrev(lambda p: flat(functional_call(module, p, (x,)))[0])(parameters).values())


def forward_jacobian(module: nn.Module, x: Tensor) -> Any:
    return jacfwd(lambda x: flat(module(x))[0])(x)


def mapped_pull(module: nn.Module, x: Tensor) -> Any:
    """Over gradients that have no stride themselves."""
    out, pull = vjp(lambda x: flat(module(x))[0], x)
    return vmap(pull)(torch.ones(1, dtype=out.dtype).expand(3, *out.shape))


MAPS: list[Callable[[nn.Module, Tensor], Any]] = [
    is_grads_batched,
    is_grads_batched_over_one,
    jacobian,
    jacobian_of_states,
    jacobian_of_parameters,
    forward_jacobian,
    mapped_pull,
]


@calls
@pytest.mark.parametrize("function", MAPS, ids=lambda function: function.__name__)
def test_maps_over_gradients(function: Callable[[nn.Module, Tensor], Any], call: str, backend: str) -> None:
    ours, theirs, x = made(call)
    if function is forward_jacobian:
        # torch.nn's fused layers have no forward mode.
        torch.testing.assert_close(forward_jacobian(ours, x), jacobian(theirs, x))
        return
    torch.testing.assert_close(function(ours, x), function(theirs, x))


def without_strides(tensor: Tensor) -> Tensor:
    """Any strides of dimensions of size 1, which mean nothing."""
    strides = [7 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


def turned(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]


def zero_strides_of_ones(tensor: Tensor) -> Tensor:
    return tensor.as_strided(
        tensor.shape, [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    )


LAYOUTS: list[Callable[[Tensor], Tensor]] = [without_strides, turned, every_second, zero_strides_of_ones]


@pytest.mark.parametrize(
    "call", ["LSTMCell of two", "GRUCell", "LSTM", "LSTM of two directions", "GRU of two steps", "GRU of one unit"]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(layout: Callable[[Tensor], Tensor], call: str, backend: str) -> None:
    """Input, states, weights and the gradients of the results."""
    ours, theirs, x = made(call)
    shape = flat(theirs(x))[-1].shape
    states = tuple(torch.randn(shape, dtype=x.dtype) for _ in range(2 if "LSTM" in call else 1))
    torch.manual_seed(1)
    weights = {name: torch.randn_like(value) for name, value in theirs.named_parameters()}

    def run(module: nn.Module, layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *states, *weights.values())]
        given, *rest = [layout(leaf) for leaf in leaves]
        hx, replaced = rest[: len(states)], dict(zip(weights, rest[len(states) :], strict=True))
        results = flat(functional_call(module, replaced, (given, tuple(hx) if len(hx) > 1 else hx[0])))
        torch.manual_seed(2)
        grads = [layout(torch.randn_like(result)) for result in results]
        return [*results, *torch.autograd.grad(results, leaves, grads)]

    torch.testing.assert_close(run(ours, layout), run(theirs, lambda tensor: tensor))
