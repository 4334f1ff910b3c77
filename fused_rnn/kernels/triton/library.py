"""The walk where torch.matmul does the recurrent product: one product and one pointwise launch a step.

It serves where the kernels' own product does not: weights beyond any shared memory and many rows, float64, a projection of h,
and gates whose product is with an operand that the step itself makes (``Cell.later``): of these a step has two products and two
launches.
Dense batches of one stream need no copy from the host inside the loop, so a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_rnn.data.steps import Steps

if TYPE_CHECKING:
    from fused_rnn.kernels.triton.walk import Walk


@dataclass(frozen=True)
class Second:
    """The second stage of a step: that of the later gates.

    Attributes:
        weights: their rows of weight_hh, for the forward (D, H, gates·H), for the backward (D, gates·H, H).
        options: constants of its launches that differ from the first stage's.
    """

    weights: Tensor
    options: dict[str, Any]


def _rows(steps: Steps, t: int) -> tuple[slice, int]:
    """The rows of a step, and how many."""
    rows = steps.rows(t, t + 1)
    return rows, rows.stop - rows.start


def forward(
    walk: Walk,
    kernel: Any,
    arguments: dict[str, Any],
    options: dict[str, Any],
    weights: Tensor,
    projection: Tensor | None,
    h_n: Tensor,
    out: Tensor,
    ring: Tensor,
    second: Second | None,
) -> None:
    """Walk all steps.

    Args:
        weights: (D, P, G·H), of the gates whose product is with h.
        projection: (D, H, P), or None.
        h_n: (D, N, P): h before the walk, with a projection written to be that after it.
        out: (R, D, P), written here with a projection.
        ring: (2, D, N, H), where the kernel leaves o·tanh(c) or h, and the first of two stages the operand.
        second: for a cell with later gates.
    """
    steps = walk.steps
    h = h_n.to(ring.dtype) if projection is not None else ring[0]
    product = torch.empty((*h.shape[:2], weights.shape[2]), dtype=ring.dtype, device=ring.device)
    arguments["p_product"] = product
    again, again_options = arguments, options
    if second is not None:
        arguments["p_handed"] = h_n.new_empty((*h_n.shape[:2], options["HANDED"] * h_n.shape[2]))
        product_of_operand = torch.empty((*h.shape[:2], second.weights.shape[2]), dtype=ring.dtype, device=ring.device)
        again, again_options = arguments | {"p_product": product_of_operand}, options | second.options
    for s in range(steps.length):
        torch.bmm(h if projection is not None else ring[s % 2], weights, out=product)
        walk.launch(kernel, arguments | {"s_begin": s, "s_end": s + 1}, options)
        if second is not None:
            torch.bmm(ring[(s + 1) % 2], second.weights, out=product_of_operand)
            walk.launch(kernel, again | {"s_begin": s, "s_end": s + 1}, again_options)
        if projection is None:
            continue
        projected = torch.bmm(ring[(s + 1) % 2], projection)
        for d in range(walk.directions):
            rows, n = _rows(steps, steps.length - 1 - s if walk.reverse_bits >> d & 1 else s)
            h[d, :n] = projected[d, :n]
            out[rows, d] = projected[d, :n]
    if projection is not None:
        h_n.copy_(h)


def backward(
    walk: Walk,
    kernel: Any,
    arguments: dict[str, Any],
    options: dict[str, Any],
    weights: Tensor,
    projection: Tensor | None,
    d_out: Tensor | None,
    reverse: Sequence[bool],
    reset: Tensor | None,
    second: Second | None,
) -> None:
    """Walk the steps of ``arguments``.

    Args:
        weights: (D, G·H, P), of the gates whose product is with h.
        projection: (D, P, H), or None.
        d_out: (R, D, P), read here with a projection.
        reset: (R,) bool.
        second: for a cell with later gates.
    """
    steps, d_gates = walk.steps, arguments["p_d_gates"]
    t_begin, t_end, first = arguments["t_begin"], arguments["t_end"], arguments["first_row"]
    columns, size = weights.shape[1:]
    d_h = arguments["p_d_h"]
    product = d_h.new_zeros((walk.directions, steps.batch, size), dtype=d_gates.dtype)
    arguments["p_product"] = product
    again, again_options = arguments, options
    if second is not None:
        # Apart from the other product: rows that a step has not keep what they had there.
        d_operand = torch.zeros_like(product)
        arguments["p_handed"] = d_h.new_empty((*d_h.shape[:2], options["HANDED"] * d_h.shape[2]))
        again, again_options = arguments | {"p_product": d_operand}, options | second.options
    if projection is not None:
        # The kernel sees the gradient of o·tanh(c), made here from that of h; no product reaches it in another way.
        arguments["p_d_h"] = d_h.new_zeros((walk.directions, steps.batch, projection.shape[2]))
        arguments["p_product"] = torch.zeros_like(arguments["p_d_h"], dtype=d_gates.dtype)
    for s in range(t_end - t_begin + 1):
        for d, backwards in enumerate(reverse):
            t = t_begin + s if backwards else t_end - 1 - s
            if s > 0:
                rows, n = _rows(steps, t - 1 if backwards else t + 1)
                own = slice(rows.start - first, rows.stop - first)
                torch.mm(d_gates[own, d, :columns], weights[d], out=product[d, :n])
                if projection is not None:
                    sent = product[d, :n] if reset is None else product[d, :n].masked_fill(reset[rows, None], 0)
                    d_h[d, :n] += sent
            if projection is None or t_begin + s >= t_end:
                continue
            rows, n = _rows(steps, t)
            d_total = d_h[d, :n] if d_out is None else d_h[d, :n] + d_out[rows, d]
            d_gates[rows.start - first : rows.stop - first, d, -size:] = d_total
            arguments["p_d_h"][d, :n] = d_total.to(projection.dtype) @ projection[d]
            d_h[d, :n] = 0
        if projection is None or t_begin + s < t_end:
            walk.launch(kernel, arguments | {"s_begin": s, "s_end": s + 1}, options)
        if second is not None and t_begin + s < t_end:
            for d, backwards in enumerate(reverse):
                rows, n = _rows(steps, t_begin + s if backwards else t_end - 1 - s)
                own = slice(rows.start - first, rows.stop - first)
                sent = d_gates[own, d, columns : columns + second.weights.shape[1]]
                torch.mm(sent, second.weights[d], out=d_operand[d, :n])
            walk.launch(kernel, again | {"s_begin": s, "s_end": s + 1}, again_options)
