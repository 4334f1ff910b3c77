"""The two biases of each recurrence as the one that a kernel adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.data.cell import Cell, Weights


def summed_biases(cell: Cell, weights: Sequence[Weights], dtype: torch.dtype) -> Tensor | None:
    """The bias that the kernel adds, (D, blocks of ``Cell.bias``·H), or None where no direction has one."""
    apart = (len(cell.bias) - cell.num_gates) * (weights[0].hh.shape[0] // cell.num_gates)
    blocks: list[Tensor] = []
    for weight in weights:
        ih, hh = weight.bias_ih, weight.bias_hh
        if ih is None or hh is None:
            if all(weight.bias_ih is None and weight.bias_hh is None for weight in weights):
                return None
            zero = weight.hh.new_zeros(weight.hh.shape[0])
            ih, hh = zero if ih is None else ih, zero if hh is None else hh
        # In float32 from the start: the sum of two biases is not rounded to a narrower dtype.
        if ih.dtype != dtype:
            ih, hh = ih.to(dtype), hh.to(dtype)
        if apart:
            both = torch.cat((ih, hh[-apart:]))
            both[: -2 * apart].add_(hh[:-apart])
            blocks.append(both)
        else:
            blocks.append(ih + hh)
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).view(len(weights), -1)
