"""Loops over single steps (``fused_rnn.graph.loops``): the weights' gradients are right, and are formed once for all steps."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn.graph import kept, loops

STEPS, BATCH, INPUTS, HIDDEN = 6, 3, 5, 7
CELLS = ("RNNCell", "GRUCell", "LSTMCell")
LAYERS = ("RNN", "GRU", "LSTM")
every_cell = pytest.mark.parametrize("name", CELLS)

pytestmark = pytest.mark.skipif(not fused_rnn.backends()["cpp"].available, reason="the C++ backend sums up loops")


def pair(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A module of torch.nn and ours with the same weights."""
    plain = getattr(torch.nn, name)(INPUTS, HIDDEN, dtype=dtype, **options)
    fused = getattr(fused_rnn, name)(INPUTS, HIDDEN, dtype=dtype, **options)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def outputs(module: torch.nn.Module, input: Tensor, state: Any = None) -> list[Tensor]:
    """H after each step of a loop."""
    found = []
    for x in input:
        if isinstance(module, torch.nn.RNNBase):
            out, state = module(x[None], state)
            found.append(out[0])
        else:
            state = module(x, state)
            found.append(state if isinstance(state, Tensor) else state[0])
    return found


def loss_of(module: torch.nn.Module, input: Tensor) -> Tensor:
    return torch.stack(outputs(module, input)).sin().sum()


def gradients(module: torch.nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def assert_same_gradients(fused: torch.nn.Module, plain: torch.nn.Module) -> None:
    torch.testing.assert_close(gradients(fused), gradients(plain))


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each of the products was of."""
    from fused_rnn.kernels import dispatch

    backend = dispatch.choose(torch.device("cpu"))
    made: list[int] = []
    real = type(backend).loop_gradients

    def counted(self: Any, cell: Any, steps: Any, *rest: Any) -> Any:
        made.append(len(steps))
        return real(self, cell, steps, *rest)

    monkeypatch.setattr(type(backend), "loop_gradients", counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS + LAYERS)
def test_one_product_for_all_steps(name: str, bias: bool, dtype: torch.dtype, sums: list[int]) -> None:
    plain, fused = pair(name, dtype, bias=bias)
    inputs = [torch.randn(STEPS, BATCH, INPUTS, dtype=dtype, requires_grad=True) for _ in range(2)]
    inputs[1].data = inputs[0].data
    for module, input in zip((plain, fused), inputs, strict=True):
        loss_of(module, input).backward()
    assert_same_gradients(fused, plain)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    # The first step has no state with a graph.
    assert sums == [STEPS - 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_cell
def test_storage_in_16_bits(name: str, dtype: torch.dtype, isa: str) -> None:
    """Summed in float32: no worse than torch's, step by step."""
    exact, _ = pair(name)
    narrow = copy.deepcopy(exact).to(dtype)
    fused = getattr(fused_rnn, name)(INPUTS, HIDDEN, dtype=dtype)
    fused.load_state_dict(narrow.state_dict())
    exact.load_state_dict(narrow.state_dict())
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=dtype)
    for module in (exact, narrow, fused):
        loss_of(module, input.to(next(module.parameters()).dtype)).backward()
    for mine, theirs, right in zip(gradients(fused), gradients(narrow), gradients(exact), strict=True):
        allowed = (theirs - right).abs().max() + torch.finfo(dtype).eps * right.abs().max()
        assert (mine - right).abs().max() <= allowed


def test_many_rows_are_summed_up_in_between(monkeypatch: pytest.MonkeyPatch, sums: list[int]) -> None:
    monkeypatch.setattr(loops, "_MOST_ROWS", 2 * BATCH)
    plain, fused = pair("GRUCell")
    input = torch.randn(STEPS + 3, BATCH, INPUTS, dtype=torch.float64)
    for module in (plain, fused):
        loss_of(module, input).backward()
    assert_same_gradients(fused, plain)
    assert sums == [3, 3, 2]


@every_cell
def test_what_is_asked_for_alone(name: str, sums: list[int]) -> None:
    plain, fused = pair(name)
    values = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    found = []
    for module in (plain, fused):
        input = values.clone().requires_grad_()
        loss = loss_of(module, input)
        found.append(
            [
                *torch.autograd.grad(loss, input, retain_graph=True),
                *torch.autograd.grad(loss, module.weight_hh, retain_graph=True),
                *torch.autograd.grad(loss, (module.bias_ih, input)),
            ]
        )
    torch.testing.assert_close(found[1], found[0])
    # The input alone needs no product over the steps.
    assert sums == [STEPS - 1] * 2


@pytest.mark.parametrize("frozen", [("weight_ih",), ("weight_hh", "bias_hh"), ("bias_ih",), ("weight_ih", "weight_hh")])
@every_cell
def test_frozen_weights(name: str, frozen: tuple[str, ...]) -> None:
    plain, fused = pair(name)
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    for module in (plain, fused):
        for each in frozen:
            getattr(module, each).requires_grad_(False)
        loss_of(module, input).backward()
    assert_same_gradients(fused, plain)


def test_frozen_in_the_middle() -> None:
    plain, fused = pair("LSTMCell")
    first, second = torch.randn(2, 3, BATCH, INPUTS, dtype=torch.float64)
    for module in (plain, fused):
        h, c = None, None
        for i, x in enumerate((*first, *second)):
            module.weight_ih.requires_grad_(i < 3)
            h, c = module(x, None if h is None else (h, c))
        module.weight_ih.requires_grad_()
        h.sum().backward()
    assert_same_gradients(fused, plain)


@every_cell
def test_graphs_that_share_the_loop(name: str) -> None:
    """Two losses, one after another, one of them twice; then truncated in the middle."""
    plain, fused = pair(name)
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    for module in (plain, fused):
        one, other = loss_of(module, input), loss_of(module, 2 * input)
        one.backward(retain_graph=True)
        other.backward()
        one.backward()
        state = None
        for chunk in input.split(2):
            for x in chunk:
                state = module(x, state)
            last = state if isinstance(state, Tensor) else state[0]
            last.sum().backward()
            state = state.detach() if isinstance(state, Tensor) else tuple(each.detach() for each in state)
    assert_same_gradients(fused, plain)


def test_a_backward_that_failed_leaves_nothing() -> None:
    plain, fused = pair("GRUCell")
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)

    class Stop(Exception):
        pass

    def stop(_: Tensor) -> None:
        raise Stop

    hs = outputs(fused, input)
    handle = hs[2].register_hook(stop)
    with pytest.raises(Stop):
        hs[-1].sum().backward(retain_graph=True)
    handle.remove()
    hs[-1].sum().backward()
    outputs(plain, input)[-1].sum().backward()
    assert_same_gradients(fused, plain)


@every_cell
def test_second_gradients(name: str) -> None:
    plain, fused = pair(name)
    input = torch.randn(3, BATCH, INPUTS, dtype=torch.float64)
    for module in (plain, fused):
        first = torch.autograd.grad(loss_of(module, input), list(module.parameters()), create_graph=True)
        sum(grad.square().sum() for grad in first).backward()
    assert_same_gradients(fused, plain)


@every_cell
def test_batched_gradients(name: str) -> None:
    plain, fused = pair(name)
    input = torch.randn(3, BATCH, INPUTS, dtype=torch.float64)
    seeds = torch.randn(4, BATCH, HIDDEN, dtype=torch.float64)
    found = [
        torch.autograd.grad(outputs(module, input)[-1], list(module.parameters()), seeds, is_grads_batched=True)
        for module in (plain, fused)
    ]
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    plain, fused = pair("LSTMCell")
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    for module in (plain, fused):
        h = c = torch.zeros(BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
        for i, x in enumerate(input):
            if i % 2:
                h, c = checkpoint(lambda x, h, c, module=module: module(x, (h, c)), x, h, c, use_reentrant=reentrant)
            else:
                h, c = module(x, (h, c))
        h.sum().backward()
    assert_same_gradients(fused, plain)


def test_saved_tensors_that_are_moved() -> None:
    plain, fused = pair("GRUCell")
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    loss_of(plain, input).backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.numpy(force=True).copy(), torch.from_numpy):
        loss = loss_of(fused, input)
    loss.backward()
    assert_same_gradients(fused, plain)


def test_threads() -> None:
    """Backwards of graphs that share the loop, at the same time."""
    plain, fused = pair("LSTMCell")
    inputs = torch.randn(8, STEPS, BATCH, INPUTS, dtype=torch.float64)
    losses = [loss_of(fused, input) for input in inputs]
    found: list[Any] = [None] * len(losses)

    def run(i: int) -> None:
        found[i] = torch.autograd.grad(losses[i], list(fused.parameters()))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(losses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for input, grads in zip(inputs, found, strict=True):
        torch.testing.assert_close(grads, torch.autograd.grad(loss_of(plain, input), list(plain.parameters())))


@every_cell
@pytest.mark.parametrize("batch", [BATCH, 600], ids=["small", "large"])
def test_changes_in_place(name: str, batch: int) -> None:
    """An output that was changed is computed again, as outside of loops; a weight that was changed is refused."""
    plain, fused = pair(name)
    assert BATCH * HIDDEN <= kept._SMALL < 600 * HIDDEN
    input = torch.randn(STEPS, batch, INPUTS, dtype=torch.float64)
    outputs(plain, input)[-1].sum().backward()
    last = outputs(fused, input)[-1]
    total = last.sum()
    last.detach().zero_()
    total.backward()
    assert_same_gradients(fused, plain)
    loss = loss_of(fused, input)
    with torch.no_grad():
        fused.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_that_are_computed() -> None:
    """As of a hyper-network: other tensors in each loop, and a graph behind them."""
    plain, fused = pair("GRUCell")
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    scales = []
    for module in (plain, fused):
        scale = torch.full((), 1.5, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            weights = {name: parameter * scale for name, parameter in module.named_parameters()}

            def called(x: Tensor, h: Tensor | None, module: Any = module, weights: Any = weights) -> Tensor:
                return torch.func.functional_call(module, weights, (x, h))

            h = None
            for x in input:
                h = called(x, h)
            h.sum().backward()
        scales.append(scale.grad)
    assert_same_gradients(fused, plain)
    torch.testing.assert_close(scales[1], scales[0])


def test_two_layers_and_several_states() -> None:
    """Weights of two cells in one loop, and one cell for two sequences at once."""
    pairs = [pair("LSTMCell"), pair("LSTMCell")]
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    into = torch.randn(HIDDEN, INPUTS, dtype=torch.float64)
    for lower, upper in zip(*pairs, strict=True):
        a = b = other = None
        for x in input:
            a = lower(x, a)
            b = upper(a[0] @ into, b)
            other = lower(x.flip(0), other)
        (b[0].sum() + other[1].sum()).backward()
    for plain, fused in pairs:
        assert_same_gradients(fused, plain)


@pytest.mark.parametrize("run", [lambda loss: loss.backward(), lambda loss: None], ids=["backward", "none"])
def test_nothing_is_kept(run: Callable[[Tensor], None]) -> None:
    """A loop ends with its graph: parameters are freed, modules are copied and pickled as ever."""
    fused = fused_rnn.LSTMCell(INPUTS, HIDDEN)
    loss = loss_of(fused, torch.randn(STEPS, BATCH, INPUTS))
    assert id(fused.weight_hh) in loops._loops
    run(loss)
    copy.deepcopy(fused)
    pickle.loads(pickle.dumps(fused))
    alive = weakref.ref(fused.weight_hh)
    key = id(fused.weight_hh)
    del loss, fused
    gc.collect()
    assert alive() is None
    assert key not in loops._loops


def test_other_backends(backend: str) -> None:
    plain, fused = pair("GRUCell", torch.float32)
    input = torch.randn(STEPS, BATCH, INPUTS)
    for module in (plain, fused):
        loss_of(module, input).backward()
    assert_same_gradients(fused, plain)
