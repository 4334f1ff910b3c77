"""The command line of the language model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.training.command import EXIT_CODES, Parser, add_model, add_training, number, parse_job, size


def parser() -> Parser:
    """Build the command line."""
    made = Parser(
        prog="language_model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a character-level language model twice, with torch.nn and with fused_rnn: same initial weights, "
        "same batches in the same order. Compare speed and quality, beside a character trigram.",
        epilog=EXIT_CODES.format(more=""),
        allow_abbrev=False,
    )
    text = made.add_argument_group("text")
    text.add_argument("--text", type=Path, help="a UTF-8 file; without it, source of this Python's standard library")
    text.add_argument("--batch", type=size, default=32, help="streams read side by side")
    text.add_argument("--bptt", type=size, default=64, help="characters a segment: how far gradients reach back")
    model = add_model(made, cell="lstm", hidden=256, layers=2, embedding=64)
    model.add_argument("--tie-weights", action="store_true", help="the embedding is the last layer's matrix, too")
    model.add_argument(
        "--dropout",
        type=number(float, 0, 0.99),
        default=0.0,
        help="before, between and after the layers; above 0 the two curves differ where the masks do",
    )
    add_training(made, steps=1000, lr=5e-3, time_limit=180.0)
    sample = made.add_argument_group("sample")
    sample.add_argument("--prompt", default="def ", help="what the generated text starts with")
    sample.add_argument("--sample-length", type=number(int, 0, 10**6), default=500, help="characters to generate")
    sample.add_argument("--temperature", type=number(float, 0, 1e3, above=True), default=0.7, help="of the softmax")
    sample.add_argument("--top-k", type=number(int, 0, 10**9), default=20, help="draw from the k likeliest; 0: from all")
    return made


def parse(arguments: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    """Parse and check the command line; leaves with exit code 2 and one line if something is wrong."""
    made = parser()
    options = parse_job(made, "language_model", sys.argv[1:] if arguments is None else arguments)
    if options.tie_weights and options.embedding != options.hidden:
        made.error(f"argument --tie-weights: needs --embedding equal to --hidden, got {options.embedding} and {options.hidden}")
    if not options.prompt:
        made.error("argument --prompt: expected at least one character, got ''")
    return made, options
