"""What every training job does around its data, its model and its measures of quality."""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import fused_rnn
import fused_rnn.kernels.dispatch
from benchmarks.training.command import Parser, parse_job
from benchmarks.training.text import TextError
from benchmarks.training.trainer import Contender, Outcome, apart, disturbed

CODES = {Outcome.FINISHED: 0, Outcome.TIME_LIMIT: 0, Outcome.DIVERGED: 1, Outcome.INTERRUPTED: 130}

# Steps at the start of a training, before roundings have grown.
EARLY = 10

Model = TypeVar("Model", bound=nn.Module)


def guarded(parser: Parser, run: Callable[[], int]) -> int:
    """Run a job and return its exit code; an unusable input leaves through SystemExit(2), with one line."""
    try:
        return run()
    except TextError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        # Before the training or after it; during it the race ends by itself.
        print("interrupted", file=sys.stderr)
        return CODES[Outcome.INTERRUPTED]


def start(
    name: str,
    parser: Parser,
    arguments: Sequence[str] | None,
    quick: Mapping[str, Any],
    run: Callable[[Parser, argparse.Namespace], int],
) -> int:
    """Parse the command line, run a job and return its exit code; wrong options and inputs leave through SystemExit(2)."""
    options = parse_job(parser, name, sys.argv[1:] if arguments is None else arguments, quick)
    return guarded(parser, lambda: run(parser, options))


def fused_copy(parser: Parser, model: Model) -> tuple[Model, str]:
    """Copy the model with its recurrent layers replaced; also say which backend runs them. The copy's weights are its own."""
    fused = fused_rnn.convert(copy.deepcopy(model))
    layers = [module for module in fused.modules() if isinstance(module, nn.RNNBase)]
    for layer in layers:
        if not type(layer).__module__.startswith("fused_rnn"):
            raise RuntimeError(f"fused_rnn.convert left {type(layer).__name__} as it was: there is nothing to compare")
    try:
        # A backend that was asked for and cannot run says so here, before the training.
        name = fused_rnn.kernels.dispatch.choose(torch.device("cpu")).name
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    return fused, f"{name} ({fused_rnn.backends()[name].detail})"


def check_memory(parser: Parser, weights: int, kept: int, remedy: str) -> None:
    """Refuse a model that cannot fit: the system would rather kill the process than say no.

    Args:
        parser: says so.
        weights: numbers in one model.
        kept: numbers that one model keeps of a training step for its backward.
        remedy: the options to lower.
    """
    # Two models of float32; each has weights, gradients and Adam's two moments. One at a time has a step.
    needed = 4 * (2 * 4 * weights + kept)
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        parser.error(f"this model needs {needed / 2**30:,.0f} GiB and the machine has {there / 2**30:,.0f}; lower {remedy}")


def print_remarks(outcome: Outcome, contenders: Sequence[Contender]) -> None:
    """Say how the training ended and how far its figures can be trusted.

    Args:
        contenders: first the two that compute the same, then others.
    """
    base, ours = same = contenders[:2]
    if outcome is Outcome.DIVERGED:
        worse = next(c for c in contenders if c.losses and not math.isfinite(c.losses[-1]))
        print(f"stopped: the loss of {worse.name} is not finite at step {len(worse.losses)}; lower --lr or --clip-norm")
    elif outcome is not Outcome.FINISHED:
        print(f"stopped by {'Ctrl-C' if outcome is Outcome.INTERRUPTED else '--time-limit'}, the figures are those so far")
    if disturbed(base, ours):
        print("other work on this machine held up single steps: trust the median step, not the total time")
    common = min(len(base.losses), len(ours.losses))
    if common:
        # Roundings grow from step to step, and in a training of many steps they may part the two for good. What the two compute
        # alike shows in the first steps.
        early = min(common, EARLY)
        first = f"{apart(same, early):.1e} over the first {early}, " if early < common else ""
        print(f"largest difference between the two training losses: {first}{apart(same):.1e} over all {common:,} steps")


class Outputs:
    """The files of one run. They have names of their own until it is whole, so that a run that was stopped replaces nothing.

    Args:
        folder: where they go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: list[str] = []
        self._whole = False

    def path(self, name: str) -> Path:
        """Where to write the file ``name`` now."""
        if name not in self._names:
            self._names.append(name)
        return self._path(name)

    def complete(self) -> None:
        """The run is whole: give the files their names."""
        for name in self._names:
            self._path(name).replace(self._folder / name)
        self._whole = True

    def __str__(self) -> str:
        return ", ".join(str(self._path(name)) for name in self._names)

    def _path(self, name: str) -> Path:
        path = self._folder / name
        return path if self._whole else path.with_name(f"{path.stem}.partial{path.suffix}")


def settings_of(options: argparse.Namespace) -> dict[str, object]:
    """The options as JSON can hold them. Where on a machine a file lay says nothing to others."""
    return {key: value.name if isinstance(value, Path) else value for key, value in vars(options).items() if key != "out"}
