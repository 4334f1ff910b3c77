"""The command line that the training jobs share: one line for every wrong option, and the options that all of them have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import arguments
from benchmarks.arguments import Parser
from benchmarks.training.model import CELLS
from benchmarks.training.trainer import Settings

EXIT_CODES = (
    "Exit codes: 0 done, 1 a loss was not finite{more}, 2 a wrong option or input, 130 stopped by Ctrl-C "
    "(what was measured so far is printed, and written beside earlier results as *.partial.*)."
)


def number(kind: type[int] | type[float], low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Make a type for argparse: a finite number from ``low`` (or, with ``above``, from just above it) to ``high``."""
    allowed = f"{'a whole' if kind is int else 'a'} number {'above' if above else 'from'} {low:g} to {high:g}"
    return arguments.number(kind, lambda value: low <= value <= high and not (above and value == low), allowed)


size = number(int, 1, 1 << 20)


def job_parser(name: str, description: str) -> Parser:
    """Begin the command line of a job that compares the quality of its two trainings."""
    return Parser(
        prog=name,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description=description,
        epilog=EXIT_CODES.format(more=" or the two trainings differ in quality"),
        allow_abbrev=False,
    )


def add_model(
    made: argparse.ArgumentParser,
    *,
    cell: str,
    hidden: int,
    layers: int,
    embedding: int | None = None,
    units: str = "units a layer",
) -> Any:
    """Add what says which recurrent layers a model has; returns the group. ``embedding`` is None where there is none."""
    model = made.add_argument_group("model")
    model.add_argument("--cell", choices=CELLS, default=cell, help="recurrent layer")
    model.add_argument("--hidden", type=size, default=hidden, help=units)
    model.add_argument("--layers", type=number(int, 1, 64), default=layers, help="recurrent layers")
    if embedding is not None:
        model.add_argument("--embedding", type=size, default=embedding, help="size of the embedding")
    return model


def add_training(made: argparse.ArgumentParser, *, steps: int, lr: float, time_limit: float) -> None:
    """Add what says how to train, ``Settings`` and the threads."""
    train = made.add_argument_group("training")
    train.add_argument("--steps", type=number(int, 1, 10**9), default=steps, help="optimiser steps of each training")
    train.add_argument("--lr", type=number(float, 0, 1e3, above=True), default=lr, help="Adam's peak learning rate")
    train.add_argument("--clip-norm", type=number(float, 0, 1e9), default=1.0, help="clip the gradients' norm; 0: do not")
    train.add_argument("--clip-value", type=number(float, 0, 1e9, above=True), help="clip by value instead of by norm")
    train.add_argument("--seed", type=number(int, 0, 2**62), default=0, help="of weights, batches and whatever else is drawn")
    train.add_argument("--threads", type=number(int, 1, 256), help="CPU threads; without it, torch's own choice")
    train.add_argument(
        "--time-limit",
        type=number(float, 0, 1e9),
        default=time_limit,
        help="seconds of training, both together, after which no further block of steps begins; 0: none",
    )


def add_out(made: argparse.ArgumentParser, name: str) -> None:
    """Add the folder of the results."""
    default = Path(__file__).resolve().parent.parent / "out"
    made.add_argument("--out", type=Path, default=default, help=f"folder for {name}.json and the pictures")


def parse_job(made: Parser, name: str, arguments: Sequence[str], quick: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """Add the last options, parse, and check what all jobs have; leaves with exit code 2 and one line if something is wrong.

    Args:
        made: the job's parser.
        name: of the job, and of its files.
        arguments: the command line.
        quick: other defaults, for ``--quick``; without them there is no such option.
    """
    add_out(made, name)
    if quick is not None:
        made.add_argument("--quick", action="store_true", help="small sizes and few steps: below 20 s")
        if "--quick" in arguments:
            made.set_defaults(**quick)
    options = made.parse_args(arguments)
    if options.clip_value is not None:
        options.clip_norm = 0.0
    # Found out now, not after the training.
    probe = options.out / f".{name}"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        # Missing where another process of the job was here, too.
        probe.unlink(missing_ok=True)
    except OSError as error:
        made.error(f"argument --out: cannot write to {options.out}: {error.strerror or error}")
    return options


def training_settings(options: argparse.Namespace) -> Settings:
    """Read what ``add_training`` added."""
    return Settings(
        steps=options.steps,
        lr=options.lr,
        clip_norm=options.clip_norm,
        clip_value=options.clip_value or 0.0,
        seed=options.seed,
        time_limit=options.time_limit,
    )
