"""Source that a backend makes of a cell's equations: its lines, and for those in Python the modules that hold it.

Nothing here needs torch, because the C++ cells are written where there is none. A module is kept as a file in a folder of the
user's, where its source can be read: by people, and by what compiles it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import linecache
import os
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path

from fused_rnn.cells.language import Node, order

OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
# How tightly an operation holds its operands together: those of the same kind from left to right.
SUM, PRODUCT, SIGN, NAME = range(4)
BINDING = {"add": SUM, "sub": SUM, "mul": PRODUCT, "div": PRODUCT, "neg": SIGN}


class Writer:
    """Writes values as lines of a program: some of them have a name and a line, the others stand inside of those.

    Args:
        roots: what is to be computed.
        known: values that are given, which are not taken apart.
    """

    def __init__(self, roots: Sequence[Node], known: Container[Node] = ()) -> None:
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self.nodes = order(roots, known.__contains__)
        self.uses = Counter(operand for node in self.nodes if node not in known for operand in node.operands) + Counter(roots)

    def has_line(self, node: Node) -> bool:
        """Whether a value has a line and a name of its own."""
        return self.uses[node] > 1

    def new_name(self, node: Node) -> str:
        """The name of a value that has a line."""
        return f"v{sum(each.startswith('v') for each in self.names.values())}"

    def expression(self, node: Node) -> str:
        """How a value is computed from its operands, in the order of the equations."""
        if node.operation == "constant":
            return self.number(node.value)
        if node.operation in OPERATORS:
            left, right = node.operands
            binding = BINDING[node.operation]
            return f"{self.operand(left, binding)} {OPERATORS[node.operation]} {self.operand(right, binding + 1)}"
        if node.operation == "neg":
            return f"-{self.operand(node.operands[0], NAME)}"
        return self.call(node)

    def binding(self, node: Node, source: str) -> int:
        """How tightly the text of a value, which has been written, holds together."""
        return NAME if node in self.names else BINDING.get(node.operation, NAME)

    def operand(self, node: Node, binding: int = NAME) -> str:
        """A value as an operand, in parentheses if it holds together less tightly than that."""
        source = self.write(node)
        return source if self.binding(node, source) >= binding else f"({source})"

    def number(self, value: float) -> str:
        """A number as an operand."""
        raise NotImplementedError

    def call(self, node: Node) -> str:
        """A function of values."""
        raise NotImplementedError

    def write(self, node: Node) -> str:
        """A value as an expression, without parentheses around it; the lines that it needs are written before."""
        if node in self.names:
            return self.names[node]
        source = self.expression(node)
        if not self.has_line(node):
            return source
        name = self.new_name(node)
        self.lines.append(self.line(name, source))
        self.names[node] = name
        return name

    def line(self, name: str, source: str) -> str:
        """The line that gives a value its name."""
        return f"{name} = {source}"

    def text(self) -> str:
        """The lines, indented as the body of a function."""
        return "\n".join(f"    {line}" for line in self.lines) + "\n"


def folder(variable: str) -> Path:
    """Where sources are kept: in the folder that an environment variable names, or in the user's cache."""
    named = os.environ.get(variable)
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fused_rnn"


def _kept_file(name: str, source: str, variable: str) -> Path | None:
    """The file with this source, written if it is not there yet; None where the user has no folder that can be written."""
    with contextlib.suppress(OSError, RuntimeError):
        place = folder(variable)
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{name}.py"
        if not path.exists() or path.read_text() != source:
            # By a rename, so that no other process reads half of it.
            with tempfile.NamedTemporaryFile("w", dir=place, suffix=".tmp", delete=False) as file:
                file.write(source)
            Path(file.name).replace(path)
        return path
    return None


def module_of(prefix: str, source: str, variable: str) -> types.ModuleType:
    """A module with this source, which ``inspect`` finds.

    Args:
        prefix: of its name.
        variable: as of ``folder``. Without a folder the module is of this process alone.
    """
    # By what it says, so that versions of this package do not take turns with one file.
    name = f"{prefix}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    path = _kept_file(name, source, variable)
    if path is not None:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    module = types.ModuleType(name)
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module
