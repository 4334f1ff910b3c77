"""The operators themselves, and what else than torch.compile sees them in place of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_support import IN, MODULES, H, assert_same, flat, fresh, make  # noqa: F401
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from fused_rnn import reference
from fused_rnn.cells import CELLS, LSTM
from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps
from fused_rnn.graph import operators
from fused_rnn.kernels import dispatch

CHECKED = {
    "rnn_tanh": {},
    "rnn_relu": {"bias": False, "batch_sizes": True},
    "lstm": {"reset": True},
    "lstm_proj": {"projection": 2, "batch_sizes": True, "reset": True},
    "lstm_infer": {"keep": False},
    "lstm_cells": {"cell_states": True},
    "gru": {"one_bias": True},
    "gru_bfloat16": {"dtype": torch.bfloat16, "recurrences": 1},
}


def arguments(
    case: str,
    *,
    bias: bool = True,
    one_bias: bool = False,
    batch_sizes: bool = False,
    reset: bool = False,
    projection: int = 0,
    keep: bool = True,
    cell_states: bool = False,
    dtype: torch.dtype = torch.float64,
    recurrences: int = 2,
    requires_grad: bool = True,
) -> tuple[Any, ...]:
    cell = CELLS[case if case in CELLS else case.partition("_")[0]]
    length, batch = 3, 2
    rows = 5 if batch_sizes else length * batch

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)

    weights: list[Tensor] = []
    for _ in range(recurrences):
        gates = cell.num_gates * H
        weights += [random(gates, IN), random(gates, projection or H)]
        weights += [random(gates) for _ in range(bias + (bias and not one_bias))]
        weights += [random(projection, H)] if projection else []
    present = [1, 1, int(bias), int(bias and not one_bias), int(projection > 0)] * recurrences
    states = [random(recurrences, batch, projection or H if name == "h" else H) for name in cell.states]
    sizes = torch.tensor([2, 2, 1]) if batch_sizes else None
    resets = torch.rand(recurrences, rows) < 0.3 if reset else None
    return (cell.name, random(rows, IN), states, weights, present, sizes, resets, [0, 1][:recurrences], keep, cell_states)


@pytest.mark.parametrize("case", CHECKED)
def test_opcheck_forward(case: str) -> None:
    opcheck(torch.ops.fused_rnn.layer_forward, arguments(case, **CHECKED[case]))


@pytest.mark.parametrize("case", [case for case in CHECKED if CHECKED[case].get("keep", True)])
def test_opcheck_backward(case: str) -> None:
    given = arguments(case, **CHECKED[case], requires_grad=False)
    out, *ends, tape = torch.ops.fused_rnn.layer_forward(*given)
    wanted = [1] * (1 + len(given[2]) + len(given[3]))
    wanted[1] = 0
    for d_outputs, flags in (
        ([torch.randn_like(value) for value in (out, *ends)], [1] * (1 + len(ends))),
        ([torch.randn_like(ends[-1])], [0] * len(ends) + [1]),
    ):
        opcheck(torch.ops.fused_rnn.layer_backward, (*given[:-2], out, tape, d_outputs, flags, wanted))


def test_opcheck_of_packed_resets() -> None:
    sizes, order, reset = torch.tensor([2, 1]), torch.tensor([1, 0]), torch.tensor([True, False, True])
    opcheck(torch.ops.fused_rnn.packed_reset, (reset, sizes, order, sizes.clone(), order.clone()))
    opcheck(torch.ops.fused_rnn.packed_reset, (reset, sizes, None, sizes.clone(), None))


def test_opcheck_of_steps() -> None:
    opcheck(torch.ops.fused_rnn.check_batch_sizes, (torch.tensor([3, 1]), torch.randn(4, 2), torch.tensor([0, 2, 1]), None))
    opcheck(torch.ops.fused_rnn.check_batch_sizes, (torch.tensor([3, 1]), torch.randn(4, 2), None, torch.randn(1, 3, 2)))
    opcheck(torch.ops.fused_rnn.one_step_earlier, (torch.tensor([True, False, False, True]), torch.tensor([3, 1])))


@pytest.mark.parametrize("lengths", [[2, 0, 3], [0, 0, 0], [4, 4, 4], []], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_opcheck_of_lengths(lengths: list[int], batch_first: bool) -> None:
    padded = torch.randn(*((len(lengths), 4) if batch_first else (4, len(lengths))), IN)
    opcheck(torch.ops.fused_rnn.ragged, (torch.tensor(lengths, dtype=torch.int32), padded, batch_first))


def _layers(dtype: torch.dtype = torch.float64) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """A layer through the operators, the reference's, and an input."""
    cell: Cell = LSTM
    weights = (Weights(torch.randn(4 * H, IN, dtype=dtype), torch.randn(4 * H, H, dtype=dtype)),)
    states = (torch.zeros(1, 3, H, dtype=dtype),) * 2
    x = torch.randn(12, IN, dtype=dtype)
    return (
        lambda x: operators.layer(cell, x, Steps(4, 3), states, weights, (False,))[0],
        lambda x: reference.layer(cell, x, Steps(4, 3), states, weights, (False,))[0],
        x,
    )


def test_operators_under_torch_func() -> None:
    """Exported programs and compiled functions take the operators through torch.func."""
    operator, exact, x = _layers()
    many = torch.stack([x, 2 * x])

    def twice(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        inner = torch.func.grad(lambda x: layer(x).sin().sum())
        return torch.func.grad(lambda x: inner(x).sin().sum())

    for compiled in (False, True):
        wrap = (lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)) if compiled else (lambda f: f)
        for transform in (
            lambda layer: torch.func.grad(lambda x: layer(x).sin().sum()),
            twice,
            lambda layer: lambda x: torch.func.vmap(layer)(torch.stack([x, 2 * x])),
            lambda layer: lambda x: torch.func.vmap(torch.func.grad(lambda x: layer(x).sin().sum()))(torch.stack([x, 2 * x])),
        ):
            torch.testing.assert_close(wrap(transform(operator))(x), transform(exact)(x), rtol=1e-10, atol=1e-10)
    assert torch.func.vmap(operator)(many).shape == (2, 12, H)


def test_double_backward_of_an_operator() -> None:
    operator, exact, x = _layers()
    found = []
    for layer in (operator, exact):
        input = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(input).sin().sum(), input, create_graph=True)
        found.append(torch.autograd.grad(grad.sin().sum(), input)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_forward_mode_raises() -> None:
    """No tangent is silently zero."""
    operator, _, x = _layers()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(operator, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        operator(torch.autograd.forward_ad.make_dual(x, x))


def test_derivative_of_the_backward_operator_raises() -> None:
    given = arguments("gru")
    out, end, tape = torch.ops.fused_rnn.layer_forward(*given)
    wanted = [1] + [0] * (len(given[2]) + len(given[3]))
    (grad,) = torch.ops.fused_rnn.layer_backward(*given[:-2], out, tape, [end], [0, 1], wanted)
    with pytest.raises(NotImplementedError, match="cannot be differentiated"):
        grad.sum().backward()


def test_operators_share_no_memory() -> None:
    """One step of one row takes the backends' way of its own."""
    given = arguments("gru", recurrences=1, keep=False, requires_grad=False)
    given = (given[0], given[1][:1], [given[2][0][:, :1].contiguous()], *given[3:])
    outputs = torch.ops.fused_rnn.layer_forward(*given)
    pointers = [value.untyped_storage().data_ptr() for value in (given[1], *given[2], *given[3], *outputs) if value.numel()]
    assert len(set(pointers)) == len(pointers)


# --- What else sees operators. ---


@pytest.mark.parametrize("case", MODULES)
def test_fake_tensors_do_not_reach_the_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = flat(make(case)(torch.randn(6, 3, IN, dtype=torch.float64)))
    monkeypatch.setattr(dispatch, "choose", None)
    with FakeTensorMode() as mode:
        module, x = make(case), torch.randn(6, 3, IN, dtype=torch.float64)
        inside = flat(module(x))
    outside = flat(module(x))
    sum(value.sum() for value in outside).backward()
    for values in (inside, outside):
        for value, like in zip(values, expected, strict=True):
            assert isinstance(value, FakeTensor)
            assert value.fake_mode is mode
            assert (value.shape, value.stride(), value.dtype) == (like.shape, like.stride(), like.dtype)
    assert all(isinstance(parameter.grad, FakeTensor) for parameter in module.parameters())


def test_meta_device() -> None:
    module = make("lstm", device="meta")
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(6, 3, IN, device="meta", dtype=torch.float64))
    assert [value.shape for value in flat(out)] == [(6, 3, H), (1, 3, H), (1, 3, H)]


def test_make_fx() -> None:
    """What it records computes; recorded below the operators it would be a tensor that nobody fills."""
    module, x = make("lstm"), torch.randn(6, 3, IN, dtype=torch.float64)
    traced = make_fx(lambda x: module(x)[0])(x)
    other = torch.randn(6, 3, IN, dtype=torch.float64)
    # Not to the bit: the eager call leaves the input's products to the walk, which adds in another order.
    torch.testing.assert_close(traced(other), module(other)[0], rtol=0, atol=1e-14)


def test_checkpoint_inside_compiled_code() -> None:
    module, x = make("gru"), torch.randn(6, 3, IN, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)[0]

    both = [
        torch.autograd.grad(run(x).sin().sum(), [*module.parameters()])
        for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function)
    ]
    assert_same(*both)
