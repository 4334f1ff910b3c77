"""The kernels of a cell, made from its equations: the source of the pointwise parts, as one would write it by hand.

The source is kept in a folder of the user's, where Numba keeps what it has compiled of it; ``source_of`` shows it. A second
stage has pointwise parts of its own, ``_later`` and ``_later_backward``.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Container, Sequence

from fused_rnn.cells.definition import DEFINED
from fused_rnn.cells.derivation import Derived
from fused_rnn.cells.language import ACTIVATIONS, Node
from fused_rnn.data.cell import Cell
from fused_rnn.kernels import written
from fused_rnn.kernels.by_walk.walk import Walk
from fused_rnn.kernels.written import NAME, Writer

_TEMPLATE = '''"""The pointwise parts of the cell {mode}, made from its equations by fused_rnn."""

from numba import njit

from fused_rnn.cells import named
from fused_rnn.kernels.numba.launch import make_functions
from fused_rnn.kernels.numba.vector import constant, load, sigmoid, splat, store, tanh, vector_bytes, where_positive
from fused_rnn.kernels.numba.walk import backward, forward
{constants}
{functions}
_walk_forward = forward(named({name!r}), _forward{later})
_walk_backward = backward(named({name!r}), _backward{later_backward})


def _forward_kernel(like, version):
    def {name}_forward(p):
        _walk_forward(p, like, version)

    return {name}_forward


def _backward_kernel(like, version):
    def {name}_backward(p):
        _walk_backward(p, like, version)

    return {name}_backward


pack, forward, backward = make_functions(named({name!r}), _forward_kernel, _backward_kernel)
'''
_FUNCTION = """
@njit(error_model="numpy")
def {name}({arguments}):
{body}
"""
_OF_FORWARD = "like, sums, tape, out, h, c, bias, block, count"
_OF_BACKWARD = "like, d_h, d_c, d_cell, tape, out, h, c, d_gates, reset, block, count"
_OF_LATER_BACKWARD = "like, d_operand, tape, h, d_gates, block, count"


class _Writer(Writer):
    """Values as lines of what Numba compiles: a name for each that is used twice or is an activation."""

    def __init__(self, roots: Sequence[Node], known: Container[Node] = ()) -> None:
        super().__init__(roots, known)
        self.constants: dict[float, str] = {}

    def give(self, node: Node, source: str, name: str) -> None:
        """Have a value come from memory, if it is used."""
        if node in self.nodes and node not in self.names:
            self.names[node] = name
            self.lines.append(f"{name} = {source}")

    def has_line(self, node: Node) -> bool:
        return super().has_line(node) or node.operation in ACTIVATIONS

    def expression(self, node: Node) -> str:
        if node.operation == "neg":
            return f"splat(like) - {self.operand(node.operands[0])}"
        return super().expression(node)

    def operand(self, node: Node, binding: int = NAME) -> str:
        # In parentheses, unless it is a name or a call.
        return super().operand(node, NAME)

    def number(self, value: float) -> str:
        return f"{self.constants.setdefault(value, f'_CONSTANT_{len(self.constants)}')}(like)"

    def call(self, node: Node) -> str:
        if node.operation == "relu":
            operand = self.operand(node.operands[0])
            return f"where_positive({operand}, {operand})"
        return f"{node.operation}({', '.join(self.write(each) for each in node.operands)})"


def _at(address: str, block: int, size: str = "block") -> str:
    return address if block == 0 else f"{address} + {'' if block == 1 else f'{block} * '}{size}"


def _forward(derived: Derived, later: bool) -> _Writer:
    """A stage of the forward."""
    graph, cell = derived.graph, derived.cell
    two_stages = bool(cell.later)
    kept = [(block, node) for block, node in derived.kept.items() if graph.is_late(node) == later]
    before = [] if not later else [(block, node) for block, node in derived.kept.items() if not graph.is_late(node)]
    last = later or not two_stages
    roots = [*(node for _, node in kept), *(graph.after[:1] if last else ())]
    writer = _Writer(roots, {node for _, node in before})
    writer.lines.append("vector = vector_bytes(like)")
    for number, gate in enumerate(cell.later if later else cell.first):
        place = cell.gates.index(gate)
        of_x = f"load(like, {_at('tape', place)}, count) + load(like, {_at('bias', place)}, count)"
        of_h = f"load(like, {_at('sums', number, 'vector')}, None)"
        if gate in derived.sums:
            writer.give(derived.sums[gate], f"{of_x} + {of_h}", f"sum_{gate}")
        else:
            of_h = f"load(like, {_at('bias', cell.num_gates)}, count) + {of_h}"
            writer.give(graph.leaf("x", gate), of_x, f"x_{gate}")
            writer.give(graph.leaf("w", gate), of_h, f"w_{gate}")
    _give_states(writer, derived)
    _give_kept(writer, derived, dict(before))
    # All is read before anything is written: what is kept lies where the shares of the input came.
    stores = [(_at("tape", cell.tape.index(block)), writer.write(node)) for block, node in kept]
    if last:
        stores.append(("out", writer.write(graph.after[0])))
    _store(writer, stores)
    return writer


def _give_states(writer: _Writer, derived: Derived) -> None:
    for state, address in zip(derived.graph.states, "hc", strict=False):
        writer.give(derived.graph.leaf("state", state), f"load(like, {address}, count)", f"{state}_before")


def _give_kept(writer: _Writer, derived: Derived, kept: dict[str, Node]) -> None:
    for block, node in kept.items():
        writer.give(node, f"load(like, {_at('tape', derived.cell.tape.index(block))}, count)", f"kept_{block}")


def _store(writer: _Writer, stores: Sequence[tuple[str, str]]) -> None:
    writer.lines += [f"store({place}, {value}, count)" for place, value in stores]


def _backward(derived: Derived) -> _Writer:
    """The backward's stage from the gradients of the states."""
    graph, cell = derived.graph, derived.cell
    direct, *others = derived.d_before
    roots = [*derived.d_gates.values(), *(each for each in derived.d_before if each is not None)]
    writer = _Writer(roots, derived.available())
    writer.names[derived.gradients[0]] = "d_h"
    if len(graph.states) > 1:
        writer.give(derived.gradients[1], "load(like, d_c, count) + load(like, d_cell, count)", "d_state")
    _give_kept(writer, derived, derived.kept)
    writer.give(graph.after[0], "load(like, out, count)", "h_after")
    _give_states(writer, derived)
    stores = [(_at("d_gates", cell.d_gates.index(block)), writer.write(node)) for block, node in derived.d_gates.items()]
    result = "splat(like)" if direct is None else writer.write(direct)
    carried = ["splat(like)" if each is None else writer.operand(each) for each in others]
    stores += [("d_c", f"splat(like) if reset else {value}") for value in carried]
    _store(writer, stores)
    writer.lines.append(f"return {result}")
    return writer


def _later_backward(derived: Derived) -> _Writer:
    """The backward's stage from the gradient of the operand: what the other left out of d_gates, and what it adds to them."""
    cell, direct = derived.cell, derived.later_direct
    assert derived.d_operand is not None
    writer = _Writer([*derived.later_d_gates.values(), *([] if direct is None else [direct])], derived.available_later())
    writer.names[derived.d_operand] = "d_operand"
    _give_kept(writer, derived, derived.kept)
    _give_states(writer, derived)
    stores = []
    for block, node in derived.later_d_gates.items():
        place = _at("d_gates", cell.d_gates.index(block))
        added = block in derived.d_gates
        stores.append((place, f"load(like, {place}, count) + {writer.operand(node)}" if added else writer.write(node)))
    result = "splat(like)" if direct is None else writer.write(direct)
    _store(writer, stores)
    writer.lines.append(f"return {result}")
    return writer


def source_of(derived: Derived) -> str:
    """The module of a cell's kernels, as Python's source."""
    parts = {"_forward": (_OF_FORWARD, _forward(derived, later=False)), "_backward": (_OF_BACKWARD, _backward(derived))}
    if derived.cell.later:
        parts["_later"] = _OF_FORWARD, _forward(derived, later=True)
        parts["_later_backward"] = _OF_LATER_BACKWARD, _later_backward(derived)
    constants: dict[float, str] = {}
    functions = []
    for name, (arguments, writer) in parts.items():
        text = writer.text()
        for value, constant in writer.constants.items():
            shared = constants.setdefault(value, f"_constant_{len(constants)}")
            text = text.replace(f"{constant}(like)", f"{shared}(like)")
        functions.append(_FUNCTION.format(name=name, arguments=arguments, body=text.rstrip()))
    lines = "".join(f"\n{name} = constant({value!r})" for value, name in constants.items())
    return _TEMPLATE.format(
        mode=derived.cell.mode,
        name=derived.cell.name,
        constants=f"{lines}\n" if lines else "",
        functions="\n".join(functions) + "\n",
        later=", _later" if derived.cell.later else "",
        later_backward=", _later_backward" if derived.cell.later else "",
    )


@functools.cache
def module_of(derived: Derived) -> types.ModuleType:
    """The module of a cell's kernels."""
    return written.module_of(f"fused_rnn_cell_{derived.cell.name}", source_of(derived), "NUMBA_CACHE_DIR")


def walk_of(cell: Cell) -> Walk:
    """The walk of a cell."""
    module = module_of(DEFINED[cell.name].derived)
    return Walk(module.pack, module.forward, module.backward)
