"""Dependencies point one way: modules → functional → autograd → dispatch → kernels → protocol; all may read the data."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fused_rnn"
# What a cell is, which rows a step has, and what a backend is given: plain data.
DATA = {"cells", "steps", "protocol"}
# A room -> the rooms that it may import.
ALLOWED = {
    "cells": set(),
    "steps": set(),
    "protocol": {"cells", "steps"},
    "memory": {"_C"},
    "processes": set(),
    "reference": DATA | {"reference", "kernels"},
    "kernels": DATA | {"kernels", "memory", "_C"},
    "dispatch": DATA | {"processes"},
    "batching": DATA,
    "derivatives": DATA | {"reference", "batching"},
    "autocast": DATA,
    "checks": DATA | {"autocast"},
    "sequences": {"steps"},
    "operators": DATA | {"autocast", "checks", "dispatch", "sequences"},
    "autograd": DATA | {"autocast", "dispatch", "operators", "batching", "derivatives"},
    "operators_autograd": DATA | {"checks", "dispatch", "operators", "batching", "derivatives"},
    "calls": DATA | {"checks", "operators", "sequences", "autograd"},
    "functional": DATA | {"calls", "checks"},
    "onnx": DATA | {"operators"},
    "initialisation": DATA,
    "modules": DATA | {"calls", "checks", "initialisation"},
    "cell_modules": DATA | {"calls", "initialisation"},
    "convert": {"modules", "cell_modules", "checks", "initialisation"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path: Path) -> None:
    imports = _imports(path)
    assert not {name for name in imports if name.split(".")[0] in ("tests", "benchmarks")}
    if path == PACKAGE / "__init__.py":
        return
    room = _room(path.relative_to(PACKAGE).parts)
    assert room in ALLOWED, f"{room}: a new room needs a row in ALLOWED"
    used = {name.split(".")[1] for name in imports if name.startswith("fused_rnn.")}
    assert used <= ALLOWED[room] | {room}, f"{path.name} imports {sorted(used - ALLOWED[room])}"


@pytest.mark.parametrize("room", ["reference", "kernels"])
def test_kernels_and_reference_know_no_modules(room: str) -> None:
    for path in FILES:
        if _room(path.relative_to(PACKAGE).parts) == room:
            used = {name for name in _imports(path) if name.startswith(("torch.nn.", "torch.autograd."))}
            assert used <= {"torch.nn.functional.linear"}, f"{path}: {used}"


def test_files_are_short() -> None:
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) >= 400}
    assert not long
