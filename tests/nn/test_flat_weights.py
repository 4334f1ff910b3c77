"""``_flat_weights`` assigned from outside: torch.nn computes with the list, and so do the fused layers, by the same rules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_rnn

layers = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    ours, theirs = getattr(fused_rnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(module: nn.Module, input: Tensor) -> list[Tensor]:
    out, states = module(input)
    return [out, *(states if isinstance(states, tuple) else (states,))]


def assign(module: nn.Module, others: list[Tensor]) -> None:
    module._flat_weights = list(others)


def assign_an_item(module: nn.Module, others: list[Tensor]) -> None:
    module._flat_weights[1] = others[1]


def attribute_after_item(module: nn.Module, others: list[Tensor]) -> None:
    """The item goes: all is listed anew."""
    module._flat_weights[1] = others[1]
    module.weight_ih_l0 = nn.Parameter(others[0].clone())


def same_attribute_after_item(module: nn.Module, others: list[Tensor]) -> None:
    module._flat_weights[1] = others[1]
    module.weight_hh_l0 = nn.Parameter(others[1] * 2)


def item_after_attribute(module: nn.Module, others: list[Tensor]) -> None:
    module.weight_ih_l0 = nn.Parameter(others[0].clone())
    # torch.nn notices the attribute at the next call, and loses an item that came in between; the fused layers do not.
    run(module, torch.zeros(1, 1, 3))
    module._flat_weights[1] = others[1]


def parameter_behind_it(module: nn.Module, others: list[Tensor]) -> None:
    """What torch's functions swap in ``_parameters`` is noticed, and ends the list."""
    module._flat_weights[1] = others[1]
    module._parameters["weight_ih_l0"] = nn.Parameter(others[0].clone())


def loaded_after(module: nn.Module, others: list[Tensor]) -> None:
    """The parameters are the same tensors with other values."""
    module._flat_weights[1] = others[1]
    module.load_state_dict(dict(zip(module._flat_weights_names, others, strict=True)))


def loaded_by_assignment(module: nn.Module, others: list[Tensor]) -> None:
    module._flat_weights[1] = others[1]
    module.load_state_dict({key: value * 2 for key, value in module.state_dict().items()}, assign=True)


def cast_after(module: nn.Module, others: list[Tensor]) -> None:
    """``_apply`` goes over the parameters and lists them anew."""
    module._flat_weights[1] = others[1]
    module.double().float()
    module._flat_weights[0] = others[0]


def deleted_after(module: nn.Module, others: list[Tensor]) -> None:
    module._flat_weights[1] = others[1]
    del module.weight_hh_l0


def plain_tensor_for_a_parameter(module: nn.Module, others: list[Tensor]) -> None:
    del module.weight_hh_l0
    module.weight_hh_l0 = others[1]
    run(module, torch.zeros(1, 1, 3))
    module._flat_weights[0] = others[0]


EDITS: list[Callable[[nn.Module, list[Tensor]], None]] = [
    assign,
    assign_an_item,
    attribute_after_item,
    same_attribute_after_item,
    item_after_attribute,
    parameter_behind_it,
    loaded_after,
    loaded_by_assignment,
    cast_after,
    deleted_after,
    plain_tensor_for_a_parameter,
]


@layers
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_as_torch_nn(name: str, edit: Callable[[nn.Module, list[Tensor]], None]) -> None:
    ours, theirs = pair(name, 3, 4, 2, bidirectional=True)
    others = [torch.randn_like(weight) for weight in theirs._flat_weights]
    input = torch.randn(5, 2, 3)
    before = run(ours, input)
    for module in (ours, theirs):
        edit(module, others)
    torch.testing.assert_close(run(ours, input), run(theirs, input))
    assert not torch.allclose(run(ours, input)[0], before[0])
    # A copy and a pickle compute the same.
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(run(made, input), run(theirs, input))


@layers
def test_an_item_counts_from_the_first_call_on(name: str) -> None:
    """Where torch.nn loses it: an attribute was assigned before, and no call was made in between."""
    ours, theirs = pair(name, 3, 4)
    input, item = torch.randn(5, 2, 3), torch.randn_like(ours.weight_hh_l0)
    theirs.weight_hh_l0 = nn.Parameter(item)
    ours.weight_ih_l0 = nn.Parameter(ours.weight_ih_l0.detach().clone())
    ours._flat_weights[1] = item
    torch.testing.assert_close(run(ours, input), run(theirs, input))


@layers
def test_gradients_reach_what_was_assigned(name: str) -> None:
    """A low-rank adapter, and a hyper-network whose weights are computed in every call."""
    ours, theirs = pair(name, 3, 4)
    down, up = torch.randn(2, 4), torch.randn(ours.weight_hh_l0.shape[0], 2)
    input = torch.randn(5, 2, 3)
    found = []
    for module in (ours, theirs):
        adapters = [down.clone().requires_grad_(), up.clone().requires_grad_()]
        for _ in range(2):
            module._flat_weights[1] = module.weight_hh_l0 + adapters[1] @ adapters[0]
            run(module, input)[0].square().sum().backward()
        found.append([adapter.grad for adapter in adapters] + [parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*found)


@layers
def test_functional_call_for_one_call(name: str) -> None:
    ours, theirs = pair(name, 3, 4)
    input, item = torch.randn(5, 2, 3), torch.randn_like(ours.weight_hh_l0)
    replaced = {key: torch.randn_like(value) for key, value in ours.named_parameters()}
    for module in (ours, theirs):
        module._flat_weights[1] = item
    results = [torch.func.functional_call(module, replaced, (input,))[0] for module in (ours, theirs)]
    torch.testing.assert_close(*results)
    # An ensemble leaves nothing of its own in the module.
    stacked = {key: torch.stack((value, value * 2)) for key, value in replaced.items()}
    out = torch.func.vmap(lambda weights: torch.func.functional_call(ours, weights, (input,))[0])(stacked)
    torch.testing.assert_close(out[0], results[0])
    assert ours._flat_weights[1] is item


@layers
def test_looking_changes_nothing(name: str) -> None:
    ours, theirs = pair(name, 3, 4)
    assert all(one is getattr(ours, key) for one, key in zip(ours._flat_weights, ours._flat_weights_names, strict=True))
    parameters = dict(ours.named_parameters())
    ours.weight_hh_l0 = nn.Parameter(torch.randn_like(ours.weight_hh_l0))
    assert ours._flat_weights[1] is ours.weight_hh_l0
    ours._parameters["weight_hh_l0"] = parameters["weight_hh_l0"]
    assert ours._flat_weights[1] is parameters["weight_hh_l0"]
    torch.testing.assert_close(run(ours, torch.ones(2, 1, 3)), run(theirs, torch.ones(2, 1, 3)))
    assert ours.half()._flat_weights[1].dtype == torch.float16
    assert "_flat_weights" not in ours.__getstate__()


def test_parametrized_weights_are_computed_at_every_call() -> None:
    ours, theirs = pair("GRU", 3, 4)
    input = torch.randn(5, 2, 3)
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
        assert module._flat_weights[1] is not None
    for _ in range(2):
        torch.testing.assert_close(run(ours, input), run(theirs, input))
        for module in (ours, theirs):
            with torch.no_grad():
                module.parametrizations.weight_hh_l0.original0.mul_(1.5)
    # No computed weight, and no graph, stays in the module.
    copy.deepcopy(ours)


def test_compiled() -> None:
    """The program of a module whose list was changed, and that of one where nobody has."""
    module, input = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input)[0], module(input)[0])
    module._flat_weights[1] = torch.randn_like(module.weight_hh_l0)
    changed = module(input)[0]
    torch.testing.assert_close(compiled(input)[0], changed)
    module.weight_hh_l0 = nn.Parameter(torch.randn_like(module.weight_hh_l0))
    assert not torch.allclose(module(input)[0], changed)
    torch.testing.assert_close(compiled(input)[0], module(input)[0])


@layers
def test_convert_and_revert_keep_it(name: str) -> None:
    module, input = getattr(nn, name)(3, 4), torch.randn(5, 2, 3)
    item = torch.randn_like(module.weight_hh_l0)
    module._flat_weights[1] = item
    expected = run(module, input)
    fused_rnn.convert(module)
    assert type(module) is getattr(fused_rnn, name)
    torch.testing.assert_close(run(module, input), expected)
    fused_rnn.revert(module)
    assert module._flat_weights[1] is item
    torch.testing.assert_close(run(module, input), expected)
    assert not {"_given_weights", "_given_for"} & vars(module).keys()


def test_errors() -> None:
    module, input = fused_rnn.LSTM(3, 4), torch.randn(5, 2, 3)
    module._flat_weights = module._flat_weights[:2]
    with pytest.raises(ValueError, match="_flat_weights: expected 4 tensors"):
        module(input)
    module._flat_weights = [None] * 4
    with pytest.raises(TypeError, match="expected a tensor for weight_ih_l0, got NoneType"):
        module(input)
    module._flat_weights = [weight[:, :3] if weight.dim() == 2 else weight for weight in module.parameters()]
    with pytest.raises(RuntimeError, match="weight_ih of layer 0"):
        module(input)
