"""torch.jit.trace: what must stay open stays open, and where torch.nn's modules are quiet, these are."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fused_rnn

IN, H = 5, 8
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def sentence(*lengths: int) -> tuple[Tensor, Tensor]:
    return torch.randn(max(lengths), len(lengths), IN), torch.tensor(lengths)


class _Packs(torch.nn.Module):
    """Packs, runs and pads; with the states or without, and of sorted lengths or of any."""

    def __init__(self, rnn: torch.nn.Module, enforce_sorted: bool = True) -> None:
        super().__init__()
        self.rnn, self.enforce_sorted = rnn, enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor, *states: Tensor) -> Any:
        hx = None if not states else states if len(states) > 1 else states[0]
        out, after = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=self.enforce_sorted), hx)
        return pad_packed_sequence(out)[0], after


def assert_traces(module: torch.nn.Module, first: tuple[Any, ...], *others: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, first)
    for inputs in (first, *others):
        for actual, expected in zip(tree_leaves(traced(*inputs)), tree_leaves(module(*inputs)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "deep"])
@pytest.mark.parametrize("given", [False, True], ids=["zero", "states"])
@pytest.mark.parametrize("sort", [False, True], ids=["sorted", "any_order"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_packing_inside(name: str, sort: bool, given: bool, options: dict[str, Any]) -> None:
    plain = getattr(torch.nn, name)(IN, H, **options)
    module = _Packs(fused_rnn.convert(plain), enforce_sorted=not sort)
    count = len(module.rnn.all_weights)

    def inputs(*lengths: int) -> tuple[Tensor, ...]:
        number = 0 if not given else 2 if name == "LSTM" else 1
        return (*sentence(*lengths), *(torch.randn(count, len(lengths), H) for _ in range(number)))

    others = [(1, 7, 3), (2, 2), (5,)] if sort else [(7, 3), (3, 3, 3, 2), (5,)]
    assert_traces(module, inputs(3, 2, 1), *(inputs(*lengths) for lengths in others))


def test_packed_rows_are_still_checked() -> None:
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fused_rnn.GRU(IN, H)

        def forward(self, data: Tensor, sizes: Tensor) -> Tensor:
            return self.rnn(torch.nn.utils.rnn.PackedSequence(data, sizes))[0].data

    traced = torch.jit.trace(Packed(), (torch.randn(7, IN), torch.tensor([4, 2, 1])))
    with pytest.raises(RuntimeError, match="add up to 8 rows, but the packed data has 7"):
        traced(torch.randn(7, IN), torch.tensor([4, 3, 1]))


class _With(torch.nn.Module):
    def __init__(self, rnn: torch.nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.rnn, self.call = rnn, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.rnn, *inputs)


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_and_resets(batch_first: bool) -> None:
    rnn = fused_rnn.LSTM(IN, H, 2, bidirectional=True, batch_first=batch_first)

    def inputs(*lengths: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        x, reset = torch.randn(longest, len(lengths), IN), torch.rand(longest, len(lengths)) < 0.3
        if batch_first:
            x, reset = x.transpose(0, 1), reset.t()
        return x, torch.tensor(lengths), reset

    def both(rnn: Any, x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        return rnn(x, lengths=lengths, reset=reset)

    def resets(rnn: Any, x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        return rnn(x, reset=reset)

    for call in (both, resets):
        first, *others = (
            inputs(2, 6, 0, longest=6),
            inputs(9, 1, longest=9),
            inputs(3, 3, 2, 0, 1, longest=4),
            inputs(1, longest=1),
        )
        assert_traces(_With(rnn, call), first, *others)


def in_a_process(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr


def test_import_leaves_the_filters_of_warnings() -> None:
    script = """
import warnings, torch, sympy  # sympy, which parts of torch import, has a filter of its own
before = list(warnings.filters)
import fused_rnn
print(before == list(warnings.filters))
"""
    assert in_a_process(script) == "True"


CALLS: dict[str, Callable[..., Any]] = {
    "dense": lambda rnn, x, states: rnn(x),
    "states": lambda rnn, x, states: rnn(x, states),
    "unbatched": lambda rnn, x, states: rnn(x[:, 0]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_trace_is_quiet(name: str, call: str) -> None:
    """As of torch.nn; and where torch.nn has no such call, always."""
    rnn = getattr(fused_rnn, name)(IN, H, 2, bidirectional=True)
    states: Any = torch.randn(4, 3, H)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.trace(
            _With(rnn, lambda rnn, x, h: CALLS[call](rnn, x, (h, h) if name == "LSTM" else h)), (torch.randn(6, 3, IN), states)
        )
    assert [str(each.message) for each in caught if issubclass(each.category, torch.jit.TracerWarning)] == []


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_trace_of_cells_lengths_and_resets_is_quiet(name: str) -> None:
    x, h = torch.randn(3, IN), torch.randn(3, H)
    cell = getattr(fused_rnn, name)(IN, H)
    rnn = getattr(fused_rnn, name.removesuffix("Cell"))(IN, H, 2, bidirectional=True)
    padded = torch.randn(6, 3, IN), torch.tensor([6, 2, 1]), torch.zeros(6, 3, dtype=torch.bool)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.trace(_With(cell, lambda cell, x, h: cell(x, (h, h) if name == "LSTMCell" else h)), (x, h))
        torch.jit.trace(_With(rnn, lambda rnn, x, lengths, reset: rnn(x, lengths=lengths, reset=reset)[0]), padded)
        torch.jit.trace(_With(rnn, lambda rnn, x, lengths, reset: rnn(x, reset=reset)[0]), padded)
    assert [str(each.message) for each in caught if issubclass(each.category, torch.jit.TracerWarning)] == []


@pytest.mark.parametrize("given", [False, True], ids=["zero", "states"])
def test_packing_warns_as_often_as_with_torch(given: bool) -> None:
    """Packing itself warns, in torch's file; nothing of ours adds to it."""
    found = []
    for package in (torch.nn, fused_rnn):
        module = _Packs(package.GRU(IN, H, 2))
        inputs = (*sentence(3, 2, 1), torch.randn(2, 3, H)) if given else sentence(3, 2, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.jit.trace(module, inputs)
        found.append([each for each in caught if issubclass(each.category, torch.jit.TracerWarning)])
    assert len(found[1]) <= len(found[0])
    assert not [each for each in found[1] if "fused_rnn" in each.filename]
