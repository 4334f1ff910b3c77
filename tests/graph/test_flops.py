"""torch.utils.flop_counter counts of these modules what it counts of torch.nn's, where it sees torch.nn's products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn

IN, H, T, N = 6, 10, 7, 4


def flops(call: Callable[[], Any], pick: Callable[[Any], Tensor] = lambda result: tree_leaves(result)[0]) -> tuple[int, int]:
    """Of a forward, and of a forward with its backward."""
    with FlopCounterMode(display=False) as forward:
        call()
    with FlopCounterMode(display=False) as both:
        pick(call()).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


# oneDNN hides its products, but computes no float64.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu", "bias": False}),
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm_proj": ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
    "gru": ("GRU", {"batch_first": True, "bias": False, "bidirectional": True}),
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("wanted", ["weights", "input", "states", "frozen"])
@pytest.mark.parametrize("case", LAYERS)
def test_layers_as_torch(case: str, wanted: str, packed: bool) -> None:
    name, options = LAYERS[case]
    counted = []
    for package in (torch.nn, fused_rnn):
        rnn = getattr(package, name)(IN, H, **options, dtype=torch.float64)
        x = torch.randn(T, N, IN, dtype=torch.float64, requires_grad=wanted != "weights")
        if wanted == "frozen":
            for weight in rnn.parameters():
                weight.requires_grad_(False)
        count = rnn.num_layers * (2 if rnn.bidirectional else 1)
        sizes = (rnn.proj_size or H, H)[: 2 if name == "LSTM" else 1]
        given: Any = None
        if wanted == "states":
            batch = N if packed or not rnn.batch_first else T
            states = [torch.randn(count, batch, size, dtype=torch.float64, requires_grad=True) for size in sizes]
            given = tuple(states) if name == "LSTM" else states[0]
        input = pack_padded_sequence(x, [7, 4, 4, 1]) if packed else x
        counted.append(flops(lambda rnn=rnn, input=input, given=given: rnn(input, given)))
    assert counted[1] == counted[0]
    assert counted[1][1] > counted[1][0] > 0


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_as_torch(name: str) -> None:
    counted = []
    for package in (torch.nn, fused_rnn):
        cell, x = getattr(package, name)(IN, H), torch.randn(3, N, IN)

        def loop(cell: Any = cell, x: Tensor = x) -> Any:
            h = None
            for t in range(3):
                h = cell(x[t], h)
            return h

        counted.append(flops(loop))
    assert counted[1] == counted[0]


def test_one_state_that_is_wanted() -> None:
    """The gradient of c passes no product with W_hh."""
    counted = []
    for package in (torch.nn, fused_rnn):
        rnn = package.LSTM(IN, H, dtype=torch.float64)
        for wanted in (0, 1):
            h, c = (torch.randn(1, N, H, dtype=torch.float64, requires_grad=index == wanted) for index in range(2))
            x = torch.randn(T, N, IN, dtype=torch.float64)
            counted.append(flops(lambda rnn=rnn, x=x, h=h, c=c: rnn(x, (h, c))))
    assert counted[2:] == counted[:2]
    assert counted[0] != counted[1]


def test_lengths_count_rows_that_are_there() -> None:
    rnn, x = fused_rnn.GRU(IN, H, bidirectional=True), torch.randn(T, N, IN, requires_grad=True)
    lengths = [7, 4, 4, 1]
    assert flops(lambda: rnn(x, lengths=torch.tensor(lengths))) == flops(lambda: rnn(pack_padded_sequence(x, lengths)))


def test_float32_counts_as_float64() -> None:
    """Where torch.nn's LSTM is one call of oneDNN, which torch counts as nothing."""
    x = torch.randn(T, N, IN)
    rnn = fused_rnn.LSTM(IN, H)
    found = flops(lambda: rnn(x))
    rnn.double()
    assert flops(lambda: rnn(x.double())) == found


def test_meta_and_fake_tensors() -> None:
    x = torch.randn(T, N, IN)
    rnn = fused_rnn.LSTM(IN, H, 2, bidirectional=True)
    expected = flops(lambda: rnn(x))
    on_meta = fused_rnn.LSTM(IN, H, 2, bidirectional=True, device="meta")
    assert flops(lambda: on_meta(x.to("meta"))) == expected
    with torch._subclasses.FakeTensorMode():
        fake, rows = fused_rnn.LSTM(IN, H, 2, bidirectional=True), torch.empty(T, N, IN)
        assert flops(lambda: fake(rows)) == expected


def test_of_a_module_in_a_model() -> None:
    model = torch.nn.Sequential(fused_rnn.GRU(IN, H))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(T, N, IN))
    by_module = counter.get_flop_counts()
    assert sum(by_module["Sequential.0"].values()) == counter.get_total_flops() == 2 * T * N * 3 * H * (IN + H)
