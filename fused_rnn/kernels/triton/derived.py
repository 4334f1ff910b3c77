"""The pointwise parts of a cell, made from its equations: the source that Triton compiles, as one would write it by hand.

Triton reads the source of what it compiles, so it is kept as a file in a folder of the user's; ``source_of`` shows it. What the
functions take and return says ``fused_rnn.kernels.triton.recurrence``.
"""

from __future__ import annotations

import functools
import keyword
import types
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from fused_rnn.cells.definition import DEFINED
from fused_rnn.cells.derivation import Derived
from fused_rnn.cells.language import ACTIVATIONS, Node, order
from fused_rnn.data.cell import Cell
from fused_rnn.kernels import written
from fused_rnn.kernels.triton.recurrence import RECURRENCES, Recurrence, Stage, carry_kind
from fused_rnn.kernels.written import PRODUCT, SIGN, SUM, Writer

_FUNCTIONS = ("everywhere", "relu", "sigmoid", "tanh", "where_positive")
_RESERVED = {*_FUNCTIONS, *keyword.kwlist, "float", "tl", "triton"}
_TEMPLATE = '''"""The pointwise parts of the cell {mode}, made from its equations by fused_rnn."""

import triton
import triton.language as tl  # the interpreter looks for it beside what it runs
{functions}{parts}'''
_FUNCTION = '''

@triton.jit
def {name}({arguments}):
    """{doc}"""
{body}'''


@dataclass(frozen=True)
class _Part:
    """One function.

    Attributes:
        blocks: those of the tape, or of d_gates, that it gives, a bit each.
        handed: how many values it hands to the second stage, or gets of the first.
        reads_out: whether it reads h after the step behind the tape.
    """

    name: str
    arguments: Sequence[str]
    doc: str
    text: str
    blocks: int
    handed: int = 0
    reads_out: bool = False


class _Writer(Writer):
    """Values as lines of what Triton compiles, in as few parentheses as Python needs.

    Args:
        chosen: values that have a line, and the names that they would like to have.
        arguments: the names that are taken.
    """

    def __init__(
        self, roots: Sequence[Node], known: Container[Node], chosen: dict[Node, str], arguments: Sequence[str]
    ) -> None:
        super().__init__(roots, known)
        self._chosen = chosen
        self._taken = {*_RESERVED, *arguments}
        # Values that come as sums of an argument's parts.
        self.sums: dict[Node, str] = {}

    def reads(self, node: Node) -> bool:
        """Whether a value is used."""
        return node in self.nodes

    def free_name(self, name: str) -> str:
        """The name, or one like it that nothing else has."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def unpack(self, values: Iterable[tuple[Node, str]], source: str) -> list[Node]:
        """Name the parts of a tuple that are used. Returns those.

        Args:
            values: the parts, in order, and the names that they would like to have. One that has a name is passed by.
        """
        parts = list(values)
        read = {i: node for i, (node, _) in enumerate(parts) if self.reads(node) and node not in self.names}
        for i, node in list(read.items()):
            if node in self.names:
                # The same value in two blocks.
                del read[i]
            else:
                self.names[node] = self.free_name(parts[i][1])
        if read:
            names = ", ".join(self.names[node] for node in read.values())
            whole = 1 < len(read) == len(parts)
            self.lines.append(f"{names} = {source if whole else ', '.join(f'{source}[{i}]' for i in read)}")
        return list(read.values())

    def has_line(self, node: Node) -> bool:
        return node.operation != "constant" and (super().has_line(node) or node in self._chosen)

    def new_name(self, node: Node) -> str:
        if node in self._chosen:
            return self.free_name(self._chosen[node])
        first = (*node.operands, node)[0]
        if node.operation in ("add", "sub") and first.operation == "gradient" and self.uses[first] == 1:
            # More of the same gradient.
            return self.names[first]
        if node.operation in ACTIVATIONS and first in self.names:
            return self.free_name(f"{node.operation}_{self.names[first]}")
        return self.free_name(super().new_name(node))

    def expression(self, node: Node) -> str:
        return self.sums[node] if node in self.sums else super().expression(node)

    def number(self, value: float) -> str:
        return repr(value)

    def call(self, node: Node) -> str:
        return f"{node.operation}({', '.join(map(self.tensor, node.operands))})"

    def binding(self, node: Node, source: str) -> int:
        own = SUM if node in self.sums and node not in self.names else super().binding(node, source)
        # A number may have a sign.
        return min(own, SIGN) if source.startswith("-") else own

    def tensor(self, node: Node) -> str:
        """A value as an argument or a result, which has one number for each unit even where it is the same for all."""
        source = self.write(node)
        if any(each.operation != "constant" and not each.operands for each in order([node])):
            return source
        return f"everywhere({self.like}, {source})"

    # A value of every unit.
    like = ""


# In the place of a block that another stage gives, or that nobody reads.
_NOTHING = "0.0"


def _bits(blocks: Sequence[str], given: Container[str]) -> int:
    return sum(1 << i for i, block in enumerate(blocks) if block in given)


def _tuple(values: Iterable[str]) -> str:
    found = list(values)
    return f"({', '.join(found)}{',' if len(found) == 1 else ''})"


def _carry(derived: Derived) -> tuple[str, Node | None]:
    """The argument with the carry before the step, and what it is of the graph."""
    kind, graph = carry_kind(derived.cell), derived.graph
    if kind == 0:
        return "carry", None
    state = graph.states[1] if kind == 1 else "h"
    return f"{state}_before", graph.leaf("state", state)


def _forward(derived: Derived, name: str, later: bool, read: Sequence[Node]) -> tuple[_Part, list[Node]]:
    """A stage of the forward, and the values of the first stage that the second reads.

    Args:
        later: whether it is the second stage.
        read: what the second one reads of the first, where this is the first.
    """
    graph, cell = derived.graph, derived.cell
    first, last = bool(cell.later) and not later, later or not cell.later
    carry, before = _carry(derived)
    arguments = (*(("handed",) if later else ()), "x", "product", "bias", carry)
    kept = {block: node for block, node in derived.kept.items() if graph.is_late(node) == later}
    early = [] if not later else [(node, block) for block, node in derived.kept.items() if block not in kept]
    roots = [*kept.values(), *read, *(graph.after if last else (graph.roots[-1],))]
    chosen = {graph.after[0]: "h"} if last else {}
    for block, node in kept.items():
        chosen.setdefault(node, block)
    sums: dict[Node, str] = {}
    for number, gate in enumerate(cell.later if later else cell.first):
        place = cell.gates.index(gate)
        of_x = f"x[{number}] + bias[{place}]"
        if gate in derived.sums:
            sums[derived.sums[gate]] = f"{of_x} + product[{number}]"
        else:
            sums[graph.leaf("x", gate)] = of_x
            sums[graph.leaf("w", gate)] = f"bias[{cell.num_gates}] + product[{number}]"
    writer = _Writer(roots, {*sums, *(node for node, _ in early)}, chosen, arguments)
    writer.sums, writer.like = sums, "x[0]"
    if before is not None:
        writer.names[before] = carry
    handed = []
    if later:
        # In the order in which it is handed over.
        handed = list(dict.fromkeys(node for node, _ in early if writer.reads(node)))
        blocks = dict(reversed(early))
        writer.unpack([(node, blocks[node]) for node in handed], "handed")
    tape = [writer.tensor(kept[block]) if block in kept else _NOTHING for block in cell.tape]
    if first:
        result = f"{writer.tensor(graph.roots[-1])}, {_tuple(map(writer.tensor, read))}"
        doc = "The first stage of a step: (the operand, what the second stage reads, the tape)."
    else:
        h = writer.tensor(graph.after[0])
        after = carry if before is None else h if len(graph.states) == 1 else writer.tensor(graph.after[1])
        result = f"{h}, {after}"
        doc = f"{'The second stage' if later else 'Take one step'}: (h, the new carry, the tape {', '.join(cell.tape)})."
    writer.lines.append(f"return {result}, {_tuple(tape)}")
    count = len(handed) if later else len(read)
    return _Part(name, arguments, doc, writer.text(), _bits(cell.tape, kept), count), handed


def _give_kept(writer: _Writer, derived: Derived, more: Sequence[tuple[Node, str]] = ()) -> None:
    """Name the blocks of the tape that are used. more: of what comes behind the tape."""
    kept, unread = derived.kept, derived.graph.leaf("gradient", "not read")
    writer.unpack([*((kept.get(block, unread), block) for block in derived.cell.tape), *more], "tape")


def _gradients(derived: Derived, blocks: dict[str, str]) -> str:
    return _tuple(blocks.get(block, _NOTHING) for block in derived.cell.d_gates)


def _backward(derived: Derived, name: str) -> _Part:
    """The backward's stage from the gradients of the states."""
    graph, cell = derived.graph, derived.cell
    carry, before = _carry(derived)
    direct, *others = derived.d_before
    of_carry = f"d_{graph.states[1]}" if others else "d_carry"
    arguments = ("tape", carry if before is not None else "before", "d_h", of_carry)
    roots = [*derived.d_gates.values(), *(each for each in derived.d_before if each is not None)]
    chosen: dict[Node, str] = {}
    for block, node in derived.d_gates.items():
        chosen.setdefault(node, f"d_{block}")
    writer = _Writer(roots, derived.available(), chosen, arguments)
    writer.like = "d_h"
    writer.names |= dict(zip(derived.gradients, ("d_h", of_carry), strict=False))
    if before is not None:
        writer.names[before] = carry
    h = graph.after[0]
    # Of some cells h after the step is the tape; else it comes behind the tape where it is read.
    behind = [] if cell.tape_is_out else [(h, "h")]
    if cell.tape_is_out:
        writer.unpack([(h, "h")], "tape")
    reads_out = bool(behind) and writer.reads(h) and h not in derived.kept.values() and h not in writer.names
    _give_kept(writer, derived, behind if reads_out else ())
    both = [block for block in derived.d_gates if block in derived.later_d_gates]
    found = {block: writer.tensor(node) for block, node in derived.d_gates.items()}
    own = {block: value for block, value in found.items() if block not in both}
    result = _gradients(derived, own)
    if cell.later:
        result += f", {_tuple(found[block] for block in both)}"
    result += f", {_NOTHING if direct is None else writer.write(direct)}"
    result += f", {of_carry if not others else _NOTHING if others[0] is None else writer.write(others[0])}"
    writer.lines.append(f"return {result}")
    doc = f"Differentiate one step: (d_gates {', '.join(cell.d_gates)}, what reaches h₋ past the product, the carry's)."
    if cell.later:
        doc = "Differentiate the second stage: (d_gates, what the other adds to, what reaches h₋ past products, the carry's)."
    return _Part(name, arguments, doc, writer.text(), _bits(cell.d_gates, own), len(both), reads_out)


def _by_operand(derived: Derived, node: Node) -> Node:
    """The same value with d · m in the place of d · a · b, where m = a · b is the operand: that is kept, a need not be read."""
    graph, operand = derived.graph, derived.graph.operand
    assert operand is not None
    if not node.operands:
        return node
    if node.operation == operand.operation == "mul" and node.operands[0].operation == "mul":
        (d, a), b = node.operands[0].operands, node.operands[1]
        if operand.operands in ((a, b), (b, a)):
            return graph.make("mul", d, operand)
    return graph.make(node.operation, *(_by_operand(derived, each) for each in node.operands), value=node.value)


def _later_backward(derived: Derived, name: str) -> _Part:
    """The backward's stage from the gradient of the operand: what the other left out of d_gates, and what it adds to them."""
    carry, before = _carry(derived)
    assert derived.d_operand is not None
    d_gates = {block: _by_operand(derived, node) for block, node in derived.later_d_gates.items()}
    direct = None if derived.later_direct is None else _by_operand(derived, derived.later_direct)
    arguments = ("tape", carry if before is not None else "before", "d_operand", "handed")
    roots = [*d_gates.values(), *([] if direct is None else [direct])]
    both = [block for block in derived.d_gates if block in d_gates]
    chosen: dict[Node, str] = {}
    for block, node in d_gates.items():
        if block not in both:
            chosen.setdefault(node, f"d_{block}")
    writer = _Writer(roots, derived.available_later(), chosen, arguments)
    writer.like = "d_operand"
    writer.names[derived.d_operand] = "d_operand"
    if before is not None:
        writer.names[before] = carry
    _give_kept(writer, derived)
    blocks = {}
    for block, node in d_gates.items():
        if block in both:
            blocks[block] = f"handed[{both.index(block)}] + {writer.operand(node, PRODUCT)}"
        else:
            blocks[block] = writer.tensor(node)
    result = f"{_gradients(derived, blocks)}, {_NOTHING if direct is None else writer.write(direct)}"
    writer.lines.append(f"return {result}")
    doc = "Differentiate the operand: (d_gates, what reaches h₋ past the product)."
    return _Part(name, arguments, doc, writer.text(), _bits(derived.cell.d_gates, blocks), len(both))


def _parts_of(derived: Derived) -> list[_Part]:
    """The functions of a cell: a step and its backward, and those of a second stage."""
    name = derived.cell.name
    if not derived.cell.later:
        return [_forward(derived, f"{name}_step", False, ())[0], _backward(derived, f"{name}_step_backward")]
    later, read = _forward(derived, f"{name}_later", True, ())
    first, _ = _forward(derived, f"{name}_step", False, read)
    back = _backward(derived, f"{name}_step_backward")
    return [first, back, later, _later_backward(derived, f"{name}_later_backward")]


def _source(derived: Derived, parts: Sequence[_Part]) -> str:
    functions = [
        _FUNCTION.format(name=part.name, arguments=", ".join(part.arguments), doc=part.doc, body=part.text) for part in parts
    ]
    used = [name for name in _FUNCTIONS if any(f"{name}(" in part.text for part in parts)]
    imported = f"\nfrom fused_rnn.kernels.triton.activations import {', '.join(used)}\n" if used else ""
    return _TEMPLATE.format(mode=derived.cell.mode, functions=imported, parts="".join(functions))


def source_of(derived: Derived) -> str:
    """The module of a cell's pointwise parts, as Python's source."""
    return _source(derived, _parts_of(derived))


@functools.cache
def module_of(derived: Derived) -> types.ModuleType:
    """The module of a cell's pointwise parts."""
    return written.module_of(f"fused_rnn_triton_{derived.cell.name}", source_of(derived), "TRITON_CACHE_DIR")


def recurrence_of(cell: Cell) -> Recurrence:
    """The recurrence of a cell, made when it is first needed.

    Raises:
        NotImplementedError: if the walks cannot take it (``recurrence.refusal``).
    """
    found = RECURRENCES.get(cell.name)
    if found is not None:
        return found
    derived = DEFINED[cell.name].derived
    parts, module = _parts_of(derived), module_of(derived)
    stages = []
    for forward, backward in zip(parts[::2], parts[1::2], strict=True):
        step, back = getattr(module, forward.name), getattr(module, backward.name)
        stages.append(Stage(step, back, forward.blocks, backward.blocks, forward.handed, backward.handed))
    return Recurrence(cell, stages[0], stages[1] if len(stages) > 1 else None, parts[1].reads_out)
