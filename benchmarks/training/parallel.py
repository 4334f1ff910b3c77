"""Data-parallel training under torchrun: each process trains on its share of the global batch, the first one reports.

    torchrun --nproc_per_node 2 -m benchmarks.training.language_model

Without torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Before the group exists: its functions take the group of the time of the import for their default, and keep it for good.
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.training.trainer import LossOf, Settings

Segment = tuple[Tensor, Tensor, bool]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together.

    Attributes:
        rank: which of them this is.
        size: how many there are.
        here: how many of them are on this machine.
    """

    rank: int = 0
    size: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def share(self, segment_at: Callable[[int], Segment], batch: int) -> Callable[[int], Segment]:
        """Cut this process's streams out of the segments (T, B); with equal shares the mean of the means is the mean.

        Raises:
            ValueError: if ``batch`` is no multiple of the number of processes.
        """
        if batch % self.size:
            raise ValueError(f"expected a multiple of the {self.size} processes, got {batch}")
        mine = slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

        def share_at(number: int) -> Segment:
            inputs, targets, starts = segment_at(number)
            return inputs[:, mine], targets[:, mine], starts

        return share_at

    def settings(self, settings: Settings) -> Settings:
        """Let the processes draw dropout masks of their own."""
        return dataclasses.replace(settings, seed=settings.seed + (self.rank << 40))

    def wrap(self, model: Model) -> Model | DistributedDataParallel:
        """Let the gradients be averaged over the processes in the backward."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def mean(self, loss_of: LossOf) -> LossOf:
        """Let the loss have the value of the whole batch, the same in all processes, and the gradient of this one's share."""
        if self.size == 1:
            return loss_of

        def mean_of(model: Any, batch: Any, carry: Any) -> tuple[Tensor, Any]:
            loss, carry = loss_of(model, batch, carry)
            mean = loss.detach() / self.size
            dist.all_reduce(mean)
            return _WithValue.apply(loss, mean), carry

        return mean_of

    def agree(self, flag: bool) -> bool:
        """What the first process says: a clock may not stop one process and leave the others waiting."""
        if self.size == 1:
            return flag
        said = torch.tensor(flag)
        dist.broadcast(said, 0)
        return bool(said)


class _WithValue(torch.autograd.Function):
    """The second argument's value with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor, None]:
        return d_value, None


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun has started, until the end of the block.

    The group's threads end with it, if nothing holds it any more. One that drops a tensor while the interpreter shuts down
    aborts the process.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Processes()
        return
    dist.init_process_group("gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
    finally:
        # Wrapped models hold the group, and are parts of cycles.
        gc.collect()
        dist.destroy_process_group()
