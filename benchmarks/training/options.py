"""The command line of the language model: its options, and one line for every wrong one."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.training.model import CELLS


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the message as one line to standard error and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(kind: type[int] | type[float], low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Make a type for argparse: a finite number from ``low`` (or, with ``above``, from just above it) to ``high``."""
    allowed = f"{'a whole' if kind is int else 'a'} number {'above' if above else 'from'} {low:g} to {high:g}"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"expected {allowed}, got {text!r}")
        return value

    return convert


def parser() -> Parser:
    """Build the command line."""
    made = Parser(
        prog="language_model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a character-level language model twice, with torch.nn and with fused_rnn: same initial weights, "
        "same batches in the same order. Compare speed and quality, beside a character trigram.",
        epilog="Exit codes: 0 done, 1 a loss was not finite, 2 a wrong option or text, 130 stopped by Ctrl-C "
        "(the table so far is printed, and JSON and PNG are written).",
        allow_abbrev=False,
    )
    size = number(int, 1, 1 << 20)
    text = made.add_argument_group("text")
    text.add_argument("--text", type=Path, help="a UTF-8 file; without it, source of this Python's standard library")
    text.add_argument("--batch", type=size, default=32, help="streams read side by side")
    text.add_argument("--bptt", type=size, default=64, help="characters a segment: how far gradients reach back")
    model = made.add_argument_group("model")
    model.add_argument("--cell", choices=CELLS, default="lstm", help="recurrent layer")
    model.add_argument("--hidden", type=size, default=256, help="units a layer")
    model.add_argument("--layers", type=number(int, 1, 64), default=2, help="recurrent layers")
    model.add_argument("--embedding", type=size, default=64, help="size of the embedding")
    model.add_argument("--tie-weights", action="store_true", help="the embedding is the last layer's matrix, too")
    model.add_argument(
        "--dropout",
        type=number(float, 0, 0.99),
        default=0.0,
        help="before, between and after the layers; above 0 the two curves differ where the masks do",
    )
    train = made.add_argument_group("training")
    train.add_argument("--steps", type=number(int, 1, 10**9), default=1000, help="optimiser steps of each training")
    train.add_argument("--lr", type=number(float, 0, 1e3, above=True), default=5e-3, help="Adam's peak learning rate")
    train.add_argument("--clip-norm", type=number(float, 0, 1e9), default=1.0, help="clip the gradients' norm; 0: do not")
    train.add_argument("--clip-value", type=number(float, 0, 1e9, above=True), help="clip by value instead of by norm")
    train.add_argument("--seed", type=number(int, 0, 2**62), default=0, help="of weights, dropout and the sample")
    train.add_argument("--threads", type=number(int, 1, 256), help="CPU threads; without it, torch's own choice")
    train.add_argument(
        "--time-limit",
        type=number(float, 0, 1e9),
        default=180.0,
        help="seconds of training, both together, after which no further block of steps begins; 0: none",
    )
    sample = made.add_argument_group("sample")
    sample.add_argument("--prompt", default="def ", help="what the generated text starts with")
    sample.add_argument("--sample-length", type=number(int, 0, 10**6), default=500, help="characters to generate")
    sample.add_argument("--temperature", type=number(float, 0, 1e3, above=True), default=0.7, help="of the softmax")
    sample.add_argument("--top-k", type=number(int, 0, 10**9), default=20, help="draw from the k likeliest; 0: from all")
    default_out = Path(__file__).resolve().parent.parent / "out"
    made.add_argument("--out", type=Path, default=default_out, help="folder for language_model.json and .png")
    return made


def parse(arguments: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    """Parse and check the command line; leaves with exit code 2 and one line if something is wrong."""
    made = parser()
    options = made.parse_args(arguments)
    if options.tie_weights and options.embedding != options.hidden:
        made.error(f"argument --tie-weights: needs --embedding equal to --hidden, got {options.embedding} and {options.hidden}")
    if not options.prompt:
        made.error("argument --prompt: expected at least one character, got ''")
    if options.clip_value is not None:
        options.clip_norm = 0.0
    # Found out now, not after the training.
    probe = options.out / ".language_model"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        made.error(f"argument --out: cannot write to {options.out}: {error.strerror or error}")
    return made, options
