"""Triton's kernels on the CPU, under its interpreter, each file of tests/interpreted in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "interpreted"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_under_the_interpreter(name: str) -> None:
    """Triton reads TRITON_INTERPRET when it is imported, and this process may have imported it before."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for variable in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "FUSED_RNN_BACKEND"):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout
