"""Weights of 8 bits: how they are made, and how the kernels read them.

Each row of a weight has a scale of its own, and no shift: ``weight ≈ scale[:, None] * whole``, ``whole`` from -127 to 127. The
scale is the row's largest magnitude divided by 127, so that no number is off by more than half a scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Units of a block, and columns that stand together, of a packed weight (csrc/walk/int8_args.h).
UNITS, DEPTH = 16, 4

# -128 is left out: the range is the same on both sides.
MOST = 127


class Packed(NamedTuple):
    """A weight (G·H, K) in blocks of 16 units, padded with zeros; the same on every machine.

    Attributes:
        data: int8, (H / 16, K / 4, G·64), rounded up: block, four columns, gate, unit, column.
        scale: float32, (H / 16, G·16): block, gate, unit.
        sums: int32, as ``scale``: the sum of each row of ``data``, times -128. Kernels whose activations are shifted by 128, to
            be unsigned, start with it.
    """

    data: Tensor
    scale: Tensor
    sums: Tensor


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to whole numbers.

    Args:
        weight: (rows, K), of a floating dtype.

    Returns:
        int8 (rows, K), and the scale of each row, float32 (rows,).

    Raises:
        ValueError: if the weight has a NaN or an infinity.
    """
    # In float64, so that the division decides no rounding.
    weight = weight.detach().double()
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("weight: expected finite numbers, got a NaN or an infinity")
    scale = (largest / MOST).float()
    # Of a row of zeros, or of numbers too small for a float32 scale, nothing is left.
    divisor = torch.where(scale > 0, scale, torch.inf).double()
    whole = (weight / divisor[:, None]).round().clamp(-MOST, MOST)
    return whole.to(torch.int8), scale


def packed(whole: Tensor, scale: Tensor, gates: int) -> Packed:
    """Lay out a weight for the kernels.

    Args:
        whole: int8 (G·H, K).
        scale: float32 (G·H,).
        gates: G.
    """
    hidden, inner = len(whole) // gates, whole.shape[1]
    blocks, quads = -(-hidden // UNITS), -(-inner // DEPTH)
    data = whole.new_zeros(gates, blocks * UNITS, quads * DEPTH)
    data[:, :hidden, :inner] = whole.view(gates, hidden, inner)
    data = data.view(gates, blocks, UNITS, quads, DEPTH).permute(1, 3, 0, 2, 4).reshape(blocks, quads, gates * UNITS * DEPTH)
    sums = whole.sum(1, dtype=torch.int32) * -128
    return Packed(data, _by_block(scale, gates, blocks), _by_block(sums, gates, blocks))


def unpacked(weight: Packed, gates: int, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    """Undo ``packed``: int8 (G·H, K) and float32 (G·H,)."""
    blocks, quads, _ = weight.data.shape
    data = weight.data.view(blocks, quads, gates, UNITS, DEPTH).permute(2, 0, 3, 1, 4)
    data = data.reshape(gates, blocks * UNITS, quads * DEPTH)[:, :hidden, :inner].reshape(gates * hidden, inner)
    scale = weight.scale.view(blocks, gates, UNITS).transpose(0, 1).reshape(gates, -1)[:, :hidden].reshape(-1)
    return data, scale


def _by_block(row: Tensor, gates: int, blocks: int) -> Tensor:
    """(G·H,) as (blocks, G·16)."""
    padded = row.new_zeros(gates, blocks * UNITS)
    padded[:, : len(row) // gates] = row.view(gates, -1)
    return padded.view(gates, blocks, UNITS).transpose(0, 1).reshape(blocks, gates * UNITS)
