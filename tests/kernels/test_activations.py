"""The nonlinearities of every CPU backend and instruction set: right to a few ulp, and exact at their ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from test_backends import choose
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.data.cell import Weights
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.protocol import Layer, LayerCall

# Units: more than two vectors of any width, and a last one that is not full.
HIDDEN = 37
# Units in the last place. A sigmoid near its smallest has an error of e^x's argument in it.
MOST_ULP = {torch.sigmoid: 6.0, torch.tanh: 3.0}


class Found(NamedTuple):
    """What one nonlinearity gave: ``function`` of (n,), (rows, HIDDEN) with n rows a step."""

    name: str
    function: Callable[[Tensor], Tensor]
    results: Tensor


def of_every_cell(kernels: str, x: Tensor, length: int) -> Iterator[Found]:
    """The gates of every cell, from an input that is each gate's sum; and tanh(c), from a c_0 that a step leaves as it is."""
    for cell in (CELLS[name] for name in ("lstm", "gru", "rnn_tanh")):
        blocks = run(kernels, cell.name, x.expand(length, -1), torch.ones(cell.num_gates), None)
        functions = {"g": torch.tanh, "n": torch.tanh, "h": torch.tanh}
        for gate in cell.gates if not cell.tape_is_out else ("h",):
            yield Found(f"{cell.name}.{gate}", functions.get(gate, torch.sigmoid), blocks[gate])
    # i = 0, f = o = 1 and g = −1, so that −0 stays what it is: c = c_0 − 0.
    far = torch.ones(length, len(x), dtype=x.dtype)
    blocks = run(kernels, "lstm", far, torch.tensor([-800.0, 800.0, -800.0, 800.0]), x)
    for gate, end in (("i", 0.0), ("f", 1.0), ("g", -1.0), ("o", 1.0)):
        # A NaN of the first step is in h, and so in the gates of the second.
        assert ((blocks[gate] == end) | x.isnan().repeat(length)[:, None]).all(), gate
    yield Found("lstm.tanh_c", torch.tanh, blocks["out"])


def run(kernels: str, name: str, x: Tensor, weight: Tensor, c_0: Tensor | None) -> dict[str, Tensor]:
    """The blocks of the tape, and h as "out", of a recurrence that hears nothing of h: x (T, N), weight (G,), c_0 (N,)."""
    cell, (length, batch) = CELLS[name], x.shape
    ih = weight.to(x.dtype).repeat_interleave(HIDDEN)[:, None]
    weights = Weights(ih, ih.new_zeros(len(ih), HIDDEN))
    layer = Layer(cell, choose(kernels), Steps(length, batch), (False,))
    states = None if c_0 is None else (x.new_zeros(1, batch, HIDDEN), c_0[None, :, None].repeat(1, 1, HIDDEN))
    result = layer.backend.forward(LayerCall(layer, x[..., None].contiguous(), states, [weights]), True)
    out = result.out.reshape(-1, HIDDEN)
    if result.tape is None:
        return {"out": out, "h": out}
    blocks = result.tape[:, 0].unflatten(1, (len(cell.tape), HIDDEN)).unbind(1)
    return {"out": out, **dict(zip(cell.tape, blocks, strict=True))}


def numbers(dtype: torch.dtype) -> Tensor:
    """From the smallest to the largest, in order: all orders of magnitude, and closely where a result ends."""
    info = torch.finfo(dtype)
    exponents = torch.linspace(math.log2(info.smallest_normal) - 20, 20, 3001, dtype=torch.float64)
    near = torch.cat([torch.linspace(0, 50, 4001), torch.linspace(80, 110, 1001), torch.linspace(700, 760, 1001)]).double()
    positive = torch.cat([exponents.exp2(), near, torch.tensor([40.0, 1e9, info.max, float("inf")], dtype=torch.float64)])
    positive = positive.to(dtype).abs().sort().values
    return torch.cat([-positive.flip(0), positive])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("length", [1, 2])
def test_over_their_whole_range(kernels: str, length: int, dtype: torch.dtype) -> None:
    """Few units in the last place; never beyond the ends; 1, −1 and 0 wherever the right result rounds to them."""
    x = numbers(dtype)
    info = torch.finfo(dtype)
    for name, function, results in of_every_cell(kernels, x, length):
        exact = function(x.double())
        rounded = exact.to(dtype)
        for step in results.reshape(length, len(x), HIDDEN):
            y = step[:, 0]
            normal = rounded.abs() >= info.smallest_normal
            unit = torch.nextafter(rounded.abs(), torch.tensor(float("inf"), dtype=dtype)) - rounded.abs()
            error = ((y.double() - exact).abs() / unit.double())[normal]
            assert error.max() <= MOST_ULP[function], f"{name}: {error.max():.3g} ulp at {x[normal][error.argmax()]:.9g}"
            ends = rounded.abs() == 1
            assert torch.equal(y[ends], rounded[ends]), f"{name} does not reach its ends"
            assert (y.abs() <= 1).all(), name
            if function is torch.sigmoid:
                assert ((y >= 0) & (y <= info.smallest_normal))[~normal].all(), name
                assert (y[rounded == 0] == 0).all(), f"{name} does not reach 0"
            else:
                torch.testing.assert_close(y[~normal], rounded[~normal], rtol=0, atol=info.smallest_normal * info.eps)
                assert torch.equal(y, -y.flip(0)), f"{name} is not odd"
            # Not of torch's own functions.
            if kernels != "reference":
                assert torch.equal(step, y[:, None].expand_as(step)), f"{name}: units differ"
                assert (y.diff() >= 0).all(), f"{name} is not monotone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("length", [1, 2])
def test_special_numbers(kernels: str, length: int, dtype: torch.dtype) -> None:
    """NaN stays, infinities give the ends, and tanh keeps the sign of a zero."""
    x = torch.tensor([float("nan"), 0.0, -0.0, float("inf"), -float("inf")], dtype=dtype)
    for name, function, results in of_every_cell(kernels, x, length):
        first = results[: len(x), 0]
        torch.testing.assert_close(first, function(x), rtol=0, atol=0, equal_nan=True)
        # A gate's sum loses the sign of −0 before, as torch's does.
        if name == "lstm.tanh_c":
            assert torch.equal(first[1:].signbit(), x[1:].signbit()), name
