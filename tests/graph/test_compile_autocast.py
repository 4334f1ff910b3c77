"""torch.autocast around compiled modules and inside of them: the dtypes and the numbers of eager code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compile_support import IN, H, flat, fresh, states_of  # noqa: F401
from older_torch import dynamo_with_values
from torch import Tensor

import fused_rnn

AUTOCAST: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rnn": ("RNN", {}, {}),
    "gru": ("GRU", {"num_layers": 2, "dropout": 0.5}, {}),
    "lstm": ("LSTM", {"bidirectional": True}, {"return_cell_states": True}),
    # As of a packed sequence, h and c have other dtypes than those of a dense one.
    "lstm_lengths": ("LSTM", {"bidirectional": True}, {"lengths": torch.tensor([4, 2, 6])}),
    "lstm_proj": ("LSTM", {"proj_size": 3}, {}),
}


@pytest.mark.parametrize(
    ("case", "outside"),
    [
        *((case, True) for case in AUTOCAST if case != "lstm_lengths"),
        *(pytest.param("lstm_lengths", outside, marks=dynamo_with_values) for outside in (True, False)),
    ],
)
def test_autocast(case: str, outside: bool) -> None:
    """In training, around the compiled function and inside of it: the dtypes of eager code, its numbers but for roundings."""
    name, options, keywords = AUTOCAST[case]
    module = getattr(fused_rnn, name)(IN, H, **options)

    def inside(x: Tensor, states: list[Tensor]) -> Any:
        hx = () if not states else (states[0] if len(states) == 1 else tuple(states),)
        if outside:
            return module(x, *hx, **keywords)
        with torch.autocast("cpu", torch.bfloat16):
            return module(x, *hx, **keywords)

    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager", dynamic=True)
    for dtype, with_states in ((torch.float32, False), (torch.bfloat16, True)):
        x = torch.randn(6, 3, IN).to(dtype)
        states = [state.to(dtype) for state in states_of(module, 3)] if with_states else []
        found = []
        for function in (compiled, inside):
            torch.manual_seed(1)
            leaves = [tensor.clone().requires_grad_() for tensor in (x, *states)]
            with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                values = flat(function(leaves[0], leaves[1:]))
            loss = sum(value.float().square().sum() for value in values)
            found.append([*values, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])
        if dtype == torch.bfloat16:
            assert {value.dtype for value in values} == {dtype}
        # AOTAutograd adds the gradients of a value that is used twice in another order.
        torch.testing.assert_close(*found, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_autocast_of_cells(name: str) -> None:
    module, x = getattr(fused_rnn, name)(IN, H), torch.randn(3, IN)
    found = []
    for function in (torch.compile(module, fullgraph=True, backend="aot_eager"), module):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(x)
        values = [*out] if isinstance(out, tuple) else [out]
        grads = torch.autograd.grad(sum(value.float().square().sum() for value in values), [*module.parameters()])
        found.append([*values, *grads])
    torch.testing.assert_close(*found, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=2 * torch.finfo(torch.bfloat16).eps)
