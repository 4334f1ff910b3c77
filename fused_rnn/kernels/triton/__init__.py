"""The CUDA backend's place: its kernels are yet to be written."""

from __future__ import annotations


def unavailable() -> str | None:
    """Why this backend cannot run here."""
    return "its kernels are not part of this version"


def describe() -> str:
    """What this backend runs on."""
    raise NotImplementedError("the triton backend has no kernels in this version")
