"""Train a character-level language model with torch.nn and with fused_rnn, and compare.

    python -m benchmarks.training.language_model [--help]
    torchrun --nproc_per_node 2 -m benchmarks.training.language_model  # data-parallel: --batch is split over the processes

Exit codes: 0 done; 1 a training's loss was not finite; 2 a wrong option or text, said in one line; 130 stopped by Ctrl-C,
after printing the table so far and writing it beside the files of an earlier run.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.json_file import write_rows
from benchmarks.training import job
from benchmarks.training.command import training_settings
from benchmarks.training.markov import Trigram
from benchmarks.training.model import CharacterModel, evaluate, generate, likelihood, segment_loss
from benchmarks.training.options import Parser, parse
from benchmarks.training.parallel import Processes, processes
from benchmarks.training.plots import plot_race
from benchmarks.training.report import Measure, Row, contender_row, environment, json_rows, print_table
from benchmarks.training.text import Streams, Vocabulary, from_file, standard_library
from benchmarks.training.trainer import Contender, Outcome, race

_MEASURES = (
    Measure("held_out_loss", "held-out loss"),
    Measure("perplexity", "held-out perplexity", ".3f"),
    Measure("sampling_rate", "characters per second, sampling", ",.0f"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return the exit code; wrong options and texts leave through SystemExit(2)."""
    parser, options = parse(arguments)
    with processes() as group:
        return job.guarded(parser, lambda: _run(parser, options, group))


def _run(parser: Parser, options: argparse.Namespace, group: Processes) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    text = standard_library() if options.text is None else from_file(options.text)
    vocabulary = Vocabulary(text.training)
    training_symbols, held_out_symbols = vocabulary.encode(text.training), vocabulary.encode(text.held_out)
    training = Streams(training_symbols, options.batch, options.bptt)
    # A short held-out part is read in fewer streams, so that most of it is predicted with a full context.
    held_out_batch = max(1, min(options.batch, (len(held_out_symbols) - 1) // options.bptt))
    held_out = Streams(held_out_symbols, held_out_batch, options.bptt, ragged=True)

    _check_memory(parser, options, len(vocabulary), group)
    try:
        segment_at = group.share(training.segment, options.batch)
    except ValueError as error:
        parser.error(f"argument --batch: {error}")
    settings = group.settings(training_settings(options))
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
    fused, backend = job.fused_copy(parser, model)
    base = Contender("torch.nn", group.wrap(model), group.mean(segment_loss), settings)
    ours = Contender("fused_rnn", group.wrap(fused), group.mean(segment_loss), settings)

    threads = f"{group.size} processes × " * (group.size > 1) + f"{torch.get_num_threads()} threads"
    facts = (
        f"text: {text.name}; {len(training_symbols):,} characters to train on, {held_out.characters:,} held out, "
        f"{len(vocabulary)} symbols\n"
        f"model: embedding {options.embedding} → {options.layers} × {options.cell} {options.hidden} → linear, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"training: {options.steps:,} steps of {options.batch} × {options.bptt} characters, {threads}, "
        f"fused_rnn on {backend}"
    )
    if group.first:
        print(facts)
    outcome = race([base, ours], segment_at, settings, show=group.first, agree=group.agree)
    if not group.first:
        # The first one's exit code speaks for all: torchrun would end it in the middle of its report for another's failure.
        return 0

    size = training.segment(0)[0].numel()
    rows = [contender_row(base, base, size), contender_row(ours, base, size), Row("trigram")]
    continued = ""
    if outcome in (Outcome.FINISHED, Outcome.TIME_LIMIT):
        try:
            continued = _judge(options, vocabulary, held_out, [model, fused], rows)
            # The trigram predicts the same characters from the same text as the two models do.
            predicted = held_out_symbols[: held_out.characters + 1]
            trigram = Trigram(training_symbols, len(vocabulary))
            rows[2].measures |= likelihood(-trigram.log_probability(predicted).mean().item())
        except KeyboardInterrupt:
            outcome = Outcome.INTERRUPTED
    try:
        _report(options, outcome, [base, ours], rows, continued, backend, group)
    except OSError as error:
        parser.error(f"cannot write the results to {options.out}: {error.strerror or error}")
    return job.CODES[outcome]


def _check_memory(parser: Parser, options: argparse.Namespace, symbols: int, group: Processes) -> None:
    """Refuse a model that cannot fit: the system would rather kill the process than say no."""
    gates = {"lstm": 4, "gru": 3}.get(options.cell, 1)
    weights = 0
    for layer in range(options.layers):
        weights += gates * options.hidden * (options.hidden + (options.hidden if layer else options.embedding))
    weights += symbols * (options.embedding + options.hidden)
    # One segment, kept for its backward: per layer the gates and the output, and at the end logits and their gradient.
    rows = options.batch * options.bptt
    kept = rows * (options.layers * (gates + 2) * options.hidden + options.embedding + 2 * symbols)
    job.check_memory(parser, weights * group.here, kept, "--hidden, --layers, --embedding, --batch or --bptt")


def _judge(
    options: argparse.Namespace,
    vocabulary: Vocabulary,
    held_out: Streams,
    models: Sequence[CharacterModel],
    rows: Sequence[Row],
) -> str:
    """Fill in what is measured after the training; return the text that fused_rnn's model wrote."""
    for model, row in zip(models, rows, strict=False):
        row.measures |= likelihood(evaluate(model, held_out))
    written = ""
    if options.sample_length:
        style = {"temperature": options.temperature, "top_k": options.top_k, "seed": options.seed}
        for model, row in zip(models, rows, strict=False):
            generate(model, vocabulary, options.prompt, min(20, options.sample_length), **style)
            start = time.perf_counter()
            written = generate(model, vocabulary, options.prompt, options.sample_length, **style)
            row.measures["sampling_rate"] = options.sample_length / (time.perf_counter() - start)
    return written


def _report(
    options: argparse.Namespace,
    outcome: Outcome,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    written: str,
    backend: str,
    group: Processes,
) -> None:
    """Print the table and the sample, write JSON and PNG."""
    base, ours = contenders
    layers = f"{options.layers}-layer {options.cell}, hidden {options.hidden}, batch {options.batch}, bptt {options.bptt}"
    print()
    title = f"Character-level language model: {layers}"
    print_table(rows, title, _MEASURES)
    job.print_remarks(outcome, contenders)
    if written:
        style = f"temperature {options.temperature:g}, top-k {options.top_k or 'all'}"
        print(f"\nsample ({style}), after {options.prompt!r}:\n{options.prompt}{written}\n")

    facts = {
        "job": "language_model",
        "title": title,
        "outcome": outcome.value,
        "settings": job.settings_of(options),
        "backend": backend,
        "processes": group.size,
        "sample": written,
        **environment(),
    }
    files = job.Outputs(options.out)
    write_rows(files.path("language_model.json"), json_rows(rows, _MEASURES, facts))
    if base.losses and ours.losses:
        levels = {
            f"held-out, {row.provider}: {loss:.2f}": loss
            for row in rows[1:]
            if math.isfinite(loss := row.measures.get("held_out_loss", math.nan))
        }
        picture = files.path("language_model.png")
        plot_race(picture, f"{layers}: {ours.name} against {base.name}", base, ours, levels)
    if outcome is not Outcome.INTERRUPTED:
        files.complete()
    print(f"wrote {files}")


if __name__ == "__main__":
    sys.exit(main())
