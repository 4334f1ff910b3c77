"""fused_rnn, on the automatic backend or on one that was asked for."""

from __future__ import annotations

import functools
import importlib
from contextlib import nullcontext
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Provider
from benchmarks.problem import Problem, module_forward, module_step


def peer(name: str, backend: str | None) -> Peer:
    """fused_rnn as a peer.

    Args:
        name: key of the peer.
        backend: one of ``fused_rnn.backends()``, or None for the automatic choice.
    """
    return Peer(
        name=name,
        title="ours" if name == "ours" else f"ours, {backend}",
        unavailable=functools.partial(_unavailable, backend),
        version=lambda: str(package().__version__),
        refuses=lambda case: None,
        prepare=functools.partial(_prepare, backend),
    )


def package() -> Any:
    """fused_rnn, imported late: the tables of older results can be drawn without it."""
    return importlib.import_module("fused_rnn")


def _unavailable(backend: str | None) -> str | None:
    try:
        status = package().backends().get(backend)
    except (ImportError, AttributeError) as error:
        return f"cannot use fused_rnn: {error}"
    if backend is None:
        return None
    if status is None:
        return f"unknown backend {backend!r}"
    return None if status.available else str(status.detail)


def _prepare(backend: str | None, problem: Problem, case: Case, threads: int) -> Provider:
    module = getattr(package(), case.class_name)(
        case.shape.I,
        case.shape.H,
        num_layers=case.num_layers,
        bidirectional=case.bidirectional,
        dtype=problem.input.dtype,
    )
    module.load_state_dict(problem.module.state_dict())
    return Provider(
        step=module_step(module, problem, case.training),
        forward=module_forward(module, problem, case.training)[0],
        scope=functools.partial(package().backend, backend) if backend else nullcontext,
    )
