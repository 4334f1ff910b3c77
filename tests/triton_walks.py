"""Triton's recurrences as walks (``fused_rnn.kernels.by_walk.walk``), whose states are in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.data.cell import Cell
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.by_walk.walk import Walk
from fused_rnn.kernels.triton.derived import recurrence_of
from fused_rnn.kernels.triton.recurrence import Packed


def walk_of(cell: Cell) -> Walk:
    """The walk of a cell."""
    recurrence = recurrence_of(cell)

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
            recurrence.backward(
                d_gates, d_states, d_states, d_out, d_cells, tape, out, states_0, packed, steps, t_begin, t_end, reverse, reset
            )

    return Walk(recurrence.pack, forward, backward)
