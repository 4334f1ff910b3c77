"""Stacks with connections, written from the papers as loops over single layers: what the modules are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sequences_support import explicit, given, listed, with_gradients
from tolerances import assert_close_to_reference
from torch import Tensor, nn

import fused_rnn

CONNECTIONS = ("residual", "highway", "dense")
FIELDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
# name -> (makes a stack of (I, H, layers), how many states it has)
MODULES: dict[str, tuple[Callable[..., Any], int]] = {
    "rnn": (fused_rnn.RNN, 1),
    "relu": (lambda *sizes, **options: fused_rnn.RNN(*sizes, nonlinearity="relu", **options), 1),
    "gru": (fused_rnn.GRU, 1),
    "gru_reset_before": (lambda *sizes, **options: fused_rnn.GRU(*sizes, reset_after=False, **options), 1),
    "lstm": (fused_rnn.LSTM, 2),
    "coupled": (lambda *sizes, **options: fused_rnn.LSTM(*sizes, coupled=True, **options), 2),
    "projected": (lambda *sizes, **options: fused_rnn.LSTM(*sizes, proj_size=5, **options), 2),
    "recurrent": (lambda *sizes, **options: fused_rnn.Recurrent(fused_rnn.cells.gru_reset_before, *sizes, **options), 1),
}


def states_for(module: Any, count: int, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    recurrences = module.num_layers * (2 if module.bidirectional else 1)
    widths = (getattr(module, "proj_size", 0) or module.hidden_size, module.hidden_size)[:count]
    return tuple(torch.randn(recurrences, batch, width, dtype=dtype) for width in widths)


def layer_of(module: Any, layer: int) -> Any:
    """One layer of a stack, as ``explicit`` reads a module of torch.nn; it has the stack's own parameters."""
    row = module.cell.row if isinstance(module, fused_rnn.Recurrent) else None
    found = SimpleNamespace(
        mode=module.mode if row is None else row.mode,
        reset_after=getattr(module, "reset_after", True) if row is None else row.name != "gru_reset_before",
        coupled=getattr(module, "coupled", False),
        num_layers=1,
        bidirectional=module.bidirectional,
        proj_size=getattr(module, "proj_size", 0),
    )
    if found.mode.startswith("GRU"):
        found.mode = "GRU"
    for suffix in ("", "_reverse"):
        for field in FIELDS:
            setattr(found, f"{field}_l0{suffix}", getattr(module, f"{field}_l{layer}{suffix}", None))
    return found


def stacked(
    module: Any,
    x: Tensor,
    hx: Sequence[Tensor],
    lengths: Sequence[int] | None = None,
    reset: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] = lambda values: values,
) -> list[Tensor]:
    """What a stack computes, layer by layer.

    Args:
        x: (T, N, I).
        drop: the dropout between layers.

    Returns:
        out, the last states, and c of the last layer at every step if there is one.
    """
    directions = 2 if module.bidirectional else 1
    ends: list[list[Tensor]] = [[] for _ in hx]
    cells: list[Tensor] = []
    # Of a dense stack, what each layer reads; of the others, what the last one gave.
    read, earlier = x, [x]
    for layer in range(module.num_layers):
        states = [state[layer * directions : (layer + 1) * directions] for state in hx]
        if module.connections == "dense":
            inner = torch.cat(earlier, -1)
        else:
            inner = drop(read) if layer else read
        y, *rest = explicit(layer_of(module, layer), inner, states, lengths, reset)
        for end, state in zip(ends, rest, strict=False):
            end.append(state)
        cells = rest[len(hx) :]
        if module.connections == "dense":
            read = y
            if layer < module.num_layers - 1:
                earlier.append(drop(y))
        elif module.connections == "residual":
            read = y + read if y.shape == read.shape else y
        elif module.connections == "highway" and y.shape == read.shape:
            t = torch.sigmoid(read @ getattr(module, f"weight_t_l{layer}").t() + getattr(module, f"bias_t_l{layer}"))
            read = t * y + (1 - t) * read
        else:
            read = y
    if lengths is not None:
        there = torch.arange(len(x))[:, None] < torch.tensor(lengths)
        read = read * there[..., None]
    return [read, *(torch.cat(end) for end in ends), *cells]


def compared(
    module: Any,
    count: int,
    x: Tensor,
    lengths: Sequence[int] | None = None,
    reset: Tensor | None = None,
    run: Callable[..., Any] | None = None,
) -> None:
    """Compare values and all gradients with those of the loop, in float64 and in plain torch of the same dtype.

    Args:
        run: (input (T, N, I), states) → what the module's forward gives for them. Without it the module is called.
    """
    hx = states_for(module, count, x.shape[1], x.dtype)

    def leaves(wider: torch.dtype | None, of: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        first, *states = (each.detach().to(wider).requires_grad_() for each in (x, *hx))
        return first, states, [first, *states, *of.parameters()]

    expected = []
    for wider in (None, torch.float64):
        of = module if wider is None else copy.deepcopy(module).double()
        first, states, all_of_them = leaves(wider, of)
        values = stacked(of, first, states, lengths, reset)[: 1 + count]
        expected.append(with_gradients(values, all_of_them))
    first, states, all_of_them = leaves(None, module)
    options = {"lengths": None if lengths is None else torch.tensor(lengths), "reset": reset}
    out, after = module(first, given(states), **options) if run is None else run(first, states)
    actual = with_gradients([out, *listed(after)], all_of_them)
    names = ["out", *"hc"[:count], "d_x", *(f"d_{name}_0" for name in "hc"[:count])]
    names += [f"d_{name}" for name, _ in module.named_parameters()]
    for name, *three in zip(names, actual, *expected, strict=True):
        assert_close_to_reference(*three, name)


def of_torch(module: Any) -> list[nn.Module]:
    """The layers of a stack as modules of torch.nn with one layer each, which hold copies of its numbers."""
    made = []
    for layer in range(module.num_layers):
        options: dict[str, Any] = {"bias": module.bias, "bidirectional": module.bidirectional}
        if module.mode == "LSTM":
            options["proj_size"] = module.proj_size
        if module.mode.startswith("RNN"):
            options["nonlinearity"] = module.nonlinearity
        own = {
            name.replace(f"_l{layer}", "_l0"): value
            for name, value in module.state_dict().items()
            if name.split("_l")[1].split("_")[0] == str(layer) and not name.startswith(("weight_t_", "bias_t_"))
        }
        kind = getattr(nn, module.mode.partition("_")[0])
        one = kind(own["weight_ih_l0"].shape[1], module.hidden_size, dtype=own["weight_ih_l0"].dtype, **options)
        one.load_state_dict(own)
        made.append(one)
    return made
