"""Calls of the C++ extension, complete and right, for tests to run or to spoil."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _C
from fused_rnn.cells import CELLS
from fused_rnn.data.cell import Weights

Call = dict[str, Any]


def make_forward(
    cell: str,
    dtype: torch.dtype = torch.float32,
    length: int = 6,
    batch: int = 9,
    inputs: int = 21,
    hidden: int = 37,
    reverse: Sequence[bool] = (False, True),
    projection: int | None = None,
    batch_sizes: Tensor | None = None,
    reset: bool = True,
    bias: bool = True,
) -> Call:
    """Arguments of ``layer_forward``; the input is (T, N, I), or (R, I) with ``batch_sizes``."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 0.25) -> Tensor:
        return (scale * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)

    output, gates, d = projection or hidden, CELLS[cell].num_gates * hidden, len(reverse)
    rows = length * batch if batch_sizes is None else int(batch_sizes.sum())
    return {
        "cell": cell,
        "input": draw(length, batch, inputs, scale=1) if batch_sizes is None else draw(rows, inputs, scale=1),
        "states": tuple(draw(d, batch, width) for width in (output, hidden)[: len(CELLS[cell].states)]),
        "weights": [
            Weights(
                draw(gates, inputs, scale=inputs**-0.5),
                draw(gates, output, scale=output**-0.5),
                draw(gates) if bias else None,
                draw(gates) if bias else None,
                None if projection is None else draw(projection, hidden, scale=hidden**-0.5),
            )
            for _ in reverse
        ],
        "length": length,
        "batch": batch,
        "batch_sizes": batch_sizes,
        "reverse": list(reverse),
        "reset": torch.rand((d, rows), generator=random) < 0.2 if reset else None,
        "keep": True,
        "cell_states": CELLS[cell].cell_state is not None,
        "step": False,
        "threads": 1,
    }


def make_step(cell: str, dtype: torch.dtype = torch.float32, rows: int = 3, inputs: int = 21, hidden: int = 37) -> Call:
    """Arguments of ``layer_forward`` for a step of a cell: the input is (N, I), states are (N, ·)."""
    call = make_forward(cell, dtype, 1, rows, inputs, hidden, (False,), reset=False)
    return call | {"input": call["input"][0], "states": tuple(state[0] for state in call["states"]), "step": True}


def make_backward(forward: Call | str) -> Call:
    """Arguments of ``layer_backward`` after this forward: every gradient is given, and every one is wanted."""
    if isinstance(forward, str):
        forward = make_forward(forward)
    out, states, cells, tape = _C.layer_forward(**forward)
    random = torch.Generator().manual_seed(1)

    def like(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.randn(value.shape, generator=random, dtype=torch.float64).to(value.dtype)

    wanted = [True] * (1 + len(forward["states"] or CELLS[forward["cell"]].states))
    for weights in forward["weights"]:
        wanted += [weight is not None for weight in weights]
    dropped = ("keep", "cell_states")
    return {name: value for name, value in forward.items() if name not in dropped} | {
        "out": out,
        "tape": tape,
        "d_out": like(out),
        "d_cells": like(cells),
        "d_states": tuple(like(state) for state in states),
        "wanted": wanted,
        "gates_wanted": False,
    }


def forward_results(call: Call) -> list[Tensor]:
    """All that a forward returns."""
    out, states, cells, tape = _C.layer_forward(**call)
    return [each for each in (out, *states, cells, tape) if each is not None]


def backward_results(call: Call) -> list[Tensor]:
    """All that a backward returns."""
    return [each for each in _C.layer_backward(**call) if each is not None]


def with_weight(call: Call, place: str, weight: Any, recurrence: int = 0) -> Call:
    """The weights of a call, one of them replaced."""
    weights = list(call["weights"])
    weights[recurrence] = weights[recurrence]._replace(**{place: weight})
    return {"weights": weights}


def every_other_column(tensor: Tensor) -> Tensor:
    """The same values, with a gap after each of a row."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def negated(tensor: Tensor) -> Tensor:
    """The same values, with the other sign in memory."""
    return torch.complex(tensor, -tensor).conj().imag


class Subclass(torch.Tensor):
    """A class of its own, which DLPack's table does not know."""
