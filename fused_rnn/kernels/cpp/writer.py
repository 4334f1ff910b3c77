"""Values of a cell's equations as statements of C++. Nothing here needs torch, which a build does not have."""

from __future__ import annotations

from collections.abc import Container, Sequence

from fused_rnn.cells.derivation import Derived, gradients_of
from fused_rnn.cells.language import Node, order
from fused_rnn.kernels.written import Writer

# The activations that kernels compute several of at once (``activate`` in csrc/walk/simd.h), in the order that it wants.
_SIDE_BY_SIDE = ("sigmoid", "tanh")
_MOST_SIDE_BY_SIDE = 4


class CppWriter(Writer):
    """Values as statements of C++: a name for each that is used twice or is an activation, the others inside those."""

    def __init__(self, derived: Derived, roots: Sequence[Node], known: Container[Node] = ()) -> None:
        super().__init__(roots, known)
        self.wanted = _good_names(derived)
        # Those of the functions' arguments, and of what the text uses beside.
        self._taken = {"io", "recurrent", "p", "tape", "T", "Io", "H", "one", "d_h", "d_operand"}
        if any(node.operation == "constant" and node.value == 1 for node in self.nodes):
            self.lines.append(self.line("one", "broadcast<T>(1)"))

    def line(self, name: str, source: str) -> str:
        """The statement that gives a value its name."""
        return f"const Vec<T> {name} = {source};"

    def needs(self, node: Node) -> bool:
        """Whether a value is part of what is to be written, and has no name yet."""
        return node in self.nodes and node not in self.names

    def give(self, node: Node, source: str, name: str) -> None:
        """Have a value come from memory, if it is used."""
        if self.needs(node):
            self.names[node] = self._free(name)
            self.lines.append(self.line(self.names[node], source))

    def give_sum(self, node: Node, source: str, name: str, maybe: str) -> None:
        """The same, where a second pointer adds to it or is null."""
        if self.needs(node):
            self.names[node] = name = self._free(name)
            self.lines += [f"Vec<T> {name} = {source};", f"if ({maybe}) {name} += io.load({maybe});"]

    def activate(self) -> None:
        """Write the activations, together those that do not wait for one another: each is a long chain of operations."""
        waiting = [node for node in self.nodes if node.operation in _SIDE_BY_SIDE and node not in self.names]
        while waiting:
            ready = [node for node in waiting if not {*waiting} & {*order(node.operands, self.names.__contains__)}]
            ready = sorted(ready, key=lambda node: _SIDE_BY_SIDE.index(node.operation))[:_MOST_SIDE_BY_SIDE]
            waiting = [node for node in waiting if node not in ready]
            arguments = [self.write(node.operands[0]) for node in ready]
            names = [self.new_name(node) for node in ready]
            self.names.update(zip(ready, names, strict=True))
            if len(ready) == 1:
                self.lines.append(self.line(names[0], f"{ready[0].operation}<T>({arguments[0]})"))
                continue
            counts = [sum(node.operation == kind for node in ready) for kind in _SIDE_BY_SIDE]
            group = self._free("group")
            self.lines.append(f"Vec<T> {group}[{len(ready)}] = {{{', '.join(arguments)}}};")
            self.lines.append(f"activate<T, {counts[0]}, {counts[1]}>({group});")
            self.lines.append("const Vec<T> " + ", ".join(f"{name} = {group}[{i}]" for i, name in enumerate(names)) + ";")

    def named(self, node: Node) -> str:
        """A value under a name, for what is written more than once."""
        source = self.write(node)
        if node in self.names or node.operation == "constant":
            return source
        self.names[node] = name = self.new_name(node)
        self.lines.append(self.line(name, source))
        return name

    def has_line(self, node: Node) -> bool:
        """Whether a value has a statement and a name of its own."""
        return super().has_line(node) and node.operation != "constant"

    def new_name(self, node: Node) -> str:
        """The name of a value that has a statement."""
        wanted = self.wanted.get(node)
        if wanted is None and node.operation in _SIDE_BY_SIDE and node.operands[0] in self.names:
            wanted = f"{node.operation}_{self.names[node.operands[0]]}"
        return self._free("v" if wanted is None else wanted)

    def number(self, value: float) -> str:
        """A number as a vector of it."""
        return "Vec<T>{}" if value == 0 else "one" if value == 1 else f"broadcast<T>(T({value!r}))"

    def call(self, node: Node) -> str:
        """A function of vectors."""
        return f"{node.operation}<T>({', '.join(self.write(each) for each in node.operands)})"

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
