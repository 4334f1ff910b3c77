"""Run a compiled kernel on a team of threads.

A kernel needs all its threads at once, because they wait for each other at every time step. Numba's ``prange`` does not
promise that. So the team comes from GNU OpenMP, by the same entry point that compiled C code uses: in the runtime that torch
has loaded, whose threads are then still warm from torch's matrix product. The kernel asks OpenMP how many threads came and
shares the work among those. Where torch has no GNU OpenMP, the team is made of Python threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable

import torch

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _gomp() -> ctypes.CDLL | None:
    """The GNU OpenMP runtime that this process has loaded, or None."""
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/self/maps") as maps:
        paths = [line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line]
    if not paths:
        return None
    library = ctypes.CDLL(paths[0])
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


@functools.cache
def team_size_address() -> int:
    """Address of the C function that tells how many threads run the kernel; 0 where the kernel is told beforehand."""
    library = _gomp()
    return 0 if library is None else _address(library.omp_get_num_threads)


@functools.cache
def give_way_address() -> int:
    """Address of the C function that lets other threads run, or 0."""
    if sys.platform == "win32":
        return _address(ctypes.windll.kernel32.SwitchToThread)
    return _address(ctypes.CDLL(None).sched_yield)


def describe() -> str:
    """Where the threads come from."""
    return "GNU OpenMP threads" if _gomp() is not None else "Python threads"


def num_threads() -> int:
    """Threads that a kernel may use: torch's number; 1 in a forked child, where OpenMP would wait for threads that are gone."""
    return 1 if _forked else torch.get_num_threads()


def run(function: Callable[[int], None], address: int, argument: int, threads: int) -> None:
    """Call ``function(argument)`` on ``threads`` threads at once, without the GIL, and wait for all.

    Args:
        function: a ``ctypes`` function, which releases the GIL.
        address: the same function as an address.
        argument: address of the kernel's arguments.
        threads: 1 or more.
    """
    if threads == 1:
        function(argument)
        return
    library = _gomp()
    if library is not None:
        library.GOMP_parallel(address, argument, threads, 0)
        return
    others = [threading.Thread(target=function, args=(argument,)) for _ in range(threads - 1)]
    for other in others:
        other.start()
    function(argument)
    for other in others:
        other.join()
