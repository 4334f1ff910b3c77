"""The recurrent weights of the streamed regime, in the order in which its programs read them: a slice each, zero-padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.data.cell import Cell
from fused_rnn.kernels.triton.plan import Plan


def padded_columns(hidden: int, plan: Plan) -> int:
    """K of one gate, a multiple of the chunks in which it is read."""
    return -(-hidden // plan.chunk) * plan.chunk


def forward_slices(cell: Cell, weight_hh: Sequence[Tensor], plan: Plan) -> Tensor:
    """weight_hh (G·H, H) → (D, slices, piles·rows, K): the rows of a program's units, gate after gate."""
    gates = cell.num_gates
    blocks = torch.stack([weight.reshape(gates, -1, weight.shape[1]) for weight in weight_hh])  # (D, G, H, H)
    hidden = blocks.shape[2]
    piles, columns = 4 if plan.stacked else gates, padded_columns(hidden, plan)
    room = (0, columns - hidden, 0, plan.slices * plan.units - hidden, 0, piles - gates)
    padded: Tensor = torch.constant_pad_nd(blocks, room)
    split = padded.reshape(len(weight_hh), piles, plan.slices, plan.units, columns)
    return split.transpose(1, 2).contiguous()


def backward_slices(cell: Cell, weight_hh: Sequence[Tensor], plan: Plan) -> Tensor:
    """weight_hh (G·H, H) → (D, slices, units, G·K): a program's columns, for each gate of d_gates."""
    blocks = torch.stack([by_d_gates(cell, weight) for weight in weight_hh])  # (D, G, H, H)
    gates, hidden = blocks.shape[1:3]
    columns = padded_columns(hidden, plan)
    room = (0, plan.slices * plan.units - hidden, 0, columns - hidden)
    padded: Tensor = torch.constant_pad_nd(blocks, room)
    split = padded.reshape(len(weight_hh), gates * columns, plan.slices, plan.units)
    return split.permute(0, 2, 3, 1).contiguous()


def rounded(weights: Tensor) -> Tensor:
    """Float32 weights to the nearest number of TF32, where the chip itself would cut bits off."""
    bits = weights.view(torch.int32).add(0x1000).bitwise_and_(-0x2000).view(torch.float32)
    return torch.where(weights == weights, bits, weights)


def first_gate(cell: Cell) -> int:
    """The gate of the weights to which the first block of d_gates belongs; the next ones follow, and the first again."""
    return cell.weight_blocks[0]


def by_d_gates(cell: Cell, weight: Tensor) -> Tensor:
    """The rows of weight_hh that meet h, (G·H, P), as (G, H, P), their gates in the order of the first blocks of d_gates."""
    blocks = weight.reshape(len(cell.first), -1, weight.shape[1])
    first = first_gate(cell)
    # By slices: an index that lies on the CPU cannot be captured in a CUDA graph.
    return blocks if first == 0 else torch.cat((blocks[first:], blocks[:first]))
