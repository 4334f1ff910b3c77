"""fused_rnn, on the automatic backend or on one that was asked for."""

from __future__ import annotations

import functools
import importlib
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Provider
from benchmarks.problem import Problem, call_module, make_module, module_forward, module_step


def peer(name: str, backend: str | None) -> Peer:
    """fused_rnn as a peer.

    Args:
        name: key of the peer.
        backend: one of ``fused_rnn.backends()``, or None for the automatic choice.
    """
    return Peer(
        name=name,
        title="ours" if name == "ours" else f"ours, {backend}",
        unavailable=functools.partial(unavailable, backend),
        version=functools.partial(version, backend),
        refuses=lambda case: None,
        prepare=functools.partial(_prepare, backend),
    )


def package() -> Any:
    """fused_rnn, imported late: the tables of older results can be drawn without it."""
    return importlib.import_module("fused_rnn")


def unavailable(backend: str | None) -> str | None:
    """Why a backend cannot be measured here, or None; None for the automatic choice."""
    try:
        status = package().backends().get(backend)
    except (ImportError, AttributeError) as error:
        return f"cannot use fused_rnn: {error}"
    if backend is None:
        return None
    if status is None:
        return f"unknown backend {backend!r}"
    if "cpu" not in status.devices:
        return f"runs on {' and '.join(status.devices)}, this measures the CPU"
    return None if status.available else str(status.detail)


def version(backend: str | None) -> str:
    """The package's version, and what a backend runs on."""
    number = str(package().__version__)
    return number if backend is None else f"{number} ({package().backends()[backend].detail})"


def call(module: Any, problem: Problem, input_: Tensor, hx: Any) -> tuple[Any, Any]:
    """Call a module of this package, with the keywords that torch.nn has not."""
    if problem.reset is not None:
        out, states = module(input_, hx, reset=problem.reset)
    elif problem.lengths is not None:
        out, states = module(input_, hx, lengths=problem.lengths)
    else:
        out, states = call_module(module, problem, input_, hx)
    return out, states


def _prepare(backend: str | None, problem: Problem, case: Case, threads: int) -> Provider:
    module = make_module(case, package())
    module.load_state_dict(problem.module.state_dict())
    return Provider(
        step=module_step(module, problem, case.training, call=call),
        forward=module_forward(module, problem, case.training, call=call)[0],
        scope=functools.partial(package().backend, backend) if backend else nullcontext,
    )
