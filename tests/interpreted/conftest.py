"""These tests run in a process of their own, where Triton interprets the kernels: test_triton_interpreted.py starts it."""

import os

import pytest

# Triton decides when it is imported, so a process that did not ask for its interpreter from the start has none of these tests.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is judged as float32; what cuDNN's switch allows is judged where a test says so."""
    from fused_rnn.kernels.triton import launch

    monkeypatch.setattr(launch, "allows_tf32", lambda: False)
