"""setup.py compiles what has changed and nothing else, for the instruction sets asked for.

It builds a small tree of the same files, which takes a second.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.install,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests run away from the source tree"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no compiler"),
]
ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86-64")

PARTS = ("backward", "forward", "others")
MODULE = """
#include <Python.h>
#include "bind/binding.h"
#include "run/machine.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
PyMODINIT_FUNC PyInit__C() {
  try {
    fused_rnn::check_instruction_sets();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  return PyModule_Create(&definition);
}
"""


class Tree:
    """A copy of setup.py with sources that compile at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "fused_rnn").mkdir()
        (folder / "fused_rnn" / "__init__.py").touch()
        # What the cells' header is written from.
        for room in ("cells", "data", "kernels/cpp"):
            shutil.copytree(
                ROOT / "fused_rnn" / room, folder / "fused_rnn" / room, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "fused_rnn" / "kernels" / "written.py", folder / "fused_rnn" / "kernels")
        for room in ("kernels", "bind", "run"):
            (folder / "csrc" / room).mkdir(parents=True)
        shutil.copy(ROOT / "setup.py", folder)
        shutil.copy(ROOT / "csrc" / "run" / "machine.h", folder / "csrc" / "run")
        self.write("kernel.h", "inline int kernel() { return 1; }")
        self.write("forward.h", '#include "kernel.h"')
        self.write("bind/binding.h", "")
        self.write("bind/module.cpp", MODULE)
        self.write("kernels/int8.cpp", "")
        self.write("kernels/table.cpp", '#define FUSED_RNN_CELL(name, Struct)\n#include "cells/cells.def"')
        for part in PARTS:
            self.write(f"kernels/{part}.cpp", f'#include "{"forward" if part == "forward" else "kernel"}.h"')

    def write(self, name: str, text: str) -> None:
        (self.folder / "csrc" / name).write_text(text + "\n")

    def run(self, *command: str, **environment: str) -> tuple[int, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FUSED_RNN_", "PYTHON"))}
        settings = {"FUSED_RNN_REQUIRE_CPP": "1", "FUSED_RNN_ISAS": "baseline"} | environment
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=inherited | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def objects(self) -> dict[str, int]:
        """When each was written."""
        if not (self.folder / "build").exists():
            return {}
        (folder,) = (self.folder / "build").glob("temp*")
        return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.o")}

    def build(self, *options: str, **environment: str) -> set[str]:
        """Which objects were compiled."""
        return self.build_by("setup.py", "build_ext", "--inplace", *options, **environment)

    def build_by(self, *command: str, **environment: str) -> set[str]:
        before = self.objects()
        status, said = self.run(*command, **environment)
        assert status == 0, said
        made = {name for name, time in self.objects().items() if before.get(name) != time}
        assert f"{len(made)} of" in said
        return made

    def compiler(self, script: str) -> str:
        path = self.folder / "compiler"
        path.write_text(f'#!/bin/sh\n{script}\nexec {os.environ.get("CXX", "g++")} "$@"\n')
        path.chmod(0o755)
        return str(path)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def _files(objects: set[str]) -> set[str]:
    return {Path(name).name for name in objects}


def test_what_has_changed_is_compiled_again(tree: Tree) -> None:
    first = tree.build()
    assert len(first) == len(tree.objects()) == 9
    assert tree.build() == set()

    # Times say nothing.
    for path in (tree.folder / "csrc").rglob("*.*"):
        path.touch()
    assert tree.build() == set()

    tree.write("bind/binding.h", "// other")
    assert _files(tree.build()) == {"module.o"}
    tree.write("forward.h", '#include "kernel.h"\n// other')
    assert _files(tree.build()) == {"forward.o"}
    tree.write("kernel.h", "inline int kernel() { return 2; }")
    made = tree.build()
    assert _files(made) == {"backward.o", "forward.o", "others.o"}
    assert len(made) == 6

    # A cell less.
    cells = tree.folder / "fused_rnn" / "cells" / "__init__.py"
    assert cells.read_text().count(", mgu)}") == 1
    cells.write_text(cells.read_text().replace(", mgu)}", ")}"))
    assert _files(tree.build()) == {"table.o"}

    # An object of another making, as a checkout of an older setup.py leaves one.
    (module,) = (tree.folder / "build").rglob("module.o")
    shutil.copy(next((tree.folder / "build").rglob("forward.o")), module)
    assert _files(tree.build()) == {"module.o"}
    # A header that is read no more may go.
    tree.write("forward.h", "")
    (tree.folder / "csrc" / "bind" / "binding.h").rename(tree.folder / "csrc" / "bind" / "bound.h")
    tree.write("bind/module.cpp", MODULE.replace("bind/binding.h", "bind/bound.h"))
    assert _files(tree.build()) == {"forward.o", "module.o"}
    assert tree.build() == set()


def test_how_it_is_compiled_has_changed(tree: Tree) -> None:
    every = tree.build()
    assert tree.build(FUSED_RNN_CFLAGS="-O1") == every
    assert tree.build(FUSED_RNN_CFLAGS="-O1") == set()
    compiler = tree.compiler("")
    assert tree.build(CXX=compiler) == every
    assert tree.build(CXX=compiler) == set()
    tree.compiler('case "$*" in *--version*) echo another;; esac')
    assert tree.build(CXX=compiler) == every
    assert tree.build("--force", CXX=compiler) == every


def test_an_editable_install_keeps_its_objects(tree: Tree) -> None:
    """What pip asks of setuptools for ``pip install -e .``; setuptools gives it a directory that is gone afterwards."""
    editable = ("-c", "from setuptools import build_meta; build_meta.build_editable('.')")
    every = tree.build_by(*editable)
    assert len(every) == 9
    tree.write("bind/binding.h", "// other")
    assert _files(tree.build_by(*editable)) == {"module.o"}
    assert tree.build() == set()


def test_a_failed_object_is_compiled_again(tree: Tree) -> None:
    tree.build()
    tree.write("bind/binding.h", "wrong")
    for _ in range(2):
        status, said = tree.run("setup.py", "build_ext", "--inplace")
        assert status != 0
        assert "csrc/bind/module.cpp for common did not compile" in said
    tree.write("bind/binding.h", "")
    assert _files(tree.build()) == {"module.o"}


@ON_X86
def test_instruction_sets_that_are_asked_for(tree: Tree) -> None:
    """Without the baseline the extension says so where it does not run."""
    made = tree.build(FUSED_RNN_ISAS="avx512, avx2")
    folders = {name.partition("/")[0] for name in made}
    assert folders == {"common"} | {name + of for name in ("avx2", "avx512") for of in ("", "-float", "-double")}
    # Here the macro stands for a machine without these.
    lesser = {"FUSED_RNN_ISAS": "avx512,avx2", "FUSED_RNN_CFLAGS": "-D'__builtin_cpu_supports(name)=0'"}
    tree.build(**lesser)
    status, said = tree.run("-c", "import fused_rnn._C")
    assert status != 0
    assert "kernels for avx2, avx512 alone, and this machine runs baseline: build it again without FUSED_RNN_ISAS" in said
    tree.build(FUSED_RNN_ISAS="", FUSED_RNN_CFLAGS=lesser["FUSED_RNN_CFLAGS"])
    assert tree.run("-c", "import fused_rnn._C") == (0, "")


@ON_X86
@pytest.mark.parametrize("required", ["0", "1"])
def test_instruction_sets_that_cannot_be_had(tree: Tree, required: str) -> None:
    """An error, whether or not the extension is required."""
    build = ("setup.py", "build_ext", "--inplace")
    status, said = tree.run(*build, FUSED_RNN_ISAS="avx512,avx3", FUSED_RNN_REQUIRE_CPP=required)
    assert status != 0
    assert "FUSED_RNN_ISAS: expected some of baseline, avx2, avx512, got 'avx3'" in said
    older = tree.compiler('case "$*" in *-mavx512f*) echo "unknown option" >&2; exit 1;; esac')
    status, said = tree.run(*build, FUSED_RNN_ISAS="avx512", FUSED_RNN_REQUIRE_CPP=required, CXX=older)
    assert status != 0
    assert "FUSED_RNN_ISAS: the compiler has no avx512 for this processor, but baseline, avx2" in said
    assert tree.objects() == {}
