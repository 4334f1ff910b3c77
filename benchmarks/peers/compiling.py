"""What the peers under torch.compile share."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch

# Every case is another shape, hence another compilation of the same code. At torch's own limit (8) the rest would silently
# run in eager mode.
_RECOMPILATIONS = 1 << 16


@functools.cache
def unavailable() -> str | None:
    """Why torch.compile cannot work here, or None."""
    if not torch._dynamo.is_dynamo_supported():
        return f"torch.compile of torch {torch.__version__} does not run on Python {sys.version.split()[0]}"
    compiler = os.environ.get("CXX") or "g++"
    return (
        None
        if shutil.which(compiler) or shutil.which("clang++")
        else f"torch.compile needs a C++ compiler ({compiler} not found)"
    )


def scope() -> AbstractContextManager[Any]:
    """Where calls compile without a limit on how often."""
    # Imported late: this takes seconds.
    import torch._dynamo.config as config

    changes = {"recompile_limit": _RECOMPILATIONS, "accumulated_recompile_limit": _RECOMPILATIONS}
    patch: AbstractContextManager[Any] = config.patch(changes)
    return patch
