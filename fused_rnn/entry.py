"""The way from the functions to a layer: tensors whose memory holds the numbers themselves, in the dtypes of autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rnn import autocast, autograd
from fused_rnn.cells import Cell, Weights
from fused_rnn.steps import Steps

States = tuple[Tensor, ...]


def layer(
    cell: Cell,
    rows: Tensor,
    steps: Steps,
    states: States,
    weights: tuple[Weights, ...],
    reverse: tuple[bool, ...],
    *options: Any,
    as_dense: bool = True,
) -> tuple[Tensor, States]:
    """Compute one layer; arguments and results as of ``autograd.layer``.

    Args:
        options: further arguments of ``autograd.layer``; they and what they add to the states are passed on.
        as_dense: whether torch.nn would take dense ``steps`` for a dense batch, which it computes in other dtypes: not the step
            of a cell, and not a batch with lengths, whose dtypes must not depend on whether all of them are full.
    """
    if _any_negated(rows, states, weights):
        rows, states = rows.resolve_neg(), tuple(state.resolve_neg() for state in states)
        weights = tuple(Weights._make(None if each is None else each.resolve_neg() for each in weight) for weight in weights)
    dtypes = autocast.dtypes_of(cell, rows, states, weights, steps.dense and as_dense)
    if dtypes is None:
        return autograd.layer(cell, rows, steps, states, weights, reverse, *options)
    wider = dtypes[-1]
    rows, states, weights = rows.to(wider), tuple(state.to(wider) for state in states), autocast.cast(weights, wider)
    with torch.autocast(rows.device.type, enabled=False):
        out, ends = autograd.layer(cell, rows, steps, states, weights, reverse, *options)
    # What comes after the states has their last one's dtype already.
    count = len(dtypes)
    return out.to(dtypes[0]), (*(end.to(dtype) for end, dtype in zip(ends[:count], dtypes, strict=True)), *ends[count:])


def _any_negated(rows: Tensor, states: States, weights: tuple[Weights, ...]) -> bool:
    """Whether there is a view such as z.conj().imag, whose memory holds the numbers with the other sign."""
    # Under torch.compile the dispatcher resolves them before the operators see them.
    if torch.compiler.is_compiling():
        return False
    # Plain loops: any() over generators takes longer than the step of a small layer.
    for tensor in (rows, *states):
        if tensor.is_neg():
            return True
    for weight in weights:
        for parameter in weight:
            if parameter is not None and parameter.is_neg():
                return True
    return False
