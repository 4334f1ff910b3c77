"""What follows from a cell's equations: which biases add up, what the backward keeps, the backward, and the cell's row.

A backend makes its pointwise parts of a ``Derived``: the forward computes ``after`` and what is kept, the backward computes
``d_gates``, ``direct`` and the gradient of the other state. Legend as in ``fused_rnn.data.cell``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fused_rnn.cells.language import ACTIVATIONS, Graph, Node, evaluate, order
from fused_rnn.data.cell import Cell

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Derived:
    """A cell as its graph says it is.

    The first stage of the forward computes what is kept of values that no later gate has a share in, the operand among them;
    the second the rest. The backward has its stages the other way round: the first from the gradients of the states, the
    second, of a cell with later gates, from the gradient that their product gives the operand. It adds to what the first made.

    Attributes:
        graph: the equations, forward and backward.
        cell: the row.
        sums: for each gate whose shares are only ever added up, that sum.
        kept: block of the tape -> what the forward writes there; a gate's block that is not here is not read.
        gradients: of the states after the step, leaves of the backward.
        d_gates: block -> its gradient, of the first stage; a block may be of the second stage alone.
        d_before: the gradients of the states before the step; of h, what does not come by the product. None for zero.
        d_operand: the gradient of the operand, a leaf of the second stage; None where there is none.
        later_d_gates: block -> its gradient, of the second stage.
        later_direct: the gradient of h before the step that the second stage adds, or None.
    """

    graph: Graph
    cell: Cell
    sums: dict[str, Node]
    kept: dict[str, Node]
    gradients: tuple[Node, ...]
    d_gates: dict[str, Node]
    d_before: tuple[Node | None, ...]
    d_operand: Node | None
    later_d_gates: dict[str, Node]
    later_direct: Node | None

    def available(self) -> set[Node]:
        """What the first stage of a backward can read: what is kept, the states before the step and h after it."""
        graph = self.graph
        states = [graph.leaf("state", name) for name in graph.states]
        return {*self.kept.values(), *states, *self.gradients, graph.after[0]}

    def available_later(self) -> set[Node]:
        """What the second stage of a backward can read: what is kept, and h before the step."""
        assert self.d_operand is not None
        return {*self.kept.values(), self.graph.leaf("state", "h"), self.d_operand}


@dataclass(frozen=True)
class Row:
    """What a cell's row says beside what follows from its equations.

    Attributes:
        name, mode, forget, in_one_piece: as in ``fused_rnn.data.cell.Cell``.
        projects: whether h may be projected.
    """

    name: str
    mode: str
    forget: str | None = None
    in_one_piece: bool = False
    projects: bool = False


def derive(graph: Graph, given: Row | None = None) -> Derived:
    """Derive all from the traced equations of a step.

    Args:
        given: what the row says beside; None for a user's cell.

    Raises:
        ValueError: if the kernels have no way for what the equations ask for; the message names the cell and the equation.
    """
    sums = _sums(graph)
    apart = next((gate for gate in graph.gates if gate not in sums), None)
    gradients = tuple(graph.leaf("gradient", state) for state in graph.states)
    received = _backward(graph, graph.after, gradients)
    d_operand, received_later = None, {}
    if graph.operand is not None:
        d_operand = graph.leaf("gradient", "")
        received_later = _backward(graph, (graph.operand,), (d_operand,))
    later_d_gates = {gate: received_later[node] for gate, node in sums.items() if node in received_later}
    zero, h = graph.constant(0), graph.leaf("state", "h")
    d_gates = {}
    for gate in graph.gates:
        node = sums[gate] if gate in sums else graph.leaf("x", gate)
        if node in received or gate not in later_d_gates:
            d_gates[gate] = received.get(node, zero)
    block = None
    if apart is not None:
        block = _free_name(f"h{apart}", (*graph.gates, *graph.states))
        d_gates = {block: received.get(graph.leaf("w", apart), zero), **d_gates}
    d_before = tuple(received.get(graph.leaf("state", name)) for name in graph.states)
    later_direct = received_later.get(h)
    first = [*d_gates.values(), *(each for each in d_before if each is not None)]
    second = [*later_d_gates.values(), *([] if later_direct is None else [later_direct])]
    kept = _kept(graph, sums, block, first, second)
    read = [name for name in graph.states if _reads(graph, kept, first, second, name)]
    operand = next((name for name, node in kept.items() if name not in graph.gates and node is graph.operand), None)
    cell = Cell(
        f"{graph.name}_{signature(graph)}" if given is None else given.name,
        graph.name if given is None else given.mode,
        graph.gates,
        graph.states,
        tape=(*graph.gates, *(name for name in kept if name not in graph.gates)),
        d_gates=graph.gates if block is None else (block, *graph.gates),
        reads_before=read[-1] if read else None,
        direct=h in order(graph.roots),
        apart=block,
        later=graph.later,
        operand=operand,
        tape_is_out=graph.gates == graph.states == ("h",) and not kept,
        derived=given is None,
        **({} if given is None else _given(graph, kept, given)),
    )
    return Derived(graph, cell, sums, kept, gradients, d_gates, d_before, d_operand, later_d_gates, later_direct)


def _given(graph: Graph, kept: dict[str, Node], given: Row) -> dict[str, Any]:
    """The fields of a row that do not follow from the equations."""

    def projected(tape: Sequence[Tensor]) -> Tensor:
        leaves = dict(zip(kept.values(), tape, strict=True))
        return evaluate([graph.after[0]], leaves, tape[0])[0]

    return {
        "forget": given.forget,
        "in_one_piece": given.in_one_piece,
        "projected": projected if given.projects else None,
    }


def signature(graph: Graph) -> str:
    """A short name that cells with the same equations share, and no others do."""
    numbers: dict[Node, int] = {}
    lines = [repr((graph.gates, graph.states))]
    for number, node in enumerate(order(graph.roots)):
        numbers[node] = number
        lines.append(repr((node.operation, node.value, [numbers[each] for each in node.operands])))
    lines.append(repr(([numbers[node] for node in graph.roots], graph.later)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _sums(graph: Graph) -> dict[str, Node]:
    """The gates whose two shares are used as their sum alone."""
    nodes = order(graph.roots)
    found: dict[str, Node] = {}
    for number, gate in enumerate(graph.gates):
        x, w = graph.leaf("x", gate), graph.leaf("w", gate)
        users = [node for node in nodes if x in node.operands or w in node.operands]
        bare = [node for node in graph.roots if node in (x, w)]
        if len(users) == 1 and not bare and users[0].operation == "add" and set(users[0].operands) == {x, w}:
            found[gate] = users[0]
        elif number + 1 < len(graph.gates) or graph.later:
            last = "of a step with two stages none" if graph.later else f"or put {gate!r} last in gates"
            raise ValueError(
                f"{graph.name}: W.{gate}: only the last gate's share of h may be apart from x.{gate}: "
                f"use x.{gate} + W.{gate}(…), {last}"
            )
    return found


def _free_name(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _backward(graph: Graph, roots: Sequence[Node], gradients: Sequence[Node]) -> dict[Node, Node]:
    """The gradient that each node receives from those of ``roots``, by reverse differentiation."""
    received: dict[Node, Node] = {}

    def give(node: Node, gradient: Node) -> None:
        received[node] = received[node] + gradient if node in received else gradient

    for root, gradient in zip(roots, gradients, strict=True):
        give(root, gradient)
    one = graph.constant(1)
    for node in reversed(order(roots)):
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


def gradients_of(derived: Derived) -> dict[Node, Node]:
    """The gradients that values receive in the first stage of the backward, from those of the states after the step."""
    return _backward(derived.graph, derived.graph.after, derived.gradients)


def _depends(node: Node, gates: Container[Node]) -> bool:
    """Whether a value needs a gate's share itself, which the backward has no more unless it is kept."""
    if node in gates:
        return True
    if node.operation in ACTIVATIONS and _depends(node.operands[0], gates):
        # It is kept itself.
        return False
    return any(_depends(operand, gates) for operand in node.operands)


def _kept(
    graph: Graph, sums: dict[str, Node], apart: str | None, first: Sequence[Node], second: Sequence[Node]
) -> dict[str, Node]:
    """What the forward keeps: of the values that other stages read, those that they cannot compute from others.

    An activation of a gate is kept, so that derivatives come from results; what else follows from what is kept is computed
    again. A gate's block of the tape holds what is kept of it; what finds no such place has a block of its own.

    Args:
        first, second: what the stages of the backward compute.
    """
    before = {graph.leaf("state", name) for name in graph.states}
    h = graph.leaf("state", "h")
    gates = {*sums.values(), *(graph.leaf(kind, gate) for kind in "xw" for gate in graph.gates if gate not in sums)}
    of_later = {sums[gate] for gate in graph.later}
    shares: list[Node] = []
    if apart is not None:
        shares.append(graph.leaf("w", graph.gates[-1]))
        gates -= {*shares}
    kept: dict[Node, None] = {}

    def need(node: Node, available: Container[Node], has_later: bool = False) -> None:
        if node in available or node in shares or node in kept or node.operation in ("constant", "gradient"):
            return
        lost = node in gates or (node.operation in ACTIVATIONS and _depends(node.operands[0], gates))
        if lost and not (has_later and graph.is_late(node)):
            kept[node] = None
            return
        for operand in node.operands:
            need(operand, available, has_later)

    # What the second stage of the forward has: the later gates themselves, and c where the first stage made it.
    in_forward = before | of_later | {node for node in graph.after[1:] if not graph.is_late(node)}
    # A gate's share that is kept itself leaves its activations to be computed again: so once more, without it among the gates.
    while True:
        for node in first:
            need(node, {*before, *graph.after})
        for node in second:
            need(node, {h})
        if graph.later:
            for node in (graph.after[0], *[each for each in (*kept, *graph.after[1:]) if graph.is_late(each)]):
                for each in node.operands if node in kept else (node,):
                    need(each, in_forward, has_later=True)
        found = [node for node in kept if node in gates]
        if not found:
            break
        shares += found
        gates -= {*found}
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
    if graph.operand is not None:
        blocks[_free_name("m", (*graph.gates, *graph.states))] = graph.operand
    for node in rest:
        blocks[_free_name("kept", tuple(blocks) + graph.gates)] = node
    # Gates first, in their order.
    return {name: blocks[name] for name in (*graph.gates, *blocks) if name in blocks}


def _reads(graph: Graph, kept: dict[str, Node], first: Sequence[Node], second: Sequence[Node], name: str) -> bool:
    """Whether the backward reads a state before the step."""
    state = graph.leaf("state", name)
    known = {*kept.values()}
    return state in order(first, {*known, graph.after[0]}.__contains__) or state in order(second, known.__contains__)
