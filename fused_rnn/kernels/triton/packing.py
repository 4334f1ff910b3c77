"""The recurrent weights in the order in which the programs read them: a slice for each program, padded with zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.cells import Cell
from fused_rnn.kernels.triton.plan import Plan


def forward_slices(cell: Cell, weight_hh: Sequence[Tensor], plan: Plan) -> Tensor:
    """weight_hh (G·H, H) → (D, slices, piles·rows, K): the rows of a program's units, gate after gate."""
    gates = cell.num_gates
    blocks = torch.stack([weight.reshape(gates, -1, weight.shape[1]) for weight in weight_hh])  # (D, G, H, H)
    hidden = blocks.shape[2]
    piles = 4 if plan.stacked else gates
    room = (0, plan.width - hidden, 0, plan.slices * plan.units - hidden, 0, piles - gates)
    padded: Tensor = torch.constant_pad_nd(blocks, room)
    split = padded.reshape(len(weight_hh), piles, plan.slices, plan.units, plan.width)
    return split.transpose(1, 2).contiguous()


def backward_slices(cell: Cell, weight_hh: Sequence[Tensor], plan: Plan) -> Tensor:
    """weight_hh (G·H, H) → (D, slices, G·chunks, units, chunk): a program's columns, by gate of d_gates and chunk of K."""
    blocks = torch.stack([by_d_gates(cell, weight) for weight in weight_hh])  # (D, G, H, H)
    gates, hidden = blocks.shape[1:3]
    room = (0, plan.slices * plan.units - hidden, 0, plan.width - hidden)
    padded: Tensor = torch.constant_pad_nd(blocks, room)
    split = padded.reshape(len(weight_hh), gates, plan.chunks, plan.chunk, plan.slices, plan.units)
    return split.permute(0, 4, 1, 2, 5, 3).contiguous()


def by_d_gates(cell: Cell, weight: Tensor) -> Tensor:
    """weight_hh (G·H, P) as (G, H, P), its gates in the order of the first blocks of d_gates."""
    gates = cell.num_gates
    # hn is the recurrent part of gate n.
    order = [cell.gates.index("n" if name == "hn" else name) for name in cell.d_gates[:gates]]
    blocks = weight.reshape(gates, -1, weight.shape[1])
    return blocks if order == list(range(gates)) else blocks[order]
