"""Which rows a time step works on: one scheme for dense, packed and right-padded batches."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.data import torch_private


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func: sizes have no derivative, and a wrapper must not outlive its transform."""
    while torch_private.is_wrapped(tensor):
        tensor = torch_private.inner(tensor)
    return tensor


def mapped(tensor: Tensor) -> bool:
    """Whether torch.func.vmap maps over a tensor, at whatever depth of its wrappers: then it has no one set of values."""
    if torch.compiler.is_compiling():
        # Dynamo knows this question alone.
        return torch_private.is_mapped(tensor)
    while torch_private.is_wrapped(tensor):
        if torch_private.is_mapped(tensor):
            return True
        tensor = torch_private.inner(tensor)
    return False


@dataclass(slots=True)
class Steps:
    """The rows of every time step.

    Step ``t`` works on the rows ``offsets[t] .. offsets[t] + batch_sizes[t] - 1``; row ``j`` of a step is always
    sequence ``j``. Sequences are sorted by length, longest first, so ``batch_sizes`` never grows.

    Attributes:
        length: T, the number of steps.
        batch: N, the number of sequences (``batch_sizes[0]`` or more: a sequence may have no step here).
        batch_sizes: (T,) int64 on the CPU, or None for a dense batch, where it is N at every step.
        offsets: (T,) int64 on the CPU, or None for a dense batch, where it is ``t * N``.
    """

    length: int
    batch: int
    batch_sizes: Tensor | None = None
    offsets: Tensor | None = None

    @staticmethod
    def packed(batch_sizes: Tensor, batch: int | None = None) -> Steps:
        """The steps of a PackedSequence: rows of all steps one after another, without gaps."""
        batch_sizes = unwrapped(batch_sizes)
        # What torch computes inside torch.func would be wrapped again.
        with torch_private.WithoutTransforms():
            offsets = torch.zeros_like(batch_sizes)
            torch.cumsum(batch_sizes[:-1], 0, out=offsets[1:])
            return Steps(len(batch_sizes), int(batch_sizes[0]) if batch is None else batch, batch_sizes, offsets)

    @property
    def dense(self) -> bool:
        """Whether every step has the same N rows."""
        return self.batch_sizes is None

    def rows(self, t_begin: int, t_end: int) -> slice:
        """The rows that steps ``t_begin .. t_end - 1`` span."""
        if self.batch_sizes is None or self.offsets is None:
            return slice(t_begin * self.batch, t_end * self.batch)
        if t_begin == t_end:
            return slice(0, 0)
        return slice(int(self.offsets[t_begin]), int(self.offsets[t_end - 1] + self.batch_sizes[t_end - 1]))

    def part(self, t_begin: int, t_end: int) -> Steps:
        """Steps ``t_begin .. t_end - 1`` on their own, their rows counted from the first of them."""
        if self.batch_sizes is None or self.offsets is None:
            return Steps(t_end - t_begin, self.batch)
        offsets = self.offsets[t_begin:t_end]
        return Steps(t_end - t_begin, self.batch, self.batch_sizes[t_begin:t_end], offsets - offsets[:1])

    def times(self, size: int) -> Steps:
        """The steps of a batch in which every sequence stands ``size`` times, one beside the other."""
        if self.batch_sizes is None or self.offsets is None:
            return Steps(self.length, self.batch * size)
        with torch_private.WithoutTransforms():
            return Steps(self.length, self.batch * size, self.batch_sizes * size, self.offsets * size)

    def divided(self, size: int) -> Steps:
        """What ``times`` with this size was called on."""
        if self.batch_sizes is None or self.offsets is None:
            return Steps(self.length, self.batch // size)
        with torch_private.WithoutTransforms():
            return Steps(self.length, self.batch // size, self.batch_sizes // size, self.offsets // size)


# The steps of a dense batch, which nobody changes: to make them anew takes longer than to find them.
dense_steps = functools.lru_cache(Steps)

_captured: list[object] = []


def keep_if_captured(tensors: object, device: torch.device) -> None:
    """Keep what a CUDA graph that is being captured will read of the steps, at the same address whenever it is replayed."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(tensors)
