"""Dependencies point one way: nn → graph → kernels → cells → data. Files stay short, and kernels know nothing of modules."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fused_rnn"
# The rooms, each of which may import itself and those before it.
ROOMS = ("data", "cells", "kernels", "graph", "nn")
# What users import beside the public names: above all rooms.
FACES = ("functional", "onnx", "reference")
# Within kernels: backends know what a backend is, and not each other; the dispatcher finds them by name.
BACKENDS = ("cpp", "numba", "reference", "triton")
FILES = sorted(PACKAGE.rglob("*.py"))


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


def _rooms_used(path: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(path) if name.startswith("fused_rnn.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path: Path) -> None:
    assert not {name for name in _imports(path) if name.split(".")[0] in ("tests", "benchmarks")}
    if path == PACKAGE / "__init__.py":
        return
    room, *inside = path.relative_to(PACKAGE).with_suffix("").parts
    if not inside:
        assert room in FACES, f"{room}: belongs in one of {', '.join(ROOMS)}"
        allowed = {*ROOMS}
    else:
        assert room in ROOMS, f"{room}: a new room needs its place in ROOMS"
        allowed = {*ROOMS[: ROOMS.index(room) + 1]} | ({"_C"} if room == "kernels" else set())
    assert _rooms_used(path) <= allowed, f"{path.name} imports {sorted(_rooms_used(path) - allowed)}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_know_no_other(backend: str) -> None:
    for path in sorted((PACKAGE / "kernels" / backend).rglob("*.py")):
        used = {name.split(".")[2] for name in _imports(path) if name.startswith("fused_rnn.kernels.")}
        assert not used & ({*BACKENDS, "dispatch"} - {backend}), f"{path}: {used}"


def test_kernels_know_no_modules() -> None:
    for path in (PACKAGE / "kernels").rglob("*.py"):
        used = {name for name in _imports(path) if name.startswith(("torch.nn.", "torch.autograd."))}
        assert used <= {"torch.nn.functional.linear"}, f"{path}: {used}"


def test_files_are_short() -> None:
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) >= 400}
    assert not long
