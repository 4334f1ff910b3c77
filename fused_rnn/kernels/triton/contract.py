"""A cell's ``pack``, ``forward`` and ``backward`` as a walk has them (``fused_rnn.kernels.by_walk.walk``): states in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.data.steps import Steps
from fused_rnn.kernels.triton.recurrence import Packed, Recurrence, compute_dtype


def _check_states(name: str, states: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
    for state, shape in zip(states, shapes, strict=True):
        if tuple(state.shape) != shape or state.dtype != dtype or not state.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {dtype} of shape {shape}, got {state.dtype} of shape {tuple(state.shape)}"
            )


def contract(recurrence: Recurrence) -> tuple[Any, Any, Any]:
    """Make a cell's ``pack``, ``forward`` and ``backward`` (``fused_rnn.kernels.by_walk.walk``)."""
    cell = recurrence.cell

    def check(states: Sequence[Tensor], name: str, tape: Tensor, out: Tensor, directions: int, batch: int) -> None:
        sizes = (out.shape[2], tape.shape[2] // len(cell.tape))
        shapes = [(directions, batch, size) for size in sizes[: len(states)]]
        _check_states(name, states, shapes, compute_dtype(tape.dtype))

    def pack(weight_hh: list[Tensor], weight_hr: list[Tensor] | None, steps: Steps, backward: bool) -> Packed:
        return recurrence.pack(weight_hh, weight_hr, steps, backward)

    def forward(
        tape: Tensor,
        out: Tensor,
        states: tuple[Tensor, ...],
        packed: Packed,
        bias: Tensor | None,
        steps: Steps,
        reverse: Sequence[bool],
        reset: Tensor | None,
        keep: bool,
    ) -> None:
        if steps.batch and steps.length:
            check(states, "states", tape, out, len(reverse), steps.batch)
            bias = None if bias is None else bias.contiguous()
            recurrence.forward(tape, out, states, states, packed, bias, steps, reverse, reset, keep)

    def backward(
        d_gates: Tensor,
        d_states: tuple[Tensor, ...],
        d_out: Tensor | None,
        d_cells: Tensor | None,
        tape: Tensor,
        out: Tensor,
        states_0: tuple[Tensor, ...],
        packed: Packed,
        steps: Steps,
        t_begin: int,
        t_end: int,
        reverse: Sequence[bool],
        reset: Tensor | None,
    ) -> None:
        if steps.batch and t_begin != t_end:
            check(d_states, "d_states", tape, out, len(reverse), steps.batch)
            check(states_0, "states_0", tape, out, len(reverse), steps.batch)
            recurrence.backward(
                d_gates, d_states, d_states, d_out, d_cells, tape, out, states_0, packed, steps, t_begin, t_end, reverse, reset
            )

    for function, suffix in ((pack, "pack"), (forward, "forward"), (backward, "backward")):
        function.__name__ = function.__qualname__ = f"{cell.name}_{suffix}"
        function.__module__ = recurrence.step.__module__
    return pack, forward, backward
