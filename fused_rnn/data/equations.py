"""One step of a cell in plain torch: what the reference walks over time, and what kernels are judged against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fused_rnn.data.cell import Cell

States = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, States], tuple[States, tuple[Tensor, ...]]]
Operand = Callable[[Tensor, Tensor, States], Tensor]
Backward = Callable[[tuple[Tensor, ...], States, Tensor, States], tuple[dict[str, Tensor], list[Tensor]]]
LaterBackward = Callable[[tuple[Tensor, ...], States, Tensor], tuple[dict[str, Tensor], Tensor]]


@dataclass(frozen=True)
class Equations:
    """A cell in plain torch.

    Attributes:
        cell: its row in ``fused_rnn.cells``.
        step: (gates_x, gates_h, states) -> (new states, tape): one step.
        backward: (tape, states before, h after, gradients of the states after) -> the blocks of d_gates by their names, and the
            gradients of the states before, that of h without the product's.
        operand: for a cell with later gates (``Cell.later``): (gates_x, gates_h of the first gates, states) -> what the product
            of the later ones reads. ``step`` gets that product in their place of gates_h.
        later_backward: for a cell with later gates: (tape, states before, gradient of the operand) -> what is added to blocks
            of d_gates, and to the gradient of h.
    """

    cell: Cell
    step: Step
    backward: Backward
    operand: Operand | None = None
    later_backward: LaterBackward | None = None
