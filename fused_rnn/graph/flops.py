"""What torch.utils.flop_counter counts of a layer: the products of torch.nn's, forward and backward.

Registered as soon as that file of torch is imported, and not by importing it, because it imports Triton.

As for torch.nn's layers outside of oneDNN and cuDNN, a multiplication with its addition is two, and biases and pointwise parts
are none. Legend as in ``fused_rnn.kernels.protocol``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fused_rnn.cells import named
from fused_rnn.data.when_imported import when_imported
from fused_rnn.graph.operators import spread


def forward_flops(
    cell_name: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    present: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Each row's products with W_ih, W_hh and, with a projection, W_hr."""
    return 2 * input.shape[0] * sum(weight.numel() for weight in weights if weight.dim() == 2)


def int8_forward_flops(
    cell_name: str,
    input: Tensor,
    states: Sequence[Tensor],
    hidden: int,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """As those of the float layer, whatever the weights are padded with."""
    return 2 * input.shape[0] * named(cell_name).num_gates * hidden * (input.shape[1] + hidden) * len(reverse)


def backward_flops(
    cell_name: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    present: Sequence[int],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: Sequence[int],
    out: Tensor,
    tape: Tensor,
    d_outputs: Sequence[Tensor],
    given: Sequence[int],
    wanted: Sequence[int],
    **_: Any,
) -> int:
    """The products of the gradients of the gates with h and the input, and with the weights, where those are wanted."""
    rows, count = input.shape[0], len(named(cell_name).states)
    input_wanted, h_wanted = wanted[:2]
    flat = spread(weights, present)
    asked = spread(wanted[1 + count :], present)
    each = len(flat) // len(reverse)
    total = 0
    for index, backwards in enumerate(reverse):
        ih, hh, *_biases, hr = flat[index * each : (index + 1) * each]
        ih_wanted, hh_wanted, *_flags, hr_wanted = asked[index * each : (index + 1) * each]
        assert ih is not None
        assert hh is not None
        # An initial h whose gradient nobody asks for ends the chain at the first step.
        inner = rows if h_wanted else rows - _first_rows(states, batch_sizes, bool(backwards))
        products = [(ih, rows * bool(input_wanted)), (ih, rows * bool(ih_wanted)), (hh, rows * bool(hh_wanted)), (hh, inner)]
        if hr is not None:
            # h of a last step counts only where something reads it.
            projected = rows if any(given[:2]) else rows - states[0].shape[1]
            products += [(hr, projected), (hr, projected * bool(hr_wanted))]
        total += sum(2 * weight.numel() * number for weight, number in products)
    return total


def _first_rows(states: Sequence[Tensor], batch_sizes: Tensor | None, backwards: bool) -> int:
    """The rows of a walk's first step."""
    if batch_sizes is None or isinstance(batch_sizes, FakeTensor):
        return states[0].shape[1]
    return int(batch_sizes[-1 if backwards else 0])


def _register(flop_counter: ModuleType) -> None:
    flop_counter.register_flop_formula(torch.ops.fused_rnn.layer_forward, get_raw=True)(forward_flops)
    flop_counter.register_flop_formula(torch.ops.fused_rnn.int8_forward, get_raw=True)(int8_forward_flops)
    flop_counter.register_flop_formula(torch.ops.fused_rnn.layer_backward, get_raw=True)(backward_flops)


when_imported("torch.utils.flop_counter", _register)
