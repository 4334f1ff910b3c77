"""Dependencies point one way: modules → functional → autograd → dispatch → kernels, and everything may read the data."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fused_rnn"
# What a cell is and which rows a step has: plain data.
DATA = {"cells", "steps"}
# A room -> the rooms that it may import.
ALLOWED = {
    "cells": set(),
    "steps": set(),
    "reference": DATA | {"reference"},
    "kernels": DATA | {"kernels", "_C"},
    "processes": set(),
    "dispatch": DATA | {"kernels", "processes"},
    "memory": {"_C"},
    "layer": DATA | {"dispatch", "memory"},
    "gradients": DATA | {"dispatch", "memory", "layer"},
    "per_sample": DATA | {"gradients", "layer", "memory"},
    "batching": DATA | {"layer"},
    "derivatives": DATA | {"reference", "layer", "batching"},
    "autocast": DATA,
    "checks": DATA | {"autocast"},
    "operators": DATA | {"autocast", "checks", "dispatch", "layer", "gradients", "sequences"},
    "autograd": DATA
    | {"autocast", "dispatch", "reference", "layer", "gradients", "operators", "per_sample", "batching", "derivatives"},
    "operators_autograd": DATA | {"checks", "dispatch", "layer", "operators", "batching", "derivatives"},
    "onnx": DATA | {"operators"},
    "entry": DATA | {"autocast", "autograd"},
    "sequences": {"steps"},
    "streaming": DATA | {"dispatch", "operators", "derivatives"},
    "stack": DATA | {"entry", "operators", "sequences"},
    "cell_functional": DATA | {"checks", "entry"},
    "functional": DATA | {"checks", "operators", "sequences", "stack", "cell_functional"},
    "whole": DATA
    | {"autocast", "autograd", "batching", "checks", "derivatives", "dispatch", "functional", "layer", "operators", "stack"}
    | {"streaming"},
    "initialisation": DATA,
    "modules": DATA | {"functional", "streaming", "whole", "initialisation"},
    "cell_modules": DATA | {"functional", "initialisation"},
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
