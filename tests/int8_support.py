"""What the int8 kernels compute, in float64: one step from the states that the kernels had before it.

The kernels make whole numbers of each row of the input and of h. Done again here in the same arithmetic, that gives the same
numbers, but where a number lies so near to the middle of two that a rounding of its last bits decides: such a number may be off
by one. So the bound of a result is that of float32, and for each such number one scale times the weight's magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rnn.data.int8 import quantized

# float32 rounds the scaled number and its sum with what rounds it: some 127 * 2^-23 each.
NEAR = 1e-4


@dataclass
class Rows:
    """Rows as the kernels read them: ``value`` in float64, and where rounding may have gone the other way by ``step``."""

    value: Tensor
    step: Tensor

    @staticmethod
    def of(rows: Tensor) -> Rows:
        largest = rows.abs().amax(-1, keepdim=True)
        scaled = rows * torch.where(largest > 0, 127 / largest, 0)
        scale = (largest / 127).double()
        near = ((scaled.double() - scaled.double().floor() - 0.5).abs() < NEAR).double()
        return Rows(scaled.round().double() * scale, near * scale)


@dataclass
class Step:
    """A step's results, and by how much the kernels' may differ from them."""

    h: Tensor
    c: Tensor | None
    bound_h: Tensor
    bound_c: Tensor | None


def dequantized(weight: Tensor) -> Tensor:
    whole, scale = quantized(weight)
    return whole.double() * scale.double()[:, None]


def step(mode: str, weights: tuple[Tensor, ...], x: Tensor, h: Tensor, c: Tensor | None) -> Step:
    """One step of rows x (n, I) from h and c (n, H), float32; weights: ih, hh, bias_ih, bias_hh of torch's module."""
    ih, hh = dequantized(weights[0]), dequantized(weights[1])
    bias_ih, bias_hh = (None if bias is None else bias.double() for bias in weights[2:])
    of_x, of_h = Rows.of(x), Rows.of(h)
    left = torch.nn.functional.linear(of_x.value, ih, bias_ih)
    right = torch.nn.functional.linear(of_h.value, hh, bias_hh)
    # What flips may change, and float32's sum of two products, two biases and their scales.
    flips_x, flips_h = of_x.step @ ih.abs().T, of_h.step @ hh.abs().T
    eps = 4e-7 * (1 + left.abs() + right.abs())
    before = h.double()
    if mode in ("rnn_tanh", "rnn_relu"):
        gate, bound = left + right, flips_x + flips_h + eps
        # Neither is steeper than 1.
        return Step(gate.tanh() if mode == "rnn_tanh" else gate.relu(), None, bound + 2e-6, None)
    if mode == "gru":
        (xr, xz, xn), (hr, hz, hn) = left.chunk(3, -1), right.chunk(3, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        (ar, az, an), (br, bz, bn) = (flips_x + eps).chunk(3, -1), (flips_h + eps).chunk(3, -1)
        # A logistic function is nowhere steeper than 1 / 4.
        d_r, d_z = (ar + br) / 4, (az + bz) / 4
        d_n = an + bn + d_r * (hn.abs() + bn)
        bound = d_n + d_z * ((before - n).abs() + d_n)
        return Step(n + z * (before - n), None, bound + 2e-6 * (1 + before.abs()), None)
    i, f, g, o = (left + right).chunk(4, -1)
    d_i, d_f, d_g, d_o = (flips_x + flips_h + eps).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    past = c.double()
    now = f * past + i * g
    bound_c = d_f / 4 * past.abs() + d_i / 4 + d_g * (1 + d_i / 4) + 2e-6 * (1 + past.abs())
    return Step(o * now.tanh(), now, d_o / 4 + bound_c + 2e-6, bound_c)


def states_of(result: Any) -> tuple[Tensor, ...]:
    """The states that a module gives, as a tuple."""
    return result if isinstance(result, tuple) else (result,)
