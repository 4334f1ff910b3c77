"""Numbers at the ends of what a dtype can hold, through the layers of every CPU backend."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_backends import choose, every_backend, every_cell
from torch import Tensor

from fused_rnn import reference
from fused_rnn.cells import CELLS
from fused_rnn.data.cell import Weights
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.protocol import Layer, LayerCall, OutputGradients

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_half = pytest.mark.parametrize("dtype", DTYPES[2:], ids=lambda dtype: str(dtype).removeprefix("torch."))


def every_half_number(dtype: torch.dtype) -> Tensor:
    """All that 16 bits can say: (65536,)."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def numbers(dtype: torch.dtype) -> Tensor:
    """Every number of a dtype of 16 bits; of others the largest, the smallest, those beside, and what is none."""
    if dtype.itemsize == 2:
        return every_half_number(dtype)
    info = torch.finfo(dtype)
    ends = [0.0, info.tiny, info.tiny / 2, info.smallest_normal * info.eps, info.max, 1.0, 1 + info.eps, float("inf")]
    return torch.tensor([*ends, *(-end for end in ends), float("nan")], dtype=dtype)


def make_call(
    backend: str, cell: str, steps: Steps, input: Tensor, states: tuple[Tensor, ...] | None, ih: Tensor, hidden: int = 1
) -> LayerCall:
    """One recurrence that hears nothing of the step before."""
    hh = ih.new_zeros(CELLS[cell].num_gates * hidden, hidden)
    return LayerCall(Layer(CELLS[cell], choose(backend), steps, (False,)), input, states, [Weights(ih, hh)], None)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same numbers, NaN where there is one, and the same sign of zero."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    there = ~expected.isnan()
    assert torch.equal(actual.signbit()[there], expected.signbit()[there])


@every_dtype
@every_cell
@every_backend
def test_states_without_a_step_pass_through(backend: str, cell: str, dtype: torch.dtype) -> None:
    """There and back again: the states themselves forward, their gradients backward."""
    values = numbers(dtype)
    given = torch.cat([torch.zeros(1, dtype=dtype), values])[None, :, None]
    states = tuple(given.clone() for _ in CELLS[cell].states)
    steps = Steps.packed(torch.tensor([1]), len(values) + 1)
    call = make_call(
        backend, cell, steps, torch.zeros(1, 1, dtype=dtype), states, torch.ones(CELLS[cell].num_gates, 1).to(dtype)
    )
    result = call.layer.backend.forward(call, True)
    wanted = [operand is not None for operand in call.operands()]
    gradients = OutputGradients(None, states, None)
    found = call.layer.backend.backward(call, result.out, result.tape, gradients, wanted)
    for after, before in zip(result.states, found[1 : 1 + len(states)], strict=True):
        assert_same(after[0, 1:, 0], values)
        assert before is not None
        assert_same(before[0, 1:, 0], values)


@every_half
@every_backend
@pytest.mark.parametrize("length", [1, 2])
def test_halves_are_widened_and_rounded_to_the_nearest(backend: str, dtype: torch.dtype, length: int) -> None:
    """Products of two numbers of 16 bits are exact in float32, so that there is one right result, ties and overflow too."""
    values = every_half_number(dtype)
    steps = Steps(length, len(values))
    x = values[None, :, None].expand(length, -1, 1).contiguous()
    info = torch.finfo(dtype)
    for factor in (1.0, -1.0, 1 + info.eps, 3.0, -1 / 3, info.tiny, 0.5 + info.eps, 2**-5 * (1 + 3 * info.eps)):
        ih = torch.tensor([[factor]]).to(dtype)
        call = make_call(backend, "rnn_relu", steps, x, None, ih)
        result = call.layer.backend.forward(call, False)
        expected = (values.float() * ih.float()[0, 0]).relu().to(dtype)
        # The second step adds zero times what may be infinite.
        torch.testing.assert_close(result.out[0, :, 0], expected, rtol=0, atol=0, equal_nan=True)


@every_half
@every_backend
def test_gradients_in_halves_are_rounded_to_the_nearest(backend: str, dtype: torch.dtype) -> None:
    """The gradient of the input is that of the output times one weight."""
    values = every_half_number(dtype)
    factor = torch.tensor([[1 + 3 * torch.finfo(dtype).eps]]).to(dtype)
    call = make_call(backend, "rnn_relu", Steps(1, len(values)), torch.ones(1, len(values), 1, dtype=dtype), None, factor)
    result = call.layer.backend.forward(call, True)
    gradients = OutputGradients(values[None, :, None], (None,), None)
    d_x = call.layer.backend.backward(call, result.out, result.tape, gradients, [True] + [False] * 6)[0]
    assert d_x is not None
    expected = (values.float() * factor.float()[0, 0]).to(dtype)
    torch.testing.assert_close(d_x[0, :, 0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])
@pytest.mark.parametrize("length", [1, 2])
@every_backend
def test_nonlinearities_over_their_whole_range(backend: str, length: int, dtype: torch.dtype) -> None:
    """Saturation, infinities and NaN in the gates come out as the equations have them, in their own row only."""
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan")]
    values = torch.cat([torch.tensor(special), torch.linspace(-120, 120, 4001), torch.logspace(-30, 0, 95)]).to(dtype)
    x = values[None, :, None].expand(length, -1, 1).contiguous()
    for name, cell in CELLS.items():
        call = make_call(backend, name, Steps(length, len(values)), x, None, torch.ones(cell.num_gates, 1, dtype=dtype))
        out = call.layer.backend.forward(call, True).out[0, :, 0]
        weights = (Weights(torch.ones(cell.num_gates, 1).double(), torch.zeros(cell.num_gates, 1).double()),)
        states = tuple(torch.zeros(1, len(values), 1).double() for _ in cell.states)
        expected, _ = reference.layer(cell, values.double()[:, None], Steps(1, len(values)), states, weights, (False,))
        eps = torch.finfo(dtype).eps
        # A cell that mixes h in has a share that goes to it and a share that goes to its gates: one rounding error of 1 - z is
        # all of it where z is nearly 1.
        absolute = 2 * eps if cell.direct else torch.finfo(dtype).tiny * 100
        torch.testing.assert_close(out.double(), expected[:, 0], rtol=10 * eps, atol=absolute, equal_nan=True)


@every_dtype
@every_cell
@every_backend
@pytest.mark.parametrize("batch", [(1, 2), (1, 9), (4, 49)], ids=str)
def test_nan_stays_in_its_sequence(backend: str, cell: str, dtype: torch.dtype, batch: Sequence[int]) -> None:
    """Neighbours of a sequence with NaN and infinities give what they give without it."""
    spoilt, n = batch
    x = torch.randn(3, n, 5).to(dtype)
    ih = torch.randn(CELLS[cell].num_gates * 7, 5).to(dtype)
    outs = []
    for value in (0.0, float("nan"), float("inf")):
        given = x.clone()
        given[:, :spoilt] = value
        call = make_call(backend, cell, Steps(3, n), given, None, ih, hidden=7)
        outs.append(call.layer.backend.forward(call, True).out[:, spoilt:])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
