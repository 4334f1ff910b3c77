"""Train a character-level language model with torch.nn and with fused_rnn, and compare.

    python -m benchmarks.training.language_model [--help]

Exit codes: 0 done; 1 a training's loss was not finite; 2 a wrong option or text, said in one line; 130 stopped by Ctrl-C,
after printing the table so far.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fused_rnn
import fused_rnn.cells
import fused_rnn.dispatch
from benchmarks.training.breakdown import breakdown
from benchmarks.training.markov import Trigram
from benchmarks.training.model import CharacterModel, State, cross_entropy, detach, evaluate, generate
from benchmarks.training.options import Parser, parse
from benchmarks.training.plots import plot_race
from benchmarks.training.report import Row, environment, print_table, write_json
from benchmarks.training.text import Streams, TextError, Vocabulary, from_file, standard_library
from benchmarks.training.trainer import Contender, Outcome, Settings, apart, disturbed, race, speed_up, total_speed_up

_EXIT_CODES = {Outcome.FINISHED: 0, Outcome.TIME_LIMIT: 0, Outcome.DIVERGED: 1, Outcome.INTERRUPTED: 130}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return the exit code; wrong options and texts leave through SystemExit(2)."""
    try:
        parser, options = parse(arguments)
        return _run(parser, options)
    except TextError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        # Before the training or after it; during it the race ends by itself.
        print("interrupted", file=sys.stderr)
        return _EXIT_CODES[Outcome.INTERRUPTED]


def _run(parser: Parser, options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    text = standard_library() if options.text is None else from_file(options.text)
    vocabulary = Vocabulary(text.training)
    training_symbols, held_out_symbols = vocabulary.encode(text.training), vocabulary.encode(text.held_out)
    training = Streams(training_symbols, options.batch, options.bptt)
    # A short held-out part is read in fewer streams, so that most of it is predicted with a full context.
    held_out_batch = max(1, min(options.batch, (len(held_out_symbols) - 1) // options.bptt))
    held_out = Streams(held_out_symbols, held_out_batch, options.bptt, ragged=True)

    _check_memory(parser, options, len(vocabulary))
    settings = Settings(
        steps=options.steps,
        lr=options.lr,
        clip_norm=options.clip_norm,
        clip_value=options.clip_value or 0.0,
        seed=options.seed,
        time_limit=options.time_limit,
    )
    torch.manual_seed(options.seed)
    model = CharacterModel(
        options.cell,
        len(vocabulary),
        options.embedding,
        options.hidden,
        options.layers,
        options.dropout,
        tie_weights=options.tie_weights,
    )
    base = Contender("torch.nn", model, _segment_loss, settings)
    fused, backend = _fused(parser, options.cell, model)
    ours = Contender("fused_rnn", fused, _segment_loss, settings)

    print(
        f"text: {text.name}; {len(training_symbols):,} characters to train on, {held_out.characters:,} held out, "
        f"{len(vocabulary)} symbols\n"
        f"model: embedding {options.embedding} → {options.layers} × {options.cell} {options.hidden} → linear, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"training: {options.steps:,} steps of {options.batch} × {options.bptt} characters, {torch.get_num_threads()} threads, "
        f"fused_rnn on {backend}"
    )
    outcome = race([base, ours], training.segment, settings)

    rows = [_row(base, base, training), _row(ours, base, training), Row("trigram")]
    continued = ""
    if outcome in (Outcome.FINISHED, Outcome.TIME_LIMIT):
        try:
            continued = _judge(options, settings, vocabulary, training, held_out, [base, ours], rows)
            # The trigram predicts the same characters from the same text as the two models do.
            predicted = held_out_symbols[: held_out.characters + 1]
            rows[2].held_out_loss = -Trigram(training_symbols, len(vocabulary)).log_probability(predicted).mean().item()
        except KeyboardInterrupt:
            outcome = Outcome.INTERRUPTED
    try:
        _report(options, outcome, [base, ours], rows, continued, backend)
    except OSError as error:
        parser.error(f"cannot write the results to {options.out}: {error.strerror or error}")
    return _EXIT_CODES[outcome]


def _segment_loss(model: CharacterModel, batch: tuple[Tensor, Tensor, bool], state: State) -> tuple[Tensor, State]:
    """Loss of one segment; the state goes on to the next one, without its history."""
    inputs, targets, first = batch
    logits, state = model(inputs, None if first else state)
    return cross_entropy(logits, targets), detach(state)


def _fused(parser: Parser, cell: str, model: CharacterModel) -> tuple[CharacterModel, str]:
    """Copy the model with its recurrent layers replaced; also say which backend runs them. The copy's weights are its own."""
    fused = fused_rnn.convert(copy.deepcopy(model))
    if not type(fused.rnn).__module__.startswith("fused_rnn"):
        raise RuntimeError(f"fused_rnn.convert left {type(fused.rnn).__name__} as it was: there is nothing to compare")
    try:
        # A backend that was asked for and cannot run says so here, before the training.
        name = fused_rnn.dispatch.kernels(fused_rnn.cells.CELLS[cell], torch.device("cpu")).backend
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    return fused, f"{name} ({fused_rnn.backends()[name].detail})"


def _check_memory(parser: Parser, options: argparse.Namespace, symbols: int) -> None:
    """Refuse a model that cannot fit: the system would rather kill the process than say no."""
    gates = {"lstm": 4, "gru": 3}.get(options.cell, 1)
    weights = 0
    for layer in range(options.layers):
        weights += gates * options.hidden * (options.hidden + (options.hidden if layer else options.embedding))
    weights += symbols * (options.embedding + options.hidden)
    # Two models of float32; each has weights, gradients and Adam's two moments.
    needed = 2 * 4 * 4 * weights
    # One segment, kept for its backward: per layer the gates and the output, and at the end logits and their gradient.
    rows = options.batch * options.bptt
    needed += 4 * rows * (options.layers * (gates + 2) * options.hidden + options.embedding + 2 * symbols)
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        parser.error(
            f"this model needs {needed / 2**30:,.0f} GiB and the machine has {there / 2**30:,.0f}; "
            "lower --hidden, --layers, --embedding, --batch or --bptt"
        )


def _row(contender: Contender, base: Contender, training: Streams) -> Row:
    return Row(
        contender.name,
        contender.seconds,
        contender.losses,
        training.segment(0)[0].numel(),
        speed_up(base, contender),
        total_speed_up(base, contender),
    )


def _judge(
    options: argparse.Namespace,
    settings: Settings,
    vocabulary: Vocabulary,
    training: Streams,
    held_out: Streams,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
) -> str:
    """Fill in what is measured after the training; return the text that fused_rnn's model wrote."""
    models: list[Any] = [contender.model for contender in contenders]
    for model, row in zip(models, rows, strict=False):
        row.held_out_loss = evaluate(model, held_out)
    inputs, targets, _ = training.segment(0)
    for (rnn_seconds, other_seconds), row in zip(breakdown(models, inputs, targets, settings), rows, strict=False):
        row.rnn_seconds, row.other_seconds = rnn_seconds, other_seconds
    written = ""
    if options.sample_length:
        style = {"temperature": options.temperature, "top_k": options.top_k, "seed": options.seed}
        for model, row in zip(models, rows, strict=False):
            generate(model, vocabulary, options.prompt, min(20, options.sample_length), **style)
            start = time.perf_counter()
            written = generate(model, vocabulary, options.prompt, options.sample_length, **style)
            row.sampling_rate = options.sample_length / (time.perf_counter() - start)
    return written


def _report(
    options: argparse.Namespace,
    outcome: Outcome,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    written: str,
    backend: str,
) -> None:
    """Print the table and the sample, write JSON and PNG."""
    base, ours = contenders
    layers = f"{options.layers}-layer {options.cell}, hidden {options.hidden}, batch {options.batch}, bptt {options.bptt}"
    print()
    print_table(rows, f"Character-level language model: {layers}")
    if outcome is Outcome.DIVERGED:
        worse = next(c for c in contenders if c.losses and not math.isfinite(c.losses[-1]))
        print(f"stopped: the loss of {worse.name} is not finite at step {len(worse.losses)}; lower --lr or --clip-norm")
    elif outcome is not Outcome.FINISHED:
        print(f"stopped by {'Ctrl-C' if outcome is Outcome.INTERRUPTED else '--time-limit'}, the figures are those so far")
    if disturbed(base, ours):
        print("other work on this machine held up single steps: trust the median step, not the total time")
    common = min(len(base.losses), len(ours.losses))
    if common:
        print(f"largest difference between the two training losses, over {common:,} steps: {apart(contenders):.1e}")
    if written:
        style = f"temperature {options.temperature:g}, top-k {options.top_k or 'all'}"
        print(f"\nsample ({style}), after {options.prompt!r}:\n{options.prompt}{written}\n")

    settings = {key: str(value) if key in ("text", "out") and value else value for key, value in vars(options).items()}
    facts = {
        "job": "language_model",
        "outcome": outcome.value,
        "settings": settings,
        "backend": backend,
        "sample": written,
        **environment(),
    }
    write_json(options.out / "language_model.json", rows, facts)
    files = [options.out / "language_model.json"]
    if common:
        levels = {
            f"held-out, {row.provider}: {row.held_out_loss:.2f}": row.held_out_loss
            for row in rows[1:]
            if row.held_out_loss is not None and math.isfinite(row.held_out_loss)
        }
        files.append(options.out / "language_model.png")
        plot_race(files[-1], f"{layers}: {ours.name} against {base.name}", base, ours, levels)
    print("wrote " + ", ".join(str(file) for file in files))


if __name__ == "__main__":
    sys.exit(main())
