"""What follows from a cell's equations: which biases add up, what the backward keeps, the backward, and the cell's row.

A backend makes its pointwise parts of a ``Derived``: the forward computes ``after`` and what is kept, the backward computes
``d_gates``, ``direct`` and the gradient of the other state. Legend as in ``fused_rnn.data.cell``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.cells.language import ACTIVATIONS, Graph, Node, called, evaluate, order
from fused_rnn.data.cell import Cell
from fused_rnn.data.equations import Equations


@dataclass(frozen=True, eq=False)
class Derived:
    """A cell as its graph says it is.

    Attributes:
        graph: the equations, forward and backward.
        cell: the row.
        sums: for each gate whose shares are only ever added up, that sum.
        kept: block of the tape -> what the forward writes there; a gate's block that is not here is not read.
        gradients: of the states after the step, leaves of the backward.
        d_gates: block -> its gradient.
        d_before: the gradients of the states before the step; of h, what does not come by the product. None for zero.
    """

    graph: Graph
    cell: Cell
    sums: dict[str, Node]
    kept: dict[str, Node]
    gradients: tuple[Node, ...]
    d_gates: dict[str, Node]
    d_before: tuple[Node | None, ...]

    def available(self) -> set[Node]:
        """What a backward can read: what is kept, the states before the step and h after it."""
        graph = self.graph
        states = [graph.leaf("state", name) for name in graph.states]
        return {*self.kept.values(), *states, *self.gradients, graph.after[0]}


def derive(graph: Graph) -> Derived:
    """Derive all from the traced equations of a step.

    Raises:
        ValueError: if the kernels have no way for what the equations ask for; the message names the cell and the equation.
    """
    sums = _sums(graph)
    apart = next((gate for gate in graph.gates if gate not in sums), None)
    gradients = tuple(graph.leaf("gradient", state) for state in graph.states)
    received = _backward(graph, gradients)
    zero = graph.constant(0)

    def of(node: Node) -> Node:
        return received.get(node, zero)

    d_gates = {gate: of(sums[gate]) if gate in sums else of(graph.leaf("x", gate)) for gate in graph.gates}
    block = None
    if apart is not None:
        block = _free_name("apart", (*graph.gates, *graph.states))
        d_gates = {block: of(graph.leaf("w", apart)), **d_gates}
    d_before = tuple(received.get(graph.leaf("state", name)) for name in graph.states)
    kept = _kept(graph, sums, block, [*d_gates.values(), *(each for each in d_before if each is not None)])
    read = [name for name in graph.states if _reads(graph, kept, gradients, d_gates, d_before, name)]
    cell = Cell(
        f"{graph.name}_{signature(graph)}",
        graph.name,
        graph.gates,
        graph.states,
        tape=(*graph.gates, *(name for name in kept if name not in graph.gates)),
        d_gates=tuple(d_gates),
        reads_before=read[-1] if read else None,
        direct=_uses_state(graph, graph.after, "h") or d_before[0] is not None,
        apart=block,
        derived=True,
    )
    return Derived(graph, cell, sums, kept, gradients, d_gates, d_before)


def signature(graph: Graph) -> str:
    """A short name that cells with the same equations share, and no others do."""
    numbers: dict[Node, int] = {}
    lines = [repr((graph.gates, graph.states))]
    for number, node in enumerate(order(graph.after)):
        numbers[node] = number
        lines.append(repr((node.operation, node.value, [numbers[each] for each in node.operands])))
    lines.append(repr([numbers[node] for node in graph.after]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _sums(graph: Graph) -> dict[str, Node]:
    """The gates whose two shares are used as their sum alone."""
    nodes = order(graph.after)
    found: dict[str, Node] = {}
    for number, gate in enumerate(graph.gates):
        x, w = graph.leaf("x", gate), graph.leaf("w", gate)
        users = [node for node in nodes if x in node.operands or w in node.operands]
        bare = [node for node in graph.after if node in (x, w)]
        if len(users) == 1 and not bare and users[0].operation == "add" and set(users[0].operands) == {x, w}:
            found[gate] = users[0]
        elif number + 1 < len(graph.gates):
            raise ValueError(
                f"{graph.name}: W.{gate}: only the last gate's share of h may be apart from x.{gate}: "
                f"use x.{gate} + W.{gate}(h), or put {gate!r} last in gates"
            )
    return found


def _free_name(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _backward(graph: Graph, gradients: Sequence[Node]) -> dict[Node, Node]:
    """The gradient that each node receives, by reverse differentiation."""
    received: dict[Node, Node] = {}

    def give(node: Node, gradient: Node) -> None:
        received[node] = received[node] + gradient if node in received else gradient

    for state, gradient in zip(graph.after, gradients, strict=True):
        give(state, gradient)
    one = graph.constant(1)
    for node in reversed(order(graph.after)):
        d = received.get(node)
        if d is None:
            continue
        if node.operation == "add":
            for operand in node.operands:
                give(operand, d)
        elif node.operation == "sub":
            give(node.operands[0], d)
            give(node.operands[1], -d)
        elif node.operation == "mul":
            left, right = node.operands
            give(left, d * right)
            give(right, d * left)
        elif node.operation == "div":
            left, right = node.operands
            give(left, d / right)
            give(right, -(d * node / right))
        elif node.operation == "neg":
            give(node.operands[0], -d)
        elif node.operation == "sigmoid":
            give(node.operands[0], d * node * (one - node))
        elif node.operation == "tanh":
            give(node.operands[0], d * (one - node * node))
        elif node.operation == "relu":
            give(node.operands[0], graph.make("where_positive", node, d))
    return received


def _depends(node: Node, gates: Container[Node]) -> bool:
    """Whether a value needs a gate's share itself, which the backward has no more unless it is kept."""
    if node in gates:
        return True
    if node.operation in ACTIVATIONS and _depends(node.operands[0], gates):
        # It is kept itself.
        return False
    return any(_depends(operand, gates) for operand in node.operands)


def _kept(graph: Graph, sums: dict[str, Node], apart: str | None, wanted: Sequence[Node]) -> dict[str, Node]:
    """What the forward keeps: of the values that the backward reads, those that it cannot compute from others.

    An activation of a gate is kept, so that derivatives come from results; what else follows from what is kept is computed
    again. A gate's block of the tape holds what is kept of it; what finds no such place has a block of its own.
    """
    available = {graph.leaf("state", name) for name in graph.states} | {*graph.after}
    gates = {*sums.values(), *(graph.leaf(kind, gate) for kind in "xw" for gate in graph.gates if gate not in sums)}
    shares: list[Node] = []
    if apart is not None:
        shares.append(graph.leaf("w", graph.gates[-1]))
        gates -= {*shares}
        available |= {*shares}
    kept: dict[Node, None] = {}

    def need(node: Node) -> None:
        if node in available or node in kept or node.operation in ("constant", "gradient"):
            return
        if node in gates or (node.operation in ACTIVATIONS and _depends(node.operands[0], gates)):
            kept[node] = None
            return
        for operand in node.operands:
            need(operand)

    # A gate's share that is kept itself leaves its activations to be computed again: so once more, without it among the gates.
    while True:
        for node in wanted:
            need(node)
        found = [node for node in kept if node in gates]
        if not found:
            break
        shares += found
        gates -= {*found}
        available |= {*found}
        kept.clear()
    blocks: dict[str, Node] = {} if apart is None else {apart: shares.pop(0)}
    rest: list[Node] = []
    kept = {**dict.fromkeys(shares), **kept}
    for node in kept:
        # The gates that it is made of, as far as they are not in another kept value.
        reached = {node, *order(node.operands, kept.__contains__)}
        for gate in graph.gates:
            if gate not in blocks and (sums.get(gate) in reached or graph.leaf("x", gate) in reached):
                blocks[gate] = node
                break
        else:
            rest.append(node)
    if len(graph.after) > 1:
        blocks[graph.states[1]] = graph.after[1]
    for node in rest:
        blocks[_free_name("kept", tuple(blocks) + graph.gates)] = node
    # Gates first, in their order.
    return {name: blocks[name] for name in (*graph.gates, *blocks) if name in blocks}


def _uses_state(graph: Graph, roots: Sequence[Node], name: str) -> bool:
    return graph.leaf("state", name) in order(roots)


def _reads(
    graph: Graph,
    kept: dict[str, Node],
    gradients: Sequence[Node],
    d_gates: dict[str, Node],
    d_before: Sequence[Node | None],
    name: str,
) -> bool:
    """Whether the backward reads a state before the step."""
    stop = {*kept.values(), *gradients, graph.after[0]}
    roots = [*d_gates.values(), *(each for each in d_before if each is not None)]
    return graph.leaf("state", name) in order(roots, stop.__contains__)


def equations_of(derived: Derived, body: object) -> Equations:
    """The cell in plain torch: its body, called with tensors."""
    graph, cell = derived.graph, derived.cell
    assert callable(body)

    def step(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        x, w = gates_x.chunk(len(graph.gates), dim=-1), gates_h.chunk(len(graph.gates), dim=-1)
        after = called(graph.name, graph.gates, body, x, w, states)
        leaves = {graph.leaf("state", name): value for name, value in zip(graph.states, states, strict=True)}
        for gate, of_x, of_h in zip(graph.gates, x, w, strict=True):
            leaves[graph.leaf("x", gate)], leaves[graph.leaf("w", gate)] = of_x, of_h
        # The bodies' own results, so that the equations alone say what they are.
        leaves |= dict(zip(graph.after, after, strict=True))
        written = dict(zip(derived.kept, evaluate(list(derived.kept.values()), leaves, x[0]), strict=True))
        return tuple(after), tuple(written[block] if block in written else x[0] for block in cell.tape)

    def backward(
        tape: tuple[Tensor, ...], before: tuple[Tensor, ...], out: Tensor, d_after: tuple[Tensor, ...]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        return backward_in_torch(derived, tape, before, out, d_after)

    return Equations(cell, step, backward=backward)


def backward_in_torch(
    derived: Derived, tape: Sequence[Tensor], states: Sequence[Tensor], out: Tensor, d_after: Sequence[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The derived backward of one step, in plain torch: what the kernels' are the same as.

    Args:
        tape: the blocks of the tape.
        states: before the step.
        out: h after it.
        d_after: the gradients of the states after it.

    Returns:
        the blocks of d_gates, and the gradients of the states before, that of h without the product's.
    """
    graph, cell = derived.graph, derived.cell
    leaves = {graph.leaf("state", name): value for name, value in zip(graph.states, states, strict=True)}
    leaves[graph.after[0]] = out
    leaves |= {derived.kept[block]: value for block, value in zip(cell.tape, tape, strict=True) if block in derived.kept}
    leaves |= dict(zip(derived.gradients, d_after, strict=True))
    blocks = dict(zip(derived.d_gates, evaluate(list(derived.d_gates.values()), leaves, out), strict=True))
    before = [torch.zeros_like(out) if node is None else evaluate([node], leaves, out)[0] for node in derived.d_before]
    return blocks, before
