"""The backends that there are: chooses one by device, explains, raises."""

from __future__ import annotations

import contextvars
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fused_rnn.data.cell import Cell
from fused_rnn.kernels import processes
from fused_rnn.kernels.protocol import Backend, LayerCall


@dataclass(frozen=True)
class Status:
    """What ``backends()`` says of one backend.

    Attributes:
        available: whether it can run here.
        devices: the torch device types that it serves.
        detail: what it runs on (instruction set, version), or why it cannot run and how to mend it.
    """

    available: bool
    devices: tuple[str, ...]
    detail: str


# In order of preference. The package of a backend exports `unavailable() -> str | None`, `describe() -> str` and
# `load() -> Backend`. It may export `devices()`, where these are not always the same.
_PACKAGES = {
    "cpp": ("fused_rnn.kernels.cpp", ("cpu",)),
    "numba": ("fused_rnn.kernels.numba", ("cpu",)),
    "triton": ("fused_rnn.kernels.triton", ("cuda",)),
    # Plain torch runs on every device; the dispatcher asks only for these two, meta tensors never reach a kernel.
    "reference": ("fused_rnn.kernels.reference", ("cpu", "cuda")),
}
# A backend that serves these devices only where it was asked for: on a GPU a walk in plain torch is so slow that whoever wants
# it should say so.
_ON_REQUEST = {"reference": ("cuda",)}

_ENVIRONMENT = "FUSED_RNN_BACKEND"
_ENCODED = os.environ.encodekey(_ENVIRONMENT)
_environment: Any = getattr(os.environ, "_data", {_ENCODED})
_asked_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("fused_rnn_backend", default=None)


@functools.cache
def _devices(name: str) -> tuple[str, ...]:
    """The torch device types that a backend serves here."""
    package, devices = _PACKAGES[name]
    ask = getattr(importlib.import_module(package), "devices", None)
    return devices if ask is None else tuple(ask())


@functools.cache
def _unavailable(name: str) -> str | None:
    """Why a backend cannot run here, or None where it can."""
    reason: str | None = importlib.import_module(_PACKAGES[name][0]).unavailable()
    return reason


def backends() -> dict[str, Status]:
    """List every backend, whether it is available here, and why not.

    Returns:
        name -> ``Status(available, devices, detail)``, in order of preference.

    >>> backends()["reference"].available
    True
    """
    listed = {}
    for name, (package, _) in _PACKAGES.items():
        reason = _unavailable(name)
        detail = reason or importlib.import_module(package).describe()
        listed[name] = Status(reason is None, _devices(name), detail)
    return listed


def _check_name(name: object, source: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected the name of a backend (a str), got {type(name).__name__}")
    if name not in _PACKAGES:
        raise ValueError(f"{source}: expected one of {', '.join(_PACKAGES)}, got {name!r}")
    return name


def _check_available(name: str, source: str) -> None:
    reason = _unavailable(name)
    if reason is not None:
        others = [other for other in _PACKAGES if _unavailable(other) is None]
        raise RuntimeError(f"{source}: {name} cannot run here: {reason}. Available: {', '.join(others)}")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run everything inside the ``with`` block, backward included, on one backend.

    The choice follows the calling thread or task; a layer keeps the backend of its forward for its backward. A compiled or
    exported program is not tied to one: it asks each time it runs. Put the ``with`` around its call. Inside of what
    torch.compile traces, a ``with`` breaks the graph.

    Args:
        name: ``"cpp"``, ``"numba"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if it cannot run here; the message says why and what is available.

    >>> with backend("reference"):
    ...     pass
    """
    source = f"fused_rnn.backend({name!r})"
    _check_available(_check_name(name, source), source)
    token = _asked_for.set(name)
    try:
        yield
    finally:
        _asked_for.reset(token)


@functools.cache
def _load(name: str) -> Backend:
    backend: Backend = importlib.import_module(_PACKAGES[name][0]).load()
    return backend


@functools.cache
def _automatic(device_type: str) -> str:
    """The best available backend of a device; warns once if a faster one is missing."""
    candidates = [name for name, (_, devices) in _PACKAGES.items() if device_type in devices]
    for name in candidates:
        if _unavailable(name) is None:
            if device_type in _ON_REQUEST.get(name, ()):
                raise RuntimeError(
                    f"fused_rnn: {candidates[0]} cannot run on {device_type} here: {_unavailable(candidates[0])}. "
                    f"The {name} backend would serve, slowly: fused_rnn.backend({name!r}) or {_ENVIRONMENT}={name}."
                )
            if name != candidates[0]:
                warnings.warn(
                    f"fused_rnn: {candidates[0]} cannot run here: {_unavailable(candidates[0])}. "
                    f"Using the slower {name} backend on {device_type}.",
                    stacklevel=2,
                )
            return name
    raise NotImplementedError(
        f"fused_rnn has no backend for device {device_type!r}; it runs on cpu and cuda. Move the module and its input there."
    )


@functools.cache
def _unasked(device: torch.device) -> Backend:
    # Asked for by the device itself: to name its type takes torch as long as everything else here together.
    return _load(_automatic(device.type))


@functools.cache
def _deriving(device: torch.device) -> Backend:
    """The best backend of a device that makes kernels of equations."""
    for name, (_, devices) in _PACKAGES.items():
        if device.type in devices and device.type not in _ON_REQUEST.get(name, ()) and _unavailable(name) is None:
            backend = _load(name)
            if backend.derives:
                return backend
    raise NotImplementedError(
        f"fused_rnn: no backend of {device.type} makes kernels of a cell's equations. The reference backend would serve, "
        f"slowly: fused_rnn.backend('reference') or {_ENVIRONMENT}=reference."
    )


def choose(device: torch.device, cell: Cell | None = None) -> Backend:
    """Choose the backend for tensors on ``device``.

    Args:
        cell: which cell; None for a built-in one.

    Raises:
        ValueError: if ``FUSED_RNN_BACKEND`` names no backend.
        RuntimeError: if the backend that was asked for cannot run here, or not on this device; or if none was, and what runs
            on this device is too slow to be taken unasked.
        NotImplementedError: if no backend serves the device.
    """
    if processes.threads_lost:
        processes.use_one_thread()
    name = _asked_for.get()
    if name is None:
        # As a rule there is no such name, and os.environ.get raises and catches two exceptions to say so. What it looks into
        # says it at once.
        name = os.environ.get(_ENVIRONMENT) or None if _ENCODED in _environment else None
        if name is None:
            return _deriving(device) if cell is not None and cell.derived else _unasked(device)
        source = f"{_ENVIRONMENT}={name}"
        _check_available(_check_name(name, source), source)
    else:
        source = f"fused_rnn.backend({name!r})"
    if cell is not None and cell.derived and not _load(name).derives:
        raise NotImplementedError(
            f"{source}: {name} makes no kernels of the equations of {cell.mode}; leave the choice of the backend free"
        )
    devices = _devices(name)
    if device.type not in devices:
        raise RuntimeError(f"{source}: {name} runs on {' and '.join(devices)}, got a tensor on {device.type}")
    return _load(name)


def check_supported(call: LayerCall) -> None:
    """Raise NotImplementedError if the chosen backend cannot compute a layer; the message says why."""
    reason = call.layer.backend.supports(call)
    if reason is not None:
        raise NotImplementedError(f"fused_rnn: the {call.layer.backend.name} backend cannot compute this layer: {reason}")
