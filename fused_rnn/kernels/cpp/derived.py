"""The cells for the C++ kernels, made from their equations: what setup.py writes before it compiles.

``header_of`` gives ``cells/equations.h``, a struct for each cell with its sizes and its pointwise parts, as one would write it
by hand; ``list_of`` gives ``cells/cells.def``. Both are in ``build/generated`` after a build. Nothing here needs torch, which a
build does not have.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

from fused_rnn.cells.definition import Definition
from fused_rnn.cells.derivation import Derived
from fused_rnn.cells.language import Node, order
from fused_rnn.kernels.cpp.writer import CppWriter

_LONGEST_LINE = 124
_HEADER = """\
// The cells: written by setup.py from the equations in fused_rnn/cells/. A change here is lost; change those.
#pragma once

#include "walk/pointwise.h"

namespace fused_rnn {{
namespace FUSED_RNN_ISA {{

{structs}
}}  // namespace FUSED_RNN_ISA
}}  // namespace fused_rnn
"""
_LIST = """\
// The cells of this library: FUSED_RNN_CELL(name in fused_rnn/cells/, struct in cells/equations.h). All that counts, numbers or
// names them is made from this list: define FUSED_RNN_CELL, then include this file, which undefines it again.
{cells}
#undef FUSED_RNN_CELL
"""
_STRUCT = """\
// {title}
template <class T>
struct {struct} : CellDefaults {{
{constants}

{functions}
}};
"""


def header_of(definitions: Iterable[Definition]) -> str:
    """The structs of cells, a C++ header.

    Raises:
        ValueError: if the C++ kernels have no way for what a cell's equations ask for; the message names the cell.
    """
    return _HEADER.format(structs="\n".join(_struct(definition) for definition in definitions))


def list_of(definitions: Iterable[Definition]) -> str:
    """The list of cells that the kernels' table is made from, for the C++ preprocessor."""
    return _LIST.format(
        cells="\n".join(f"FUSED_RNN_CELL({each.row.name}, {_struct_name(each.row.name)})" for each in definitions)
    )


def _struct_name(cell: str) -> str:
    return "".join(word.capitalize() for word in cell.split("_"))


def _at(address: str, block: int) -> str:
    return address if block == 0 else f"{address} + H" if block == 1 else f"{address} + {block} * H"


def _refuse(derived: Derived, why: str) -> ValueError:
    return ValueError(f"{derived.cell.name}: the C++ kernels {why}")


def _forward(derived: Derived, later: bool) -> list[str]:
    """A stage of the forward."""
    graph, cell = derived.graph, derived.cell
    kept = [(block, node) for block, node in derived.kept.items() if graph.is_late(node) == later]
    others = graph.after[1:]
    if any(graph.is_late(node) for node in others):
        raise _refuse(derived, "store the second state in the first stage, and a later gate has a share in it")
    last = later or not cell.later
    handed = _handed_on(derived)
    before = {*derived.kept.values(), *others} - {node for _, node in kept} if later else set()
    roots = [node for _, node in kept]
    if last:
        roots.append(graph.after[0])
    if not later:
        roots += [*others, *([] if graph.operand is None else [graph.operand]), *handed]
    writer = CppWriter(derived, roots, before)
    _give_states(writer, derived, {"h": "p.h_previous"} if later else {"h": "p.h_previous", "c": "p.c"}, reset=True)
    if later:
        for node in handed:
            writer.give(node, "io.load(p.h)", writer.wanted[node])
        for node in others:
            writer.give(node, "io.load(p.c)", graph.states[1])
        if graph.operand is not None:
            writer.give(graph.operand, "io.load(p.operand)", str(cell.operand))
    for number, gate in enumerate(cell.later if later else cell.first):
        place = cell.gates.index(gate)
        if gate not in derived.sums:
            writer.give(graph.leaf("x", gate), f"gate<T>(io, p, {place}, recurrent[kGates])", f"x_{gate}")
            writer.give(graph.leaf("w", gate), f"gate<T>(io, p, kGates, recurrent[{number}])", f"h{gate}")
            continue
        node, source = derived.sums[gate], f"gate<T>(io, p, {place}, recurrent[{number}])"
        if writer.uses[node] > 1:
            writer.give(node, source, f"sum_{gate}")
        else:
            # Where the one operation on it stands, mostly an activation.
            writer.names[node] = source
    writer.activate()
    stores = [(_at("p.tape", cell.tape.index(block)), writer.named(node)) for block, node in kept]
    after = [("p.c", writer.named(node)) for node in others] if not later else []
    if not later and graph.operand is not None:
        after.append(("p.operand", writer.write(graph.operand)))
    if last:
        after.append(("p.h", writer.write(graph.after[0])))
    else:
        after += [("p.h", writer.write(node)) for node in handed]
    lines = writer.lines
    if len(stores) == 1:
        lines.append(f"if (p.keep) io.store({stores[0][0]}, {stores[0][1]});")
    elif stores:
        lines += ["if (p.keep) {", *(f"  io.store({place}, {value});" for place, value in stores), "}"]
    return [*lines, *(f"io.store({place}, {value});" for place, value in after)]


def _handed_on(derived: Derived) -> list[Node]:
    """What the second stage of the forward needs of the first beside the operand: it waits in the place of h."""
    graph, cell = derived.graph, derived.cell
    if not cell.later:
        return []
    second = [graph.after[0], *(node for node in derived.kept.values() if graph.is_late(node))]
    first = {node for node in derived.kept.values() if not graph.is_late(node)} | {*graph.after[1:]}
    found = [node for node in order(second, first.__contains__) if node in first]
    found = [node for node in found if node is not graph.operand and node not in graph.after[1:]]
    if len(found) > 1:
        names = ", ".join(block for block, node in derived.kept.items() if node in found)
        raise _refuse(derived, f"hand one value beside the operand from the first stage to the second, and it needs {names}")
    return found


def _give_states(writer: CppWriter, derived: Derived, places: dict[str, str], reset: bool = False) -> None:
    """The states before the step, h from ``places["h"]`` and the other one from ``places["c"]``."""
    for state, key in zip(derived.graph.states, "hc", strict=False):
        node = derived.graph.leaf("state", state)
        if not writer.needs(node):
            continue
        if key not in places:
            raise _refuse(derived, f"read one state before the step in the backward, and it reads {state} and another one")
        source = f"io.load({places[key]})"
        writer.give(node, f"p.reset ? Vec<T>{{}} : {source}" if reset and key == "c" else source, f"{state}_before")


def _give_kept(writer: CppWriter, derived: Derived, tape: str = "p.tape") -> None:
    for block, node in derived.kept.items():
        writer.give(node, f"io.load({_at(tape, derived.cell.tape.index(block))})", block)


def _previous(derived: Derived) -> dict[str, str]:
    cell = derived.cell
    return {} if cell.reads_before is None else {"h" if cell.reads_before == "h" else "c": "p.previous"}


def _backward(derived: Derived) -> list[str]:
    """The backward's stage from the gradients of the states."""
    graph, cell = derived.graph, derived.cell
    direct, *others = derived.d_before
    roots = [*derived.d_gates.values(), *(each for each in derived.d_before if each is not None)]
    writer = CppWriter(derived, roots, derived.available())
    writer.names[derived.gradients[0]] = "d_h"
    _give_kept(writer, derived)
    if writer.needs(graph.after[0]):
        if not cell.tape_is_out:
            raise _refuse(derived, "have no h after the step in the backward, which reads it")
        writer.give(graph.after[0], "io.load(p.tape)", "h")
    _give_states(writer, derived, _previous(derived))
    if others:
        writer.give_sum(derived.gradients[1], "io.load(p.d_c)", f"d_{graph.states[1]}_after", "p.d_cell")
    writer.activate()
    stores = [(_at("p.d_gates", cell.d_gates.index(block)), writer.write(node)) for block, node in derived.d_gates.items()]
    carried = [("p.d_c", node) for node in others]
    if cell.direct:
        carried.append(("p.d_h", direct))
    for place, node in carried:
        value = "Vec<T>{}" if node is None else writer.write(node)
        stores.append((place, value if value == "Vec<T>{}" else f"p.reset ? Vec<T>{{}} : {value}"))
    return [*writer.lines, *(f"io.store({place}, {value});" for place, value in stores)]


def _later_backward(derived: Derived) -> list[str]:
    """The backward's stage from the gradient of the operand: what the other left out of d_gates, and what it adds to them."""
    cell, direct = derived.cell, derived.later_direct
    assert derived.d_operand is not None
    roots = [*derived.later_d_gates.values(), *([] if direct is None else [direct])]
    writer = CppWriter(derived, roots, derived.available_later())
    writer.names[derived.d_operand] = "d_operand"
    _give_kept(writer, derived)
    _give_states(writer, derived, _previous(derived))
    writer.activate()
    stores = []
    for block, node in derived.later_d_gates.items():
        place, value = _at("p.d_gates", cell.d_gates.index(block)), writer.write(node)
        stores.append((place, f"io.load({place}) + {value}" if block in derived.d_gates else value))
    lines = [*writer.lines, *(f"io.store({place}, {value});" for place, value in stores)]
    if direct is not None:
        lines.append(f"if (!p.reset) io.store(p.d_h, io.load(p.d_h) + {writer.write(direct)});")
    return lines


def _unprojected(derived: Derived) -> list[str]:
    """What a projection multiplies, from the tape."""
    writer = CppWriter(derived, derived.graph.after[:1], {*derived.kept.values()})
    _give_kept(writer, derived, "tape")
    writer.activate()
    return [*writer.lines, f"return {writer.write(derived.graph.after[0])};"]


def _constants(derived: Derived) -> list[str]:
    """The sizes that differ from CellDefaults."""
    cell = derived.cell
    lines = [
        f"int kGates = {cell.num_gates};  // {', '.join(cell.gates)}",
        f"int kTape = {len(cell.tape)};  // {', '.join(cell.tape)}",
        f"int kGradients = {len(cell.d_gates)};  // {', '.join(cell.d_gates)}",
    ]
    if cell.apart is not None:
        lines.append(f"int kApart = {cell.num_gates - 1};  // {cell.gates[-1]}, whose recurrent part is {cell.apart}")
    if cell.cell_state is not None:
        lines += ["bool kHasC = true;", f"int kTapeC = {cell.tape.index(cell.cell_state)};"]
    if cell.later:
        assert cell.operand is not None
        lines.append(f"int kLater = {len(cell.later)};  // {', '.join(cell.later)}: of the product with {cell.operand}")
        lines.append(f"int kTapeOperand = {cell.tape.index(cell.operand)};")
    if cell.direct:
        lines.append("bool kDirect = true;")
    if cell.reads_before is not None:
        lines.append(f"Previous kPrevious = Previous::{'kH' if cell.reads_before == 'h' else 'kC'};")
    if cell.projected is not None:
        lines.append("bool kProjection = true;")
    if cell.tape_is_out:
        lines.append("bool kTapeIsOut = true;")
    lines = [f"static constexpr {line}" for line in lines]
    if cell.apart is not None:
        # d_gates begin with the part that is apart, and weight_hh's rows end with it.
        lines.append(f"static constexpr int weight_block(int b) {{ return b == 0 ? {cell.num_gates - 1} : b - 1; }}")
    return lines


def _struct(definition: Definition) -> str:
    derived = definition.derived
    cell = derived.cell
    of_forward = "static void {}(Io io, const Vec<T>* recurrent, const ForwardPoint<T>& p)"
    of_backward = "static void {}(Io io, Vec<T> {}, const BackwardPoint<T>& p)"
    functions = [_function(of_forward.format("forward"), _forward(derived, later=False))]
    if cell.later:
        functions.append(_function(of_forward.format("forward_later"), _forward(derived, later=True)))
    if cell.projected is not None:
        functions.append(_function("static Vec<T> unprojected(Io io, const T* tape, Index H)", _unprojected(derived)))
    functions.append(_function(of_backward.format("backward", "d_h"), _backward(derived)))
    if cell.later:
        functions.append(_function(of_backward.format("backward_later", "d_operand"), _later_backward(derived)))
    about = inspect.getdoc(inspect.getmodule(definition.body)) or cell.name
    return _STRUCT.format(
        title=f"{cell.name}, of {definition.body.__module__.replace('.', '/')}.py. {about.splitlines()[0]}",
        struct=_struct_name(cell.name),
        constants="\n".join(f"  {line}" for line in _constants(derived)),
        functions="\n\n".join(functions),
    )


def _function(signature: str, lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    uses_h = "* H" in text or "+ H" in text
    body = [*(["const Index H = p.hidden;"] if uses_h and "Index H" not in signature else []), *lines]
    return "\n".join(["  template <class Io>", f"  {signature} {{", *(f"    {_broken(line)}" for line in body), "  }"])


def _broken(line: str) -> str:
    """A line, in several where it is long: broken after commas."""
    parts, rest = [], line
    while len(rest) > _LONGEST_LINE - 4 and ", " in rest[: _LONGEST_LINE - 4]:
        end = rest.rindex(", ", 0, _LONGEST_LINE - 4) + 1
        parts.append(rest[:end])
        rest = "    " + rest[end:].lstrip()
    return "\n    ".join([*parts, rest])
