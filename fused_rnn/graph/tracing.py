"""Questions to whatever traces a call, and what torch.jit.trace warns of and need not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")


def quietly(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.jit.trace from warning of what ``function`` compares.

    It warns of every comparison of sizes, because it cannot record them. Those of this package check arguments; what depends on
    a size is recorded.
    """

    @functools.wraps(function)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch._C._is_tracing():
            return function(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit._trace.TracerWarning)
            return function(*args, **kwargs)

    return quiet


def exporting() -> bool:
    """Whether torch.export is tracing the call."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    # torch 2.6 cannot tell the export that runs Dynamo from torch.compile: a program exported so keeps its tape.
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def refuse_traced_tangents() -> None:
    """Raise under torch.func.linearize: its trace needs operations that have tangents, and those need the values of lengths."""
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "fused_rnn: a trace of tangents (torch.func.linearize) does not know the values of lengths and batch_sizes; "
            "use torch.func.jvp"
        )
