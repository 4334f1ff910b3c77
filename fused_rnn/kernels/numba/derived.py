"""Kernels of a cell that was defined by its equations: the source of the pointwise parts, written as those of the other files.

The source is kept in a folder of the user's, where Numba keeps what it has compiled of it; ``source_of`` shows it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import linecache
import os
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path

from fused_rnn.cells.definition import DEFINED
from fused_rnn.cells.derivation import Derived
from fused_rnn.cells.language import ACTIVATIONS, Node, order
from fused_rnn.data.cell import Cell
from fused_rnn.kernels.by_walk.walk import Walk

_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_TEMPLATE = '''"""The pointwise parts of the cell {mode}, made from its equations by fused_rnn."""

from numba import njit

from fused_rnn.cells import named
from fused_rnn.kernels.numba.launch import make_functions
from fused_rnn.kernels.numba.vector import constant, load, sigmoid, splat, store, tanh, vector_bytes, where_positive
from fused_rnn.kernels.numba.walk import backward, forward
{constants}

@njit(error_model="numpy")
def _forward(like, sums, tape, out, h, c, bias, block, count):
    vector = vector_bytes(like)
{forward}

@njit(error_model="numpy")
def _backward(like, d_h, d_c, d_cell, tape, out, h, c, d_gates, reset, block, count):
{backward}

_walk_forward = forward(named({name!r}), _forward)
_walk_backward = backward(named({name!r}), _backward)


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


class _Writer:
    """Writes values as lines of Python: a name for each that is used twice or is an activation, the others inside of those."""

    def __init__(self, roots: Sequence[Node], known: Container[Node] = ()) -> None:
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self.constants: dict[float, str] = {}
        self.nodes = order(roots, known.__contains__)
        self.uses = Counter(operand for node in self.nodes if node not in known for operand in node.operands)

    def give(self, node: Node, source: str, name: str) -> None:
        """Have a value come from memory, if it is used."""
        if node in self.nodes and node not in self.names:
            self.names[node] = name
            self.lines.append(f"{name} = {source}")

    def write(self, node: Node) -> str:
        """A value as an expression; the lines that it needs are written before."""
        if node in self.names:
            return self.names[node]
        source = self._expression(node)
        if self.uses[node] > 1 or node.operation in ACTIVATIONS:
            self.names[node] = name = f"v{sum(each.startswith('v') for each in self.names.values())}"
            self.lines.append(f"{name} = {_bare(source)}")
            return name
        return source

    def _expression(self, node: Node) -> str:
        if node.operation == "constant":
            name = self.constants.setdefault(node.value, f"_CONSTANT_{len(self.constants)}")
            return f"{name}(like)"
        operands = [self.write(each) for each in node.operands]
        if node.operation in _OPERATORS:
            return f"({operands[0]} {_OPERATORS[node.operation]} {operands[1]})"
        if node.operation == "neg":
            return f"(splat(like) - {operands[0]})"
        if node.operation == "relu":
            return f"where_positive({operands[0]}, {operands[0]})"
        return f"{node.operation}({', '.join(map(_bare, operands))})"

    def text(self) -> str:
        """The lines, indented as the body of a function."""
        return "\n".join(f"    {line}" for line in self.lines) + "\n"


def _bare(source: str) -> str:
    """An expression without the parentheses around the whole of it."""
    return source[1:-1] if source[0] == "(" else source


def _at(address: str, block: int, size: str = "block") -> str:
    return address if block == 0 else f"{address} + {'' if block == 1 else f'{block} * '}{size}"


def _forward(derived: Derived) -> _Writer:
    graph, cell = derived.graph, derived.cell
    writer = _Writer([*graph.after, *derived.kept.values()])
    for number, gate in enumerate(cell.gates):
        of_x = f"load(like, {_at('tape', number)}, count) + load(like, {_at('bias', number)}, count)"
        of_h = f"load(like, {_at('sums', number, 'vector')}, None)"
        if gate in derived.sums:
            writer.give(derived.sums[gate], f"{of_x} + {of_h}", f"sum_{gate}")
        else:
            of_h = f"load(like, {_at('bias', cell.num_gates)}, count) + {of_h}"
            writer.give(graph.leaf("x", gate), of_x, f"x_{gate}")
            writer.give(graph.leaf("w", gate), of_h, f"w_{gate}")
    for state, address in zip(graph.states, "hc", strict=False):
        writer.give(graph.leaf("state", state), f"load(like, {address}, count)", f"{state}_before")
    # All is read before anything is written: what is kept lies where the shares of the input came.
    stores = [(_at("tape", cell.tape.index(block)), writer.write(node)) for block, node in derived.kept.items()]
    stores.append(("out", writer.write(graph.after[0])))
    writer.lines += [f"store({place}, {_bare(value)}, count)" for place, value in stores]
    return writer


def _backward(derived: Derived) -> _Writer:
    graph, cell = derived.graph, derived.cell
    direct, *others = derived.d_before
    roots = [*derived.d_gates.values(), *(each for each in derived.d_before if each is not None)]
    writer = _Writer(roots, derived.available())
    writer.names[derived.gradients[0]] = "d_h"
    if len(graph.states) > 1:
        writer.give(derived.gradients[1], "load(like, d_c, count) + load(like, d_cell, count)", "d_state")
    for block, node in derived.kept.items():
        writer.give(node, f"load(like, {_at('tape', cell.tape.index(block))}, count)", f"kept_{block}")
    writer.give(graph.after[0], "load(like, out, count)", "h_after")
    for state, address in zip(graph.states, "hc", strict=False):
        writer.give(graph.leaf("state", state), f"load(like, {address}, count)", f"{state}_before")
    stores = [(_at("d_gates", cell.d_gates.index(block)), writer.write(node)) for block, node in derived.d_gates.items()]
    result = "splat(like)" if direct is None else writer.write(direct)
    carried = ["splat(like)" if each is None else writer.write(each) for each in others]
    stores += [("d_c", f"splat(like) if reset else {value}") for value in carried]
    writer.lines += [f"store({place}, {_bare(value)}, count)" for place, value in stores]
    writer.lines.append(f"return {_bare(result)}")
    return writer


def source_of(derived: Derived) -> str:
    """The module of a cell's kernels, as Python's source."""
    forward, backward = _forward(derived), _backward(derived)
    constants: dict[float, str] = {}
    texts = []
    for writer in (forward, backward):
        text = writer.text()
        for value, name in writer.constants.items():
            shared = constants.setdefault(value, f"_constant_{len(constants)}")
            text = text.replace(f"{name}(like)", f"{shared}(like)")
        texts.append(text)
    lines = "".join(f"\n{name} = constant({value!r})" for value, name in constants.items())
    return _TEMPLATE.format(
        mode=derived.cell.mode, name=derived.cell.name, constants=lines + "\n", forward=texts[0], backward=texts[1]
    )


def _folder() -> Path:
    """Where sources are kept: Numba's own folder if one is named, or the user's cache."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fused_rnn"


def _kept_file(name: str, source: str) -> Path | None:
    """The file with this source, written if it is not there yet; None where the user has no folder that can be written."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.py"
        if not path.exists() or path.read_text() != source:
            # By a rename, so that no other process reads half of it.
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
                file.write(source)
            Path(file.name).replace(path)
        return path
    return None


@functools.cache
def _module(derived: Derived) -> types.ModuleType:
    name, source = f"fused_rnn_cell_{derived.cell.name}", source_of(derived)
    path = _kept_file(name, source)
    if path is not None:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    # Compiled anew in every process.
    module = types.ModuleType(name)
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def walk_of(cell: Cell) -> Walk:
    """The walk of a cell that was defined by its equations."""
    module = _module(DEFINED[cell.name].derived)
    return Walk(module.pack, module.forward, module.backward)
