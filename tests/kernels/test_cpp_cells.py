"""The C++ cells are written from their equations: what the header says, and what the kernels have no way for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_rnn import cell
from fused_rnn.cells import BUILT_IN, sigmoid, tanh
from fused_rnn.kernels.cpp.derived import header_of, list_of
from tests.equations_support import CELLS

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "build/generated/cells"
# Those of which the C++ kernels have no way for something: the next test says what.
REFUSED = {"late", "memory"}


def test_the_header_reads_as_one_would_write_it() -> None:
    text = header_of([BUILT_IN["gru"]])
    assert "struct Gru : CellDefaults {" in text
    assert "static constexpr int kGates = 3;  // r, z, n\n" in text
    assert "static constexpr int kGradients = 4;  // hn, r, z, n\n" in text
    assert "activate<T, 2, 0>(group);\n    const Vec<T> r = group[0], z = group[1];\n" in text
    assert "const Vec<T> n = tanh<T>(x_n + r * hn);\n" in text
    assert "io.store(p.h, n + z * (h_before - n));\n" in text
    assert "io.store(p.d_gates + H, d_gate_n * hn * r * (one - r));\n" in text


@pytest.mark.skipif(not GENERATED.is_dir(), reason="the extension was not built in this folder")
def test_what_was_built_is_what_the_equations_say() -> None:
    cells = list(BUILT_IN.values())
    assert (GENERATED / "equations.h").read_text() == header_of(cells)
    assert (GENERATED / "cells.def").read_text() == list_of(cells)


def test_no_torch_is_needed_to_write_it(tmp_path: Path) -> None:
    """As where pip builds: there is setuptools, and pybind11."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fused_rnn", "csrc"):
        (tmp_path / name).symlink_to(ROOT / name)
    program = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "-q", "write_cells"]
runpy.run_path("setup.py")
"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "build/generated/cells/equations.h").read_text() == header_of(BUILT_IN.values())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_every_cell_that_it_takes_compiles(tmp_path: Path) -> None:
    """All functions of all structs, on whole vectors and on parts."""
    definitions = [each for name, each in CELLS.items() if name not in REFUSED]
    (tmp_path / "equations.h").write_text(header_of(definitions))
    lines = ['#include "equations.h"', "using namespace fused_rnn::baseline;"]
    for number, each in enumerate(definitions):
        struct = "".join(word.capitalize() for word in each.row.name.split("_"))
        for io in ("Whole<float>", "First<float>"):
            arguments = f"{io} io, const Vec<float>* sums, const ForwardPoint<float>& f, const BackwardPoint<float>& b"
            calls = [f"{struct}<float>::forward(io, sums, f)", f"{struct}<float>::backward(io, sums[0], b)"]
            if each.row.later:
                calls += [f"{struct}<float>::forward_later(io, sums, f)", f"{struct}<float>::backward_later(io, sums[0], b)"]
            lines.append(f"void all_of_{number}({arguments}) {{ {'; '.join(calls)}; }}")
    (tmp_path / "all.cpp").write_text("\n".join(lines) + "\n")
    folders = [f"-I{ROOT / 'csrc'}", f"-I{GENERATED.parent}"]
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-DFUSED_RNN_ISA=baseline", *folders]
    done = subprocess.run(["g++", *flags, "all.cpp"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_kernels_have_no_way_for() -> None:
    with pytest.raises(
        ValueError, match=r"memory_.*read one state before the step in the backward, and it reads h and another"
    ):
        header_of([CELLS["memory"]])
    with pytest.raises(ValueError, match=r"late_.*store the second state in the first stage, and a later gate has a share"):
        header_of([CELLS["late"]])

    @cell(gates="a b c")
    def hands_on_two(x, W, h):
        a = sigmoid(x.a + W.a(h))
        b = sigmoid(x.b + W.b(h))
        return a * b * h + (a - b) * tanh(x.c + W.c(a * h))

    with pytest.raises(ValueError, match=r"hand one value beside the operand from the first stage .*, and it needs a, b"):
        header_of([hands_on_two])
