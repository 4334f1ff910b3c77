"""A deep stack on the language model's text, with and without connections: its loss, and the gradient that reaches each layer.

    python -m benchmarks.training.deep [--help]

The stack without connections is trained twice, with torch.nn and with fused_rnn; those with connections (residual, highway,
dense), which torch.nn has not, with fused_rnn. All have the same text, the same batches in the same order, and the same initial
weights where they have the same weights. At every step the norm of the gradient of each layer's weights is taken, before
clipping.

Exit codes: 0 done; 1 a loss was not finite, or the two trainings without connections differ at their start; 2 a wrong option
or text, said in one line; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import fused_rnn
from benchmarks.json_file import write_rows
from benchmarks.training import job
from benchmarks.training.command import Parser, add_model, add_training, job_parser, number, size, training_settings
from benchmarks.training.deep_plots import plot_deep
from benchmarks.training.layer_norms import LayerNorms
from benchmarks.training.model import CharacterModel, State, evaluate, likelihood, segment_loss
from benchmarks.training.report import LAST_STEPS, Measure, Row, contender_row, environment, json_rows, print_table, print_wide
from benchmarks.training.text import Streams, Vocabulary, from_file, standard_library
from benchmarks.training.trainer import Contender, Outcome, Settings, apart, race

KINDS = ("residual", "highway", "dense")

_MEASURES = (Measure("held_out_loss", "held-out loss"), Measure("perplexity", "held-out perplexity", ".3f"))
# How far apart the first losses and the first gradients of the two implementations may be, relative to one of them: what
# float32 rounds is a thousandth of that.
_SAME = 1e-3
_QUICK: dict[str, Any] = {
    "hidden": 24,
    "embedding": 16,
    "batch": 16,
    "bptt": 32,
    "steps": 50,
    "held_out": 20_000,
    "time_limit": 10.0,
}


class Stack:
    """One training: its contender, and the norms of its gradients.

    Args:
        name: torch.nn, fused_rnn, or the kind of the connections.
        model: the whole model; the stack is its ``rnn``.
    """

    def __init__(self, name: str, model: CharacterModel, settings: Settings) -> None:
        self.norms = LayerNorms(model.rnn)
        self.contender = Contender(name, model, self._loss, settings)

    def _loss(self, model: CharacterModel, batch: tuple[Tensor, Tensor, bool], state: State) -> tuple[Tensor, State]:
        self.norms.begin()
        return segment_loss(model, batch, state)


def _parser() -> Parser:
    made = job_parser(
        "deep",
        "Train a deep character-level language model without connections between its layers, with torch.nn and with fused_rnn, "
        "and with residual, highway and dense connections, with fused_rnn. Compare losses, and the norm of the gradient that "
        "reaches each layer.",
    )
    text = made.add_argument_group("text")
    text.add_argument("--text", type=Path, help="a UTF-8 file; without it, source of this Python's standard library")
    text.add_argument("--batch", type=size, default=16, help="streams read side by side")
    text.add_argument("--bptt", type=size, default=48, help="characters a segment: how far gradients reach back")
    text.add_argument(
        "--held-out",
        type=number(int, 0, 1 << 40),
        default=0,
        metavar="N",
        help="judge on so many held-out characters; 0: on all",
    )
    model = add_model(made, cell="lstm", hidden=128, layers=8, embedding=64)
    model.add_argument("--connections", choices=KINDS, nargs="+", default=list(KINDS), help="besides none")
    add_training(made, steps=500, lr=4e-3, time_limit=280.0)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return the exit code; what cannot be done leaves through SystemExit(2)."""
    return job.start("deep", _parser(), arguments, _QUICK, _run)


def _run(parser: Parser, options: argparse.Namespace) -> int:
    if options.layers < 2:
        parser.error(f"argument --layers: expected 2 or more, which can be connected, got {options.layers}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    text = standard_library() if options.text is None else from_file(options.text)
    vocabulary = Vocabulary(text.training)
    training = Streams(vocabulary.encode(text.training), options.batch, options.bptt)
    held_out_symbols = vocabulary.encode(text.held_out[: options.held_out or None])
    held_out_batch = max(1, min(options.batch, (len(held_out_symbols) - 1) // options.bptt))
    held_out = Streams(held_out_symbols, held_out_batch, options.bptt, ragged=True)

    kinds = list(dict.fromkeys(options.connections))
    _check_memory(parser, options, len(vocabulary), kinds)
    settings = training_settings(options)
    torch.manual_seed(options.seed)
    model = CharacterModel(
        options.cell, len(vocabulary), options.embedding, options.hidden, options.layers, 0.0, tie_weights=False
    )
    fused, backend = job.fused_copy(parser, model)
    stacks = [Stack("torch.nn", model, settings), Stack("fused_rnn", fused, settings)]
    stacks += [Stack(kind, _connected(fused, kind), settings) for kind in kinds]
    contenders = [stack.contender for stack in stacks]
    title = f"Deep language model: {options.layers}-layer {options.cell}, hidden {options.hidden}, batch {options.batch}, "
    title += f"bptt {options.bptt}"
    print(
        f"{title}\ntext: {text.name}; {training.characters:,} characters to train on, {held_out.characters:,} held out, "
        f"{len(vocabulary)} symbols\n"
        f"training: {options.steps:,} steps each, {torch.get_num_threads()} threads, fused_rnn on {backend}",
        flush=True,
    )
    facts = {"backend": backend, "symbols": len(vocabulary), "load_at_start": os.getloadavg()[0]}
    outcome = race(contenders, training.segment, settings)
    facts["load_at_end"] = os.getloadavg()[0]
    rows = [contender_row(contender, contenders[0], options.batch * options.bptt) for contender in contenders]
    if outcome in (Outcome.FINISHED, Outcome.TIME_LIMIT):
        try:
            for stack, row in zip(stacks, rows, strict=True):
                row.measures |= likelihood(evaluate(stack.contender.model, held_out))
        except KeyboardInterrupt:
            outcome = Outcome.INTERRUPTED
    for row in rows[2:]:
        # torch.nn has no such stack to compare the time with.
        row.speed_up = row.total_speed_up = None
    try:
        agree = _report(options, outcome, title, stacks, rows, facts)
    except OSError as error:
        parser.error(f"cannot write the results to {options.out}: {error.strerror or error}")
    return job.CODES[outcome] or int(not agree)


def _connected(fused: CharacterModel, kind: str) -> CharacterModel:
    """The model with connections in its stack; the weights that the plain stack has too are the plain stack's."""
    made = copy.deepcopy(fused)
    plain: Any = fused.rnn
    options: dict[str, Any] = {"nonlinearity": plain.nonlinearity} if isinstance(plain, fused_rnn.RNN) else {}
    stack = type(plain)(plain.input_size, plain.hidden_size, plain.num_layers, connections=kind, **options)
    own = stack.state_dict()
    own |= {name: value for name, value in plain.state_dict().items() if value.shape == own[name].shape}
    stack.load_state_dict(own)
    made.rnn = stack
    return made


def _check_memory(parser: Parser, options: argparse.Namespace, symbols: int, kinds: Sequence[str]) -> None:
    """Refuse models that cannot fit."""
    gates = {"lstm": 4, "gru": 3}.get(options.cell, 1)
    hidden, layers = options.hidden, options.layers
    weights = symbols * (options.embedding + hidden) + gates * hidden * (options.embedding + (2 * layers - 1) * hidden)
    extra = 0
    if "highway" in kinds:
        extra += layers * hidden * hidden
    if "dense" in kinds:
        extra += gates * hidden * sum(options.embedding + (layer - 1) * hidden for layer in range(1, layers))
    rows = options.batch * options.bptt
    kept = rows * (layers * (gates + 2) * hidden + options.embedding + 2 * symbols)
    if "dense" in kinds:
        kept += rows * sum(options.embedding + layer * hidden for layer in range(layers))
    # It is asked of two models.
    total = (2 + len(kinds)) * weights + extra
    job.check_memory(parser, -(-total // 2), kept, "--hidden, --layers, --embedding, --batch or --bptt")


def _report(
    options: argparse.Namespace,
    outcome: Outcome,
    title: str,
    stacks: Sequence[Stack],
    rows: Sequence[Row],
    facts: dict[str, Any],
) -> bool:
    """Print the tables, write JSON and PNG; whether the two implementations agree."""
    contenders = [stack.contender for stack in stacks]
    for stack in stacks:
        # An interrupted step's.
        del stack.norms.steps[len(stack.contender.losses) :]
    print()
    print_table(rows, title, _MEASURES)
    _print_norms(stacks)
    job.print_remarks(outcome, contenders)
    agree = _agree(stacks)
    facts |= {"job": "deep", "outcome": outcome.value, "settings": job.settings_of(options), **environment()}
    written = json_rows(rows, _MEASURES, facts)
    for stack, row in zip(stacks, written, strict=True):
        kind = row["provider"] if row["provider"] in KINDS else ""
        row["provider"] = "fused_rnn" if kind else row["provider"]
        row |= {
            "task": kind,
            "title": f"{title}{f', {kind}' if kind else ''}",
            "parameters": sum(parameter.numel() for parameter in stack.contender.model.parameters()),
            "first_gradients": stack.norms.mean(0, job.EARLY),
            "last_gradients": stack.norms.mean(-LAST_STEPS, None),
        }
    files = job.Outputs(options.out)
    write_rows(files.path("deep.json"), written)
    if all(contender.losses for contender in contenders):
        plot_deep(
            files.path("deep.png"), title, [(stack.contender.name, stack.contender.losses, stack.norms) for stack in stacks]
        )
    if outcome is not Outcome.INTERRUPTED:
        files.complete()
    print(f"wrote {files}")
    return agree


def _print_norms(stacks: Sequence[Stack]) -> None:
    """Print what reaches each layer at the start of the training and at its end."""
    for words, first, last in (("first", 0, job.EARLY), ("last", -LAST_STEPS, None)):
        steps = min(abs(last or first), min(len(stack.contender.losses) for stack in stacks))
        if not steps:
            continue
        table = Table(title=f"gradient norms of each layer's weights, {words} {steps} steps")
        table.add_column("layer", justify="right")
        for stack in stacks:
            table.add_column(stack.contender.name, justify="right")
        for layer, norms in enumerate(zip(*(stack.norms.mean(first, last) for stack in stacks), strict=True)):
            table.add_row(f"{layer}", *(f"{norm:.1e}" for norm in norms))
        print_wide(table)


def _agree(stacks: Sequence[Stack]) -> bool:
    """Whether torch.nn and fused_rnn have the same first losses, and the same gradient in each layer at the first step."""
    base, ours = stacks[:2]
    losses, theirs = base.contender.losses, ours.contender.losses
    if not losses or not theirs:
        return True
    early = apart((base.contender, ours.contender), job.EARLY)
    gaps = [
        abs(a - b) / max(a, b, sys.float_info.min) for a, b in zip(base.norms.mean(0, 1), ours.norms.mean(0, 1), strict=True)
    ]
    print(f"largest difference between torch.nn's and fused_rnn's gradient norms of a layer at the first step: {max(gaps):.1e}")
    # Not "early > …": what is no number agrees with nothing. A loss that is not finite has been reported as such.
    agree = early <= _SAME * max(1.0, abs(losses[0])) and max(gaps) <= _SAME
    if not agree and math.isfinite(losses[-1] + theirs[-1]):
        print(f"the two trainings without connections DISAGREE from the start: their first losses are {early:.1e} apart")
    return agree or not math.isfinite(losses[-1] + theirs[-1])


if __name__ == "__main__":
    sys.exit(main())
