"""Kernels as machine code: compiled when first asked for, then kept on disk."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types

_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
_COMPILING = threading.RLock()


@dataclass(frozen=True)
class Compiled:
    """A machine-code kernel."""

    call: Callable[[int], None]
    address: int


@functools.cache
def _version() -> int:
    """A number that changes with any source file of this package, because Numba looks only at the one that it compiles."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little")


@functools.cache
def compiled(make: Callable[[Any, int], Callable[[int], None]], dtype: torch.dtype) -> Compiled:
    """Compile the kernel of one dtype, or take it from Numba's cache on disk."""
    if dtype not in _DTYPES:
        raise TypeError(f"expected float32 or float64 buffers, got {dtype}")
    kernel = make(_DTYPES[dtype](0), _version())
    # Part of the linker's symbol: kernels from different processes' caches must not be taken for each other.
    kernel.__qualname__ = f"{kernel.__name__}_{np.dtype(_DTYPES[dtype]).name}"
    options = {"nopython": True, "error_model": "numpy"}
    signature = types.void(types.int64)
    with _COMPILING:
        try:
            function = numba.cfunc(signature, cache=True, **options)(kernel)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            # Neither the package's directory nor the user's can be written: compile anew in every process.
            function = numba.cfunc(signature, **options)(kernel)
    return Compiled(function.ctypes, function.address)
