"""What only the Numba backend has: threads of Python's, vectors of any width, code kept in memory only."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from test_kernels import BACKENDS, Case, check, every_cell

import fused_rnn

pytestmark = pytest.mark.skipif("numba" not in BACKENDS, reason="Numba cannot run here")


@every_cell
def test_numba_without_openmp(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no GNU OpenMP, Python threads make up the team."""
    from fused_rnn.kernels.numba import team

    monkeypatch.setattr(team, "_gomp", lambda: None)
    monkeypatch.setattr(team, "team_size_address", lambda: 0)
    check("numba", cell, Case(batch=1, hidden=200), torch.float32)
    check("numba", cell, Case(batch=40, hidden=64, reverse=(False, True)), torch.float32)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")
@pytest.mark.parametrize(("cpu", "features", "bits"), [("haswell", "+avx2,+fma", 256), ("x86-64", "+sse2", 128)])
def test_numba_with_narrower_vectors(cpu: str, features: str, bits: int) -> None:
    """CPUs with smaller registers take other tiles."""
    program = (
        "import torch, fused_rnn; from test_kernels import Case, check\n"
        f"assert '{bits}-bit' in fused_rnn.backends()['numba'].detail\n"
        "check('numba', 'lstm', Case(batch=21, hidden=33, projection=9, steps=4, reset=True), torch.float32)"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=os.path.dirname(__file__),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_describe_names_version_and_vectors() -> None:
    """``backends()`` says what the kernels were compiled for."""
    detail = fused_rnn.backends()["numba"].detail
    assert detail.startswith("numba ")
    assert "-bit vectors" in detail


def test_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no directory to write to, kernels are compiled in memory."""
    from numba.core.caching import FunctionCache

    from fused_rnn.kernels.numba import rnn
    from fused_rnn.kernels.numba.compiled import compiled

    def no_place(self: FunctionCache, function: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(FunctionCache, "__init__", no_place)
    assert compiled.__wrapped__(rnn._backward_relu_kernel, torch.float32).address != 0


def test_other_dtypes_are_refused() -> None:
    """The error names what is allowed and what came."""
    from fused_rnn.kernels.numba import gru
    from fused_rnn.steps import Steps

    with pytest.raises(TypeError, match=r"expected float32 or float64 buffers, got torch\.bfloat16"):
        gru.gru_pack([torch.zeros(12, 4, dtype=torch.bfloat16)], None, Steps(9, 3), False)
