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
Gates = Callable[[tuple[Tensor, ...]], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Equations:
    """A cell in plain torch.

    Attributes:
        cell: its row in ``fused_rnn.cells``.
        step: (gates_x, gates_h, states) -> (new states, tape): one step.
        gates: tape -> the blocks of a (gates_x, gates_h) for which ``step`` gives that tape; or None, with ``backward``.
        backward: (tape, states before, h after, gradients of the states after) -> the blocks of d_gates by their names, and the
            gradients of the states before, that of h without the product's. None where ``step`` is differentiated instead.
        operand: for a cell with later gates (``Cell.later``): (gates_x, gates_h of the first gates, states) -> what the product
            of the later ones reads. ``step`` gets that product in their place of gates_h.
    """

    cell: Cell
    step: Step
    gates: Gates | None = None
    backward: Backward | None = None
    operand: Operand | None = None
