"""A forked child has none of its parent's threads, and OpenMP, which torch's products use, would wait for them for ever."""

from __future__ import annotations

import os
import warnings

import torch

# Whether this process was forked from one that had more threads than the one that forked.
threads_lost = False
_had_threads = False


def _before_fork() -> None:
    global _had_threads
    try:
        _had_threads = len(os.listdir("/proc/self/task")) > 1
    except OSError:
        # Not Linux: nobody can say, so the worst is assumed.
        _had_threads = True


def _in_child() -> None:
    global threads_lost
    threads_lost = threads_lost or _had_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)


def use_one_thread() -> None:
    """Set torch to one thread, once, in a child whose parent's threads are gone; say so where it was set to more."""
    global threads_lost
    threads_lost = False
    if torch.get_num_threads() > 1:
        warnings.warn(
            "fused_rnn: this process was forked from one with running threads, for which torch's products would wait for ever. "
            "torch is set to one thread here. Call torch.set_num_threads(1) at the start of the child to say that this is "
            'meant, or start it with multiprocessing.get_context("spawn").',
            stacklevel=2,
        )
        torch.set_num_threads(1)
