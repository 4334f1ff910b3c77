"""Cells as equations: a function of one step is traced into a graph of operations on units.

The body of a cell is written as a paper prints it. Called with tensors, it computes one step, which is the reference. Called
once with the symbols of this file, it gives a ``Graph``, from which ``fused_rnn.cells.derivation`` derives all that a backend
needs: what is kept for the backward, the backward itself, and the cell's row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Graph", "Node", "relu", "sigmoid", "tanh", "trace"]

# Functions of one value whose derivative follows from their result.
ACTIVATIONS = ("sigmoid", "tanh", "relu")
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


@dataclass(frozen=True, eq=False)
class Node:
    """A value of every unit: a leaf, or an operation on other values. Equal ones of a graph are the same object.

    Attributes:
        operation: ``"x"`` (a gate's share of the input), ``"w"`` (its share of h), ``"state"``, ``"constant"``, ``"gradient"``,
            or one of add, sub, mul, div, neg, the activations, and where_positive.
        operands: what it is an operation on.
        value: the name of a leaf, or a constant's number.
    """

    graph: Graph = field(repr=False)
    operation: str
    operands: tuple[Node, ...] = ()
    value: Any = None

    def _with(self, operation: str, other: Any, swapped: bool = False) -> Node:
        other = self.graph.as_node(other)
        pair = (other, self) if swapped else (self, other)
        return self.graph.make(operation, *pair)

    def __add__(self, other: Any) -> Node:
        return self._with("add", other)

    def __radd__(self, other: Any) -> Node:
        return self._with("add", other, swapped=True)

    def __sub__(self, other: Any) -> Node:
        return self._with("sub", other)

    def __rsub__(self, other: Any) -> Node:
        return self._with("sub", other, swapped=True)

    def __mul__(self, other: Any) -> Node:
        return self._with("mul", other)

    def __rmul__(self, other: Any) -> Node:
        return self._with("mul", other, swapped=True)

    def __truediv__(self, other: Any) -> Node:
        return self._with("div", other)

    def __rtruediv__(self, other: Any) -> Node:
        return self._with("div", other, swapped=True)

    def __neg__(self) -> Node:
        return self.graph.make("neg", self)

    def sigmoid(self) -> Node:
        """σ of it."""
        return self.graph.make("sigmoid", self)

    def tanh(self) -> Node:
        """Its hyperbolic tangent."""
        return self.graph.make("tanh", self)

    def relu(self) -> Node:
        """Itself where positive, else zero."""
        return self.graph.make("relu", self)

    def _unknown(self, other: Any) -> Any:
        known = ", ".join(("+", "-", "*", "/", *ACTIVATIONS))
        raise TypeError(f"{self.graph.name}: expected an operation of the language ({known}), got another operator")

    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _unknown
    __lt__ = __le__ = __gt__ = __ge__ = _unknown

    def __bool__(self) -> bool:
        raise TypeError(f"{self.graph.name}: an equation cannot branch on a value; every unit goes the same way")

    def __getattr__(self, name: str) -> Any:
        # Python asks for names of its own with underscores.
        if name.startswith("_"):
            raise AttributeError(name)
        known = ", ".join(("+", "-", "*", "/", *ACTIVATIONS))
        raise AttributeError(f"{self.graph.name}: {name}: expected an operation of the language ({known})")


class Graph:
    """The operations of one cell, each once.

    Attributes:
        name: of the cell, for messages.
        gates: their names, in the order of the weights' rows.
        states: their names, h first.
        after: the states after the step.
        later: the gates whose product is with ``operand`` and not with h: the last ones, or none.
        operand: what they multiply, which the step makes; None where there are no such gates.
    """

    def __init__(self, name: str, gates: tuple[str, ...], states: tuple[str, ...]) -> None:
        self.name, self.gates, self.states = name, gates, states
        self.after: tuple[Node, ...] = ()
        self.later: tuple[str, ...] = ()
        self.operand: Node | None = None
        self._nodes: dict[tuple[Any, ...], Node] = {}

    @property
    def roots(self) -> tuple[Node, ...]:
        """All that a step has to compute."""
        return self.after if self.operand is None else (*self.after, self.operand)

    def is_late(self, node: Node) -> bool:
        """Whether a value has a share of a later gate in it: it is of the second stage of the forward."""
        shares = {self.leaf("w", gate) for gate in self.later}
        return not shares.isdisjoint(order([node]))

    def make(self, operation: str, *operands: Node, value: Any = None) -> Node:
        """A node, the same for the same operands; what ones and zeros leave of it."""
        simple = self._simplified(operation, operands)
        if simple is not None:
            return simple
        key = (operation, value, *map(id, operands))
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(self, operation, operands, value)
        return node

    def leaf(self, kind: str, name: str) -> Node:
        """An input of the step."""
        return self.make(kind, value=name)

    def constant(self, number: float) -> Node:
        """A number, the same for every unit."""
        # The text of a kernel has no word for the others.
        if not math.isfinite(number):
            raise ValueError(f"{self.name}: expected a finite number, got {number}")
        return self.make("constant", value=float(number))

    def as_node(self, value: Any) -> Node:
        """A node or a number as a node."""
        if isinstance(value, Node):
            if value.graph is not self:
                raise TypeError(f"{self.name}: expected values of this cell, got one of {value.graph.name}")
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self.name}: expected a value of the step or a number, got {type(value).__name__}")
        return self.constant(value)

    def _simplified(self, operation: str, operands: tuple[Node, ...]) -> Node | None:
        numbers = [each.value if each.operation == "constant" else None for each in operands]
        if operation == "neg" and numbers[0] is not None:
            return self.constant(-numbers[0])
        if operation not in _ARITHMETIC:
            return None
        left, right = operands
        if operation == "add":
            if right.operation == "neg":
                return self.make("sub", left, *right.operands)
            if left.operation == "neg":
                return self.make("sub", right, *left.operands)
            return right if numbers[0] == 0 else left if numbers[1] == 0 else None
        if operation == "sub":
            if right.operation == "neg":
                return self.make("add", left, *right.operands)
            return left if numbers[1] == 0 else None
        if operation == "mul":
            if 0 in numbers:
                return self.constant(0)
            return right if numbers[0] == 1 else left if numbers[1] == 1 else None
        return left if numbers[1] == 1 else None


def order(roots: Sequence[Node], known: Callable[[Node], bool] = lambda node: False) -> list[Node]:
    """All nodes that ``roots`` are made of, operands first; ``known`` ones as leaves."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node in found:
            return
        if not known(node):
            for operand in node.operands:
                visit(operand)
        found[node] = None

    for root in roots:
        visit(root)
    return list(found)


class _Inputs:
    """``x``: for each gate W_ig x + b_ig."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self._name, self._values = name, values

    def __getattr__(self, gate: str) -> Any:
        if gate.startswith("__"):
            raise AttributeError(gate)
        if gate not in self._values:
            raise AttributeError(f"{self._name}: x.{gate}: expected one of its gates, {', '.join(self._values)}")
        return self._values[gate]


class _Products:
    """``W``: for each gate the function v -> W_hg v + b_hg, of which the value is known; ``called`` is told of each call."""

    def __init__(self, name: str, values: dict[str, Any], called: Callable[[str, Any], None]) -> None:
        self._name, self._values, self._called = name, values, called

    def __getattr__(self, gate: str) -> Any:
        if gate.startswith("__"):
            raise AttributeError(gate)
        if gate not in self._values:
            raise AttributeError(f"{self._name}: W.{gate}: expected one of its gates, {', '.join(self._values)}")

        def product(operand: Any) -> Any:
            self._called(gate, operand)
            return self._values[gate]

        return product


def trace(name: str, gates: tuple[str, ...], states: tuple[str, ...], body: Callable[..., Any]) -> Graph:
    """Run the body of a cell once, with symbols.

    Raises:
        TypeError: if the body does something with a value that the language lacks, or returns something else than its states.
        ValueError: if it does not return all of its states, a gate is never used, or products are with what no kernel has.
    """
    graph = Graph(name, gates, states)
    before = [graph.leaf("state", state) for state in states]
    operands: dict[str, Node] = {}

    def called(gate: str, operand: Any) -> None:
        node = graph.as_node(operand)
        if operands.setdefault(gate, node) is not node:
            raise ValueError(f"{name}: W.{gate}: expected the same operand wherever it is used, got two")

    x = _Inputs(name, {gate: graph.leaf("x", gate) for gate in gates})
    w = _Products(name, {gate: graph.leaf("w", gate) for gate in gates}, called)
    graph.after = _states(graph, body(x, w, *before))
    _find_stages(graph, operands)
    used = {(node.operation, node.value) for node in order(graph.roots)}
    for gate in gates:
        for kind, word in (("x", f"x.{gate}"), ("w", f"W.{gate}")):
            if (kind, gate) not in used:
                raise ValueError(f"{name}: {word}: expected every gate in the equations, with x and with W; it is never used")
    return graph


def _find_stages(graph: Graph, operands: dict[str, Node]) -> None:
    """Tell the gates that multiply h from those that multiply something that the step makes of it."""
    h = graph.leaf("state", "h")
    later = tuple(gate for gate in graph.gates if operands.get(gate, h) is not h)
    if not later:
        return
    first = graph.gates[: len(graph.gates) - len(later)]
    if not first:
        raise ValueError(
            f"{graph.name}: W: expected a product with h, got {', '.join(f'W.{gate}' for gate in later)} of others"
        )
    if graph.gates[len(first) :] != later:
        raise ValueError(
            f"{graph.name}: W.{later[0]}: only the last gates may multiply another value than h; put {later[0]!r} last in gates"
        )
    graph.later, graph.operand = later, operands[later[0]]
    for gate in later:
        if operands[gate] is not graph.operand:
            raise ValueError(f"{graph.name}: W.{gate}: expected what W.{later[0]} multiplies, or h; a step has two stages")
    made_of = order([graph.operand])
    for node in made_of:
        if node.operation in ("x", "w") and node.value in later:
            raise ValueError(
                f"{graph.name}: W.{later[0]}: expected an operand that is not made of the gate {node.value!r} itself"
            )
        if node.operation == "state" and node is not h:
            raise ValueError(f"{graph.name}: W.{later[0]}: expected an operand made of h and gates, got one of {node.value!r}")
    if not any(node.operation in ("x", "w", "state") for node in made_of):
        raise ValueError(f"{graph.name}: W.{later[0]}: expected an operand with a value for each unit, got a number")


def _states(graph: Graph, result: Any) -> tuple[Node, ...]:
    found = result if isinstance(result, tuple) else (result,)
    expected = ", ".join(graph.states)
    if len(found) != len(graph.states):
        raise ValueError(f"{graph.name}: expected the states after the step, {expected}, got {len(found)} values")
    return tuple(graph.as_node(each) for each in found)


def called(graph: Graph, body: Callable[..., Any], x: Sequence[Any], w: Sequence[Any], states: Any) -> Any:
    """Call a body with tensors: the blocks of the gates, and the states."""

    def check(gate: str, operand: Any) -> None:
        if gate not in graph.later and operand is not states[0]:
            raise TypeError(f"{graph.name}: W.{gate}: expected h, the state before the step, as when the cell was defined")

    products = _Products(graph.name, dict(zip(graph.gates, w, strict=True)), check)
    result = body(_Inputs(graph.name, dict(zip(graph.gates, x, strict=True))), products, *states)
    return result if isinstance(result, tuple) else (result,)


def sigmoid(value: Any) -> Any:
    """1 / (1 + exp(−value)), of a tensor or of a value in an equation."""
    return value.sigmoid()


def tanh(value: Any) -> Any:
    """The hyperbolic tangent, of a tensor or of a value in an equation."""
    return value.tanh()


def relu(value: Any) -> Any:
    """max(0, value), of a tensor or of a value in an equation."""
    return value.relu()


def evaluate(roots: Sequence[Node], leaves: dict[Node, Tensor], like: Tensor) -> list[Tensor]:
    """The values of nodes, from those of leaves."""
    values: dict[Node, Any] = dict(leaves)
    for node in order(roots, lambda node: node in leaves):
        if node in values:
            continue
        operands = [values[each] for each in node.operands]
        values[node] = _computed(node, operands, like)
    return [values[root] for root in roots]


def _computed(node: Node, operands: list[Any], like: Tensor) -> Any:
    if node.operation == "constant":
        return like.new_full(like.shape, node.value)
    if node.operation in ACTIVATIONS:
        return getattr(operands[0], node.operation)()
    if node.operation == "neg":
        return -operands[0]
    if node.operation == "where_positive":
        # As the derivative of relu in torch: NaN passes.
        return operands[1].masked_fill(operands[0] <= 0, 0)
    left, right = operands
    return {"add": left.add, "sub": left.sub, "mul": left.mul, "div": left.div}[node.operation](right)
