"""Train the same model with several implementations, step by step side by side, and time each one's own steps.

Nothing here knows the job: a job is a model, a function from a step number to a batch, and a function that gives the loss.
"""

from __future__ import annotations

import copy
import enum
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.training.breakdown import RecurrentClock

# (model, batch, what the last step carried over) → (loss, what to carry to the next step). None is carried at first.
LossOf = Callable[[Any, Any, Any], tuple[Tensor, Any]]
BatchAt = Callable[[int], Any]


@dataclass(frozen=True)
class Settings:
    """How to train; the same for every contender.

    Attributes:
        steps: optimiser steps of each contender.
        lr: Adam's learning rate at its peak: it rises over the first steps and falls along a cosine to 5 %.
        clip_norm: scale the gradients down to this joint 2-norm; 0 leaves them.
        clip_value: clamp each gradient's elements to this size instead; 0 leaves them.
        seed: with the step number it seeds torch before every step, so that contenders draw the same dropout masks as far
            as they ask for them in the same order.
        time_limit: seconds after which no further block begins; 0 means none.
        block: steps of one contender before the next has its turn.
    """

    steps: int
    lr: float
    clip_norm: float = 0.0
    clip_value: float = 0.0
    seed: int = 0
    time_limit: float = 0.0
    block: int = 25

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        warm_up = min(1.0, (step + 1) / min(30, self.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * warm_up * (0.05 + 0.95 * cosine)

    def clip(self, parameters: Sequence[nn.Parameter]) -> None:
        """Clip the gradients in place."""
        if self.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        if self.clip_value:
            nn.utils.clip_grad_value_(parameters, self.clip_value)


class Outcome(enum.Enum):
    """How a race ended."""

    FINISHED = "finished"
    TIME_LIMIT = "time limit"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"


class Contender:
    """One implementation's copy of the model, with its optimiser, its losses and its clock.

    Attributes:
        name: whose layers it runs.
        losses: training loss of every finished step.
        seconds: wall time of every finished step, forward to optimiser, without fetching the batch.
        rnn_seconds: of that, spent in the recurrent layers, forward and backward.
    """

    def __init__(self, name: str, model: nn.Module, loss_of: LossOf, settings: Settings) -> None:
        self.name = name
        self.model = model
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.rnn_seconds: list[float] = []
        self._clock = RecurrentClock(model)
        self._loss_of = loss_of
        self._settings = settings
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=settings.lr)
        self._carry: Any = None

    def warm_up(self, batch: Any) -> None:
        """Take one step with a throwaway copy: compilers, allocators and thread pools get ready off the clock."""
        Contender(self.name, copy.deepcopy(self.model), self._loss_of, self._settings).step(batch)

    def step(self, batch: Any) -> float:
        """Take one optimiser step and return its loss."""
        number = len(self.losses)
        torch.manual_seed(self._settings.seed + number)
        start = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr_at(number)
        self._optimizer.zero_grad()
        with self._clock:
            loss, carry = self._loss_of(self.model, batch, self._carry)
            loss.backward()
        self._settings.clip(self._parameters)
        self._optimizer.step()
        value = loss.item()
        elapsed = time.perf_counter() - start
        # Recorded together and last: an interrupt leaves the losses and times of whole steps only.
        self._carry = carry
        self.losses.append(value)
        self.seconds.append(elapsed)
        self.rnn_seconds.append(self._clock.seconds)
        return value


def race(
    contenders: Sequence[Contender],
    batch_at: BatchAt,
    settings: Settings,
    title: str = "training",
    *,
    show: bool = True,
    agree: Callable[[bool], bool] = bool,
) -> Outcome:
    """Train the contenders in alternating blocks of steps, so that a slow spell of the machine hits all of them.

    Every contender gets the same batches in the same order. Who begins changes from block to block. A progress bar with the
    losses and the time left goes to standard error, under ``title``; unless ``show`` is false. Ctrl-C ends the race, it does
    not raise. Processes that race together ``agree`` on whether the time is up.
    """
    begin = time.perf_counter()
    total = settings.steps * len(contenders)
    bar = tqdm(total=total, unit="step", desc=title, mininterval=0.2, dynamic_ncols=True, disable=not show)
    try:
        with bar:
            for contender in contenders:
                contender.warm_up(batch_at(0))
            for first in range(0, settings.steps, settings.block):
                if settings.time_limit and agree(time.perf_counter() - begin > settings.time_limit):
                    return Outcome.TIME_LIMIT
                turns = contenders if first // settings.block % 2 == 0 else contenders[::-1]
                for contender in turns:
                    # Threads of the last one's pool may still be spinning for the next piece of work.
                    time.sleep(0.03)
                    for number in range(first, min(first + settings.block, settings.steps)):
                        if not math.isfinite(contender.step(batch_at(number))):
                            return Outcome.DIVERGED
                        bar.set_postfix_str(_losses(contenders), refresh=False)
                        bar.update()
    except KeyboardInterrupt:
        return Outcome.INTERRUPTED
    return Outcome.FINISHED


def _losses(contenders: Sequence[Contender]) -> str:
    return ", ".join(f"{contender.name} {contender.losses[-1]:.3f}" for contender in contenders if contender.losses)


def apart(contenders: Sequence[Contender], steps: int | None = None) -> float:
    """The largest difference between the contenders' losses at one of the first ``steps``, or of all that all of them took."""
    common = zip(*(contender.losses[:steps] for contender in contenders), strict=False)
    return max((max(losses) - min(losses) for losses in common), default=0.0)


def speed_up(base: Contender, other: Contender) -> float | None:
    """How many times faster the median step of ``other`` is, or None before both have taken one.

    The median, because a neighbour on the machine can hold up a single step for as long as a hundred others take.
    """
    return _ratio(base, other, statistics.median)


def total_speed_up(base: Contender, other: Contender) -> float | None:
    """How many times less time ``other`` took for a step, all steps counted, or None before both have taken one."""
    return _ratio(base, other, statistics.fmean)


def disturbed(base: Contender, other: Contender) -> bool:
    """Whether the two ratios are more than a tenth apart: something else on the machine took part in the race."""
    median, total = speed_up(base, other), total_speed_up(base, other)
    return median is not None and total is not None and not 1 / 1.1 < median / total < 1.1


def _ratio(base: Contender, other: Contender, average: Callable[[list[float]], float]) -> float | None:
    return average(base.seconds) / average(other.seconds) if base.seconds and other.seconds else None
