"""Values of a cell's equations as statements of C++. Nothing here needs torch, which a build does not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence

from fused_rnn.cells.derivation import Derived, gradients_of
from fused_rnn.cells.language import Node, order

_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
# The activations that kernels compute several of at once (``activate`` in csrc/walk/simd.h), in the order that it wants.
_SIDE_BY_SIDE = ("sigmoid", "tanh")
_MOST_SIDE_BY_SIDE = 4


class Writer:
    """Writes values as statements of C++: a name for each that is used twice or is an activation, the others inside those."""

    def __init__(self, derived: Derived, roots: Sequence[Node], known: Container[Node] = ()) -> None:
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self._roots = roots
        self._nodes = order(roots, known.__contains__)
        self.uses = Counter(each for node in self._nodes if node not in known for each in node.operands) + Counter(roots)
        self.wanted = _good_names(derived)
        # Those of the functions' arguments, and of what the text uses beside.
        self._taken = {"io", "recurrent", "p", "tape", "T", "Io", "H", "one", "d_h", "d_operand"}
        if any(node.operation == "constant" and node.value == 1 for node in self._nodes):
            self.lines.append("const Vec<T> one = broadcast<T>(1);")

    def needs(self, node: Node) -> bool:
        """Whether a value is part of what is to be written, and has no name yet."""
        return node in self._nodes and node not in self.names

    def give(self, node: Node, source: str, name: str) -> None:
        """Have a value come from memory, if it is used."""
        if self.needs(node):
            self.names[node] = self._free(name)
            self.lines.append(f"const Vec<T> {self.names[node]} = {source};")

    def give_sum(self, node: Node, source: str, name: str, maybe: str) -> None:
        """The same, where a second pointer adds to it or is null."""
        if self.needs(node):
            self.names[node] = name = self._free(name)
            self.lines += [f"Vec<T> {name} = {source};", f"if ({maybe}) {name} += io.load({maybe});"]

    def activate(self) -> None:
        """Write the activations, together those that do not wait for one another: each is a long chain of operations."""
        waiting = [node for node in self._nodes if node.operation in _SIDE_BY_SIDE and node not in self.names]
        while waiting:
            ready = [node for node in waiting if not {*waiting} & {*order(node.operands, self.names.__contains__)}]
            ready = sorted(ready, key=lambda node: _SIDE_BY_SIDE.index(node.operation))[:_MOST_SIDE_BY_SIDE]
            waiting = [node for node in waiting if node not in ready]
            arguments = [self._text(node.operands[0])[0] for node in ready]
            names = [self._name(node) for node in ready]
            if len(ready) == 1:
                self.lines.append(f"const Vec<T> {names[0]} = {ready[0].operation}<T>({arguments[0]});")
                continue
            counts = [sum(node.operation == kind for node in ready) for kind in _SIDE_BY_SIDE]
            group = self._free("group")
            self.lines.append(f"Vec<T> {group}[{len(ready)}] = {{{', '.join(arguments)}}};")
            self.lines.append(f"activate<T, {counts[0]}, {counts[1]}>({group});")
            self.lines.append("const Vec<T> " + ", ".join(f"{name} = {group}[{i}]" for i, name in enumerate(names)) + ";")

    def write(self, node: Node) -> str:
        """A value as an expression; the lines that it needs are written before."""
        return self._text(node)[0]

    def named(self, node: Node) -> str:
        """A value under a name, for what is written more than once."""
        source = self.write(node)
        if node not in self.names and node.operation != "constant":
            self.lines.append(f"const Vec<T> {self._name(node)} = {source};")
            return self.names[node]
        return source

    def _text(self, node: Node) -> tuple[str, int]:
        """An expression, and how tightly it holds together: 3 for a name or a call, 2 for a product, 1 for a sum."""
        if node in self.names:
            return self.names[node], 3
        source, tight = self._expression(node)
        if self.uses[node] > 1 and node.operation != "constant":
            self.lines.append(f"const Vec<T> {self._name(node)} = {source};")
            return self.names[node], 3
        return source, tight

    def _expression(self, node: Node) -> tuple[str, int]:
        if node.operation == "constant":
            number = "Vec<T>{}" if node.value == 0 else "one" if node.value == 1 else f"broadcast<T>(T({node.value!r}))"
            return number, 3
        operands = [self._text(each) for each in node.operands]
        if node.operation in _OPERATORS:
            own = 1 if node.operation in ("add", "sub") else 2
            (left, of_left), (right, of_right) = operands
            left = left if of_left >= own else f"({left})"
            # The order of the operations is that of the equations.
            right = right if of_right > own else f"({right})"
            return f"{left} {_OPERATORS[node.operation]} {right}", own
        if node.operation == "neg":
            source, tight = operands[0]
            return f"-{source}" if tight == 3 else f"-({source})", 2
        assert node.operation in ("relu", "where_positive", *_SIDE_BY_SIDE), node.operation
        return f"{node.operation}<T>({', '.join(source for source, _ in operands)})", 3

    def _name(self, node: Node) -> str:
        wanted = self.wanted.get(node)
        if wanted is None and node.operation in _SIDE_BY_SIDE and node.operands[0] in self.names:
            wanted = f"{node.operation}_{self.names[node.operands[0]]}"
        self.names[node] = name = self._free("v" if wanted is None else wanted)
        return name

    def _free(self, name: str) -> str:
        found, number = name, 1
        while found in self._taken:
            number += 1
            found = f"{name}{number}"
        self._taken.add(found)
        return found


def _good_names(derived: Derived) -> dict[Node, str]:
    """What values are called in the text, as far as the equations or the tape have a name for them, and their gradients."""
    graph = derived.graph
    values = dict(zip(graph.after, graph.states, strict=True)) | {node: block for block, node in derived.kept.items()}
    gradients = {
        **{node: f"d_gate_{block}" for block, node in derived.d_gates.items()},
        **{node: f"d_{state}_before" for state, node in zip(graph.states, derived.d_before, strict=True) if node is not None},
        **{gradient: f"d_{values[node]}" for node, gradient in gradients_of(derived).items() if node in values},
    }
    return gradients | values
