"""Second and batched gradients, tangents and torch.func together with lengths, resets and cell states."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from older_torch import dynamo_with_values
from test_transforms import Module, assert_as_plain, draw, each, make, members, state
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, linearize, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree

import fused_rnn

Function = Callable[[dict[str, Tensor], Tensor], Any]


@each
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "bias": False}], ids=["one way", "both ways"])
def test_gradients_and_tangents_of_every_tensor(name: str, options: dict[str, Any], backend: str) -> None:
    """The kernels' gradients, the reference's tangents, and both under vmap, against differences in float64."""
    module: Module = getattr(fused_rnn, name)(2, 3, dtype=torch.float64, **options)
    names, inputs = zip(*module.named_parameters(), strict=True)
    x, h, c = draw(3, 2, 2), draw(1 + bool(options), 2, 3), draw(1 + bool(options), 3, 2).transpose(1, 2)
    leaves = [tensor.requires_grad_() for tensor in ((x, h, c) if name == "LSTM" else (x, h))]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given, parameters = tensors[: len(leaves)], tensors[len(leaves) :]
        hx = given[1:] if name == "LSTM" else given[1]
        results = functional_call(module, dict(zip(names, parameters, strict=True)), (given[0], hx))
        return tuple(pytree.tree_leaves(results))

    everything = (*leaves, *inputs)
    with warnings.catch_warnings():
        # torch's check of batched gradients goes through fallbacks of its own.
        warnings.simplefilter("ignore", UserWarning)
        assert torch.autograd.gradcheck(
            function,
            everything,
            fast_mode=True,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(
            function, everything, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True
        )


def penalty(module: Module, x: Tensor) -> Tensor:
    """A critic's loss with the gradient penalty of Gulrajani et al. 2017."""
    x = x.clone().requires_grad_()
    value = module(x)[0].mean()
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    return value + 10 * (slope.norm() - 1).square()


@each
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_gradient_penalty_trains(name: str, training: bool, backend: str) -> None:
    """Step by step the same parameters as torch.nn's, and a loss that falls."""
    theirs = getattr(torch.nn, name)(3, 5, num_layers=2, bidirectional=True, dtype=torch.float64).train(training)
    ours = getattr(fused_rnn, name)(3, 5, num_layers=2, bidirectional=True, dtype=torch.float64).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = draw(4, 2, 3)
    losses = []
    for module in (theirs, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        history = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = penalty(module, x)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[1][-1] < losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# name -> (function of parameters and input, parameters, stacked parameters, input) -> tensors.
CASES: dict[str, Callable[[Function, dict[str, Tensor], dict[str, Tensor], Tensor], Any]] = {
    "vmap": lambda f, p, ps, x: vmap(f, (None, 0))(p, torch.stack([x, x * 2])),
    "per-batch gradients": lambda f, p, ps, x: vmap(grad(_sum(f)), (None, 0))(p, torch.stack([x, x * 2])),
    "ensemble's gradients": lambda f, p, ps, x: vmap(grad(_sum(f)), (0, None))(ps, x),
    "jvp": lambda f, p, ps, x: jvp(lambda x: f(p, x), (x,), (x.cos(),)),
    "jacrev": lambda f, p, ps, x: jacrev(lambda x: f(p, x))(x),
    "hessian": lambda f, p, ps, x: hessian(lambda x: _sum(f)(p, x))(x),
}


def _sum(function: Function) -> Function:
    return lambda p, x: sum(value.sin().sum() for value in function(p, x))


OPTIONS = {
    "lengths": {"lengths": torch.tensor([3, 0])},
    "reset": {"reset": torch.tensor([[True, False], [False, True], [True, False]])},
    "cell states": {"return_cell_states": True},
}
OPTIONS["all"] = {key: value for options in OPTIONS.values() for key, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_transforms_of_lengths_resets_and_cell_states(case: str, options: str, backend: str) -> None:
    module, x = make("LSTM", bidirectional=True), draw(3, 2, 3)

    def function(parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        return pytree.tree_leaves(functional_call(module, parameters, (x,), OPTIONS[options]))

    with warnings.catch_warnings():
        # vmap's, of an operation that it has no rule for. What torch warns of inside itself, once in a process, is not ours.
        warnings.simplefilter("error", UserWarning)
        assert_as_plain(lambda: CASES[case](function, state(module), members(module), x))


@each
def test_mapped_resets(name: str, backend: str) -> None:
    module, x = make(name, bidirectional=True), draw(3, 4, 3)
    reset = torch.rand(3, 4) < 0.5

    def loss(parameters: dict[str, Tensor], x: Tensor, reset: Tensor) -> Tensor:
        out: Tensor = functional_call(module, parameters, (x,), {"reset": reset})[0]
        return out.square().sum()

    assert_as_plain(lambda: vmap(lambda reset: module(x[:, 0], reset=reset), 1)(reset))
    assert_as_plain(lambda: vmap(grad(loss), (None, 1, 1))(state(module), x, reset))


def test_mapped_lengths_raise() -> None:
    """At whatever depth of torch.func's wrappers the mapped dimension is."""
    module, x = make("GRU"), draw(2, 3, 3)
    with pytest.raises(RuntimeError, match="lengths: expected the same for all members of"):
        vmap(grad(lambda x, lengths: module(x, lengths=lengths)[0].sum()))(x, torch.tensor([3, 2]))
    sizes = torch.tensor([[1, 1, 1], [2, 1, 0]])
    with pytest.raises(RuntimeError, match="vmap cannot map over the batch_sizes"):
        vmap(grad(lambda x, sizes: module(PackedSequence(x, sizes))[0].data.sum()))(x, sizes)


@dynamo_with_values
def test_compiled_maps_share_lengths_or_raise() -> None:
    module, x, lengths = make("GRU", bidirectional=True), draw(2, 3, 2, 3), torch.tensor([[3, 1], [0, 2]])

    def value(x: Tensor, lengths: Tensor) -> Tensor:
        return module(x, lengths=lengths)[0].sin().sum()

    compiled = torch.compile(lambda x, n: vmap(value, (0, None))(x, n), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, lengths[0]), vmap(value, (0, None))(x, lengths[0]), rtol=1e-12, atol=1e-12)
    # At any depth of the wrappers.
    for function in (value, grad(value)):
        mapped = torch.compile(lambda x, n, function=function: vmap(function)(x, n), fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match=r"expected the same for all members of torch\.func\.vmap"):
            mapped(x, lengths)


def test_linearize_of_ragged_steps_raises() -> None:
    module, x = make("GRU"), draw(3, 2, 3)
    packed = pack_padded_sequence(x, [3, 2])
    with pytest.raises(NotImplementedError, match=r"fused_rnn: .* use torch\.func\.jvp"):
        linearize(lambda x: module(x, lengths=torch.tensor([3, 2]))[0], x)
    with pytest.raises(NotImplementedError, match=r"fused_rnn: .* use torch\.func\.jvp"):
        linearize(lambda data: module(PackedSequence(data, packed.batch_sizes))[0].data, packed.data)


def in_place(out: Tensor) -> Tensor:
    return out.mul_(2).relu_()


def on_a_copy(out: Tensor) -> Tensor:
    return (out * 2).relu()


IN_PLACE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad of grad": lambda f, x: grad(lambda x: grad(lambda x: f(x).pow(3).sum())(x).square().sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).square().sum()), 1)(x),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f, 1)(x).square().sum())(x),
    "jvp of grad": lambda f, x: jvp(grad(lambda x: f(x).square().sum()), (x,), (x.cos(),)),
    "hessian": lambda f, x: hessian(lambda x: f(x).square().sum())(x),
}


@each
@pytest.mark.parametrize("case", IN_PLACE)
def test_outputs_changed_in_place_inside_transforms(case: str, name: str, backend: str) -> None:
    module, x = make(name), draw(3, 2, 3)
    actual = IN_PLACE[case](lambda x: in_place(module(x)[0]), x)
    expected = IN_PLACE[case](lambda x: on_a_copy(module(x)[0]), x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
