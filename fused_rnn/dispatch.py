"""One table (cell, backend) -> kernels: chooses by device, explains, raises."""

from __future__ import annotations

import contextvars
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fused_rnn import processes
from fused_rnn.cells import CELLS, Cell
from fused_rnn.kernels import multiply, project, weight_gradient


@dataclass(frozen=True)
class Kernels:
    """The functions of one cell on one backend (contract: ``fused_rnn.kernels``)."""

    backend: str
    pack: Callable[..., Any]
    forward: Callable[..., None]
    backward: Callable[..., None]
    project: Callable[..., None]
    step: Callable[..., Any] | None
    layer_forward: Callable[..., Any] | None
    layer_backward: Callable[..., Any] | None
    takes_input: Callable[..., bool] | None
    weight_gradient: Callable[..., None]
    multiply: Callable[..., None]
    whole_forward: Callable[..., Any] | None
    whole_backward: Callable[..., Any] | None


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


# In order of preference. The package of a backend exports `unavailable() -> str | None` and `describe() -> str`, and has
# a module for each `Cell.module`. It may export `devices()`, where these are not always the same.
_PACKAGES = {
    "cpp": ("fused_rnn.kernels.cpp", ("cpu",)),
    "numba": ("fused_rnn.kernels.numba", ("cpu",)),
    "triton": ("fused_rnn.kernels.triton", ("cuda",)),
    # Plain torch runs on every device; the dispatcher asks only for these two, meta tensors never reach a kernel.
    "reference": ("fused_rnn.reference", ("cpu", "cuda")),
}
# A backend that serves these devices only where it was asked for: on a GPU a walk in plain torch is so slow that whoever wants
# it should say so.
_ON_REQUEST = {"reference": ("cuda",)}

_ENVIRONMENT = "FUSED_RNN_BACKEND"
_ENCODED = os.environ.encodekey(_ENVIRONMENT)
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
def _load(cell_name: str, name: str) -> Kernels:
    package = importlib.import_module(_PACKAGES[name][0])
    place = f"{_PACKAGES[name][0]}.{CELLS[cell_name].module}"
    if importlib.util.find_spec(place) is None:
        raise NotImplementedError(f"the {name} backend has no kernels of the cell {cell_name!r}")
    module = importlib.import_module(place)
    return Kernels(
        name,
        getattr(module, f"{cell_name}_pack"),
        getattr(module, f"{cell_name}_forward"),
        getattr(module, f"{cell_name}_backward"),
        getattr(package, "project", project),
        getattr(package, "step", None),
        getattr(package, "layer_forward", None),
        getattr(package, "layer_backward", None),
        getattr(package, "takes_input", None),
        getattr(package, "weight_gradient", weight_gradient),
        getattr(package, "multiply", multiply),
        getattr(package, "whole_forward", None),
        getattr(package, "whole_backward", None),
    )


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


def _from_environment() -> str | None:
    # As a rule there is no such name, and os.environ.get raises and catches two exceptions to say so, at every call of a layer.
    # What it looks into says it at once.
    names = getattr(os.environ, "_data", None)
    if names is not None and _ENCODED not in names:
        return None
    return os.environ.get(_ENVIRONMENT) or None


def kernels(cell: Cell, device: torch.device) -> Kernels:
    """Choose the kernels of ``cell`` on ``device``.

    Raises:
        ValueError: if ``FUSED_RNN_BACKEND`` names no backend.
        RuntimeError: if the backend that was asked for cannot run here, or not on this device; or if none was, and what runs
            on this device is too slow to be taken unasked.
        NotImplementedError: if no backend serves the device.
    """
    if cell.name not in CELLS:
        raise ValueError(f"unknown cell {cell.name!r}; known: {', '.join(CELLS)}")
    if processes.threads_lost:
        processes.use_one_thread()
    name = _asked_for.get()
    source = f"fused_rnn.backend({name!r})"
    if name is None:
        name = _from_environment()
        if name is None:
            return _load(cell.name, _automatic(device.type))
        source = f"{_ENVIRONMENT}={name}"
        _check_available(_check_name(name, source), source)
    devices = _devices(name)
    if device.type not in devices:
        raise RuntimeError(f"{source}: {name} runs on {' and '.join(devices)}, got a tensor on {device.type}")
    return _load(cell.name, name)
