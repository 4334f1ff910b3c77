"""One step of a derived cell in plain torch: what the reference walks over time, and what kernels are judged against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_rnn.cells.derivation import Derived
from fused_rnn.cells.language import Node, called, evaluate
from fused_rnn.data.equations import Equations


def equations_of(derived: Derived, body: Callable[..., Any]) -> Equations:
    """The cell in plain torch: its body, called with tensors, and the derived backward."""
    graph, cell = derived.graph, derived.cell

    def leaves_of(x: Sequence[Tensor], w: Sequence[Tensor], states: Sequence[Tensor]) -> dict[Node, Tensor]:
        leaves = {graph.leaf("state", name): value for name, value in zip(graph.states, states, strict=True)}
        for kind, blocks in (("x", x), ("w", w)):
            leaves |= {graph.leaf(kind, gate): value for gate, value in zip(graph.gates, blocks, strict=False)}
        return leaves

    def step(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        x, w = gates_x.chunk(len(graph.gates), dim=-1), gates_h.chunk(len(graph.gates), dim=-1)
        after = called(graph, body, x, w, states)
        # The bodies' own results, so that the equations alone say what they are.
        leaves = leaves_of(x, w, states) | dict(zip(graph.after, after, strict=True))
        if cell.tape_is_out:
            return after, (after[0],)
        written = dict(zip(derived.kept, evaluate(list(derived.kept.values()), leaves, x[0]), strict=True))
        return tuple(after), tuple(written[block] if block in written else x[0] for block in cell.tape)

    def operand(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> Tensor:
        assert graph.operand is not None
        x, w = gates_x.chunk(len(graph.gates), dim=-1), gates_h.chunk(len(cell.first), dim=-1)
        return evaluate([graph.operand], leaves_of(x, w, states), x[0])[0]

    backward = partial(backward_in_torch, derived)
    if not cell.later:
        return Equations(cell, step, backward)
    return Equations(cell, step, backward, operand, partial(later_backward_in_torch, derived))


def backward_in_torch(
    derived: Derived, tape: Sequence[Tensor], states: Sequence[Tensor], out: Tensor, d_after: Sequence[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The derived backward of one step, its first stage, in plain torch: what the kernels' are the same as.

    Args:
        tape: the blocks of the tape.
        states: before the step.
        out: h after it.
        d_after: the gradients of the states after it.

    Returns:
        the blocks of d_gates, zero where they are the second stage's, and the gradients of the states before, that of h without
        the product's.
    """
    graph = derived.graph
    leaves = _kept_leaves(derived, tape, states) | {graph.after[0]: out} | dict(zip(derived.gradients, d_after, strict=True))
    blocks = dict.fromkeys(derived.cell.d_gates, torch.zeros_like(tape[0]))
    blocks |= dict(zip(derived.d_gates, evaluate(list(derived.d_gates.values()), leaves, tape[0]), strict=True))
    before = [torch.zeros_like(out) if node is None else evaluate([node], leaves, tape[0])[0] for node in derived.d_before]
    return blocks, before


def later_backward_in_torch(
    derived: Derived, tape: Sequence[Tensor], states: Sequence[Tensor], d_operand: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The second stage: what it adds to the blocks of d_gates, and to the gradient of h before the step."""
    assert derived.d_operand is not None
    leaves = _kept_leaves(derived, tape, states) | {derived.d_operand: d_operand}
    found = evaluate(list(derived.later_d_gates.values()), leaves, d_operand)
    direct = torch.zeros_like(d_operand)
    if derived.later_direct is not None:
        direct = evaluate([derived.later_direct], leaves, d_operand)[0]
    return dict(zip(derived.later_d_gates, found, strict=True)), direct


def _kept_leaves(derived: Derived, tape: Sequence[Tensor], states: Sequence[Tensor]) -> dict[Node, Tensor]:
    graph, cell = derived.graph, derived.cell
    leaves = {graph.leaf("state", name): value for name, value in zip(graph.states, states, strict=True)}
    return leaves | {derived.kept[block]: value for block, value in zip(cell.tape, tape, strict=True) if block in derived.kept}
