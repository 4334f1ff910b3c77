"""Calls of the C++ extension, complete and right, for tests to run or to spoil."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rnn import _C, cells

# Blocks of the gates, the tape, d_gates and the bias.
CELLS = {name: (len(row.gates), len(row.tape), len(row.d_gates), len(row.bias)) for name, row in cells.CELLS.items()}


def make_call(
    cell: str, dtype: torch.dtype = torch.float32, length: int = 6, batch: int = 9, hidden: int = 37
) -> dict[str, Any]:
    gates, tape, _, bias = CELLS[cell]
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype) / 4

    rows = draw(length * batch, 2, tape * hidden)
    states = [draw(2, batch, hidden) for _ in cells.CELLS[cell].states]
    weights = [draw(gates * hidden, hidden) for _ in range(2)]
    return {
        "cell": cell,
        "input": None,
        "tape": rows,
        "out": rows if cells.CELLS[cell].tape_is_out else torch.empty((length * batch, 2, hidden), dtype=dtype),
        "states": states,
        "weight_ih": None,
        "weight_hh": _C.Packed(cell, weights, False, "hidden", False, 1),
        "weight_hr": None,
        "bias": draw(2, bias * hidden),
        "length": length,
        "batch": batch,
        "batch_sizes": None,
        "offsets": None,
        "reverse": [False, True],
        "reset": torch.rand(length * batch, generator=random) < 0.2,
        "keep": True,
        "threads": 1,
    }


def make_backward(cell: str) -> dict[str, Any]:
    forward = make_call(cell)
    states_0 = [state.clone() for state in forward["states"]]
    _C.forward(**forward)
    random = torch.Generator().manual_seed(1)
    gates, _, gradients, _ = CELLS[cell]
    rows, directions, hidden = forward["out"].shape
    weights = [torch.randn((gates * hidden, hidden), generator=random) / 4 for _ in range(2)]
    shared = "cell tape out length batch batch_sizes offsets reverse reset threads weight_ih weight_hr".split()
    return {name: forward[name] for name in shared} | {
        "d_gates": torch.full((rows, directions, gradients * hidden), torch.nan),
        "d_states": [torch.randn(state.shape, generator=random) for state in states_0],
        "d_out": torch.randn((rows, directions, hidden), generator=random),
        "d_cells": torch.randn((rows, directions, hidden), generator=random)
        if cells.CELLS[cell].cell_state is not None
        else None,
        "states_0": states_0,
        "weight_hh": _C.Packed(cell, weights, True, "hidden", False, 1),
        "t_begin": 0,
        "t_end": forward["length"],
        "d_input": None,
    }


def make_step(
    cell: str, dtype: torch.dtype = torch.float32, rows: int = 3, inputs: int = 21, hidden: int = 37, layers: int = 2
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype) / 4

    gates = CELLS[cell][0] * hidden
    weights = []
    for columns in (inputs, *[hidden] * (layers - 1)):
        weights += [draw(gates, columns), draw(gates, hidden), draw(gates), draw(gates)]
    return {
        "cell": cell,
        "input": draw(1, rows, inputs),
        "states": tuple(draw(layers, rows, hidden) for _ in cells.CELLS[cell].states),
        "weights": weights,
        "batch_first": False,
        "threads": 2,
    }


def every_other_column(tensor: Tensor) -> Tensor:
    """The same values, with a gap after each of a row."""
    return tensor.repeat_interleave(2, -1)[..., ::2]
