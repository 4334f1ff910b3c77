"""The CPU backend that needs no C++ compiler: Numba compiles the kernels when they are first used."""

from __future__ import annotations

import functools

from fused_rnn.cells import CELLS
from fused_rnn.kernels.protocol import Backend


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None where it can."""
    try:
        import numba
    except ImportError as error:
        return f"Numba cannot be imported ({error}); pip install numba"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    try:
        from fused_rnn.kernels.numba import derived  # noqa: F401
    except Exception as error:  # A Numba too old or too new fails in ways of its own; the caller is told which.
        return f"its kernels do not load with numba {numba.__version__} ({type(error).__name__}: {error})"
    return None


def describe() -> str:
    """Numba's version, the width of the vectors and where the threads come from."""
    import numba

    from fused_rnn.kernels.numba import team, vector

    return f"numba {numba.__version__}, {8 * vector.REGISTER_BYTES}-bit vectors, {team.describe()}"


def load() -> Backend:
    """The backend."""
    from fused_rnn.kernels.by_walk import WalkBackend
    from fused_rnn.kernels.numba.derived import walk_of

    return WalkBackend("numba", CELLS, walk_of, derives=True)
