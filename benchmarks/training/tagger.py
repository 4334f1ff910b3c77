"""Tag each character of Python source with the class of its token, in both reading directions, and compare.

    python -m benchmarks.training.tagger [--help]

The classes are those of Python's ``tokenize``, with keywords apart from other names, and what is between tokens called space.
Whether a word is code, a comment or part of a docstring is said by characters before it and after it, often far away.

Exit codes: 0 done; 1 a loss was not finite, or the two trainings differ in quality; 2 a wrong option or text, said in one line;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import keyword
import sys
import token
import tokenize
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training.command import Parser, add_model, add_training, job_parser, size
from benchmarks.training.job import start
from benchmarks.training.model import cross_entropy, recurrent
from benchmarks.training.report import Measure
from benchmarks.training.session import Session, Task
from benchmarks.training.text import Text, TextError, Vocabulary, from_file, standard_library

CLASSES = ("space", "newline", "name", "keyword", "number", "string", "operator", "comment")
_CLASS_OF = {
    token.NEWLINE: "newline",
    token.NL: "newline",
    token.NUMBER: "number",
    token.STRING: "string",
    token.OP: "operator",
    token.COMMENT: "comment",
    # From Python 3.12 on, an f-string is several tokens, and what is in its braces is code.
    **{getattr(token, name): "string" for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END") if hasattr(token, name)},
}


def token_classes(source: str) -> Tensor:
    """Return the class of each character, an index into ``CLASSES``, (characters,) int64.

    Raises:
        TextError: if it is no Python source.
    """
    # A row of tokenize ends at a newline only, unlike those of str.splitlines, which ends them at a form feed, too.
    starts = [0, *accumulate(map(len, io.StringIO(source)))]
    found = bytearray(len(source))
    try:
        for kind, word, (row, column), (last_row, last_column), _ in tokenize.generate_tokens(io.StringIO(source).readline):
            if kind == token.NAME:
                name = "keyword" if keyword.iskeyword(word) else "name"
            else:
                name = _CLASS_OF.get(kind, "space")
            if name != "space" and word:
                begin, end = starts[row - 1] + column, starts[last_row - 1] + last_column
                found[begin:end] = bytes([CLASSES.index(name)]) * (end - begin)
    except (tokenize.TokenError, SyntaxError) as error:
        raise TextError(f"the text is no Python source that tokenize accepts: {error.args[0]}") from error
    return torch.frombuffer(found, dtype=torch.uint8).long()


class Windows:
    """Pieces of T characters of a text, in a random order that is the same for the same seed; time first.

    Raises:
        TextError: if the text is shorter than one batch.
    """

    def __init__(self, symbols: Tensor, classes: Tensor, batch: int, length: int, seed: int | None) -> None:
        self.batch, self.length = batch, length
        count = len(symbols) // length
        if count < batch:
            raise TextError(
                f"the text is too short: one batch of {batch} × {length} takes {batch * length} characters, "
                f"{len(symbols)} are there; lower --batch or --length"
            )
        order = torch.arange(count)
        if seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        kept = count // batch * batch
        # (batches, T, B)
        self._inputs, self._classes = (
            values[: count * length].view(count, length)[order[:kept]].view(-1, batch, length).transpose(1, 2).contiguous()
            for values in (symbols, classes)
        )

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self._inputs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Return characters (T, B) and classes (T, B); beyond the last batch another epoch begins."""
        return self._inputs[number % len(self)], self._classes[number % len(self)]


class TaggerModel(nn.Module):
    """Embedding → bidirectional recurrent layers → linear, one class per character."""

    def __init__(self, cell: str, symbols: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding)
        self.rnn = recurrent(cell, embedding, hidden, layers, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, len(CLASSES))

    def forward(self, symbols: Tensor) -> Tensor:
        """Characters (T, B) → logits (T, B, classes)."""
        out, _ = self.rnn(self.embedding(symbols))
        logits: Tensor = self.linear(out)
        return logits


def rates(predicted: Tensor, classes: Tensor) -> dict[str, float]:
    """Accuracy, and the mean over the classes that occur of the share found, in which rare classes count as much as others."""
    right = (predicted == classes).double()
    counts = torch.bincount(classes, minlength=len(CLASSES))
    found = torch.bincount(classes, right, minlength=len(CLASSES))
    return {"accuracy": right.mean().item(), "recall": (found[counts > 0] / counts[counts > 0]).mean().item()}


class Tagger(Task):
    """The job's task.

    Args:
        options: of the command line.
        text: Python source.
    """

    items = "characters"
    measures = (
        Measure("held_out_loss", "held-out loss"),
        Measure("accuracy", "held-out accuracy", ".2%", agrees=0.01),
        Measure("recall", "held-out recall, mean of classes", ".2%", agrees=0.03),
    )

    def __init__(self, options: argparse.Namespace, text: Text) -> None:
        self._options = options
        cut = len(text.training)
        classes = token_classes(text.training + text.held_out)
        vocabulary = Vocabulary(text.training)
        self._symbols = len(vocabulary)
        self._training = vocabulary.encode(text.training), classes[:cut]
        self._batches = Windows(*self._training, options.batch, options.length, options.seed)
        held_out = vocabulary.encode(text.held_out), classes[cut:]
        self._held_out = Windows(
            *held_out, min(options.batch, max(1, len(held_out[0]) // options.length)), options.length, None
        )
        self.items_per_step = self.rows_per_step = options.batch * options.length
        self.title = f"Tagger, bidirectional {options.layers}-layer {options.cell}, hidden {options.hidden}"
        self.data = (
            f"text: {text.name}; {cut:,} characters to train on, {len(held_out[0]):,} held out, "
            f"{self._symbols} symbols, {len(CLASSES)} classes"
        )

    def model(self) -> TaggerModel:
        """Make the model."""
        options = self._options
        return TaggerModel(options.cell, self._symbols, options.embedding, options.hidden, options.layers)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Characters and classes, (T, B) each."""
        return self._batches[number]

    def loss(self, model: TaggerModel, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy per character."""
        return cross_entropy(model(batch[0]), batch[1])

    def quality(self, model: TaggerModel) -> dict[str, float]:
        """Judge the held-out text."""
        loss, predicted = 0.0, []
        for inputs, classes in self._all_held_out():
            logits = model(inputs)
            loss += cross_entropy(logits, classes).item() / len(self._held_out)
            predicted.append(logits.argmax(-1).flatten())
        return {"held_out_loss": loss, **rates(torch.cat(predicted), self._held_out_classes())}

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """The commonest class of all, and the commonest class of each character, as counted in the training text."""
        symbols, classes = self._training
        counts = torch.bincount(symbols * len(CLASSES) + classes, minlength=self._symbols * len(CLASSES))
        counts = counts.view(self._symbols, len(CLASSES))
        commonest = counts.sum(0).argmax()
        # A character of the held-out text that the training text lacks has no count at all.
        table = torch.where(counts.sum(1) > 0, counts.argmax(1), commonest)
        wanted = self._held_out_classes()
        read = torch.cat([inputs.flatten() for inputs, _ in self._all_held_out()])
        return {
            f"always {CLASSES[int(commonest)]}": rates(commonest.expand_as(wanted), wanted),
            "by character": rates(table[read], wanted),
        }

    def _all_held_out(self) -> list[tuple[Tensor, Tensor]]:
        return [self._held_out[number] for number in range(len(self._held_out))]

    def _held_out_classes(self) -> Tensor:
        return torch.cat([classes.flatten() for _, classes in self._all_held_out()])


_QUICK: dict[str, Any] = {"hidden": 64, "batch": 16, "length": 64, "steps": 100, "time_limit": 12.0}


def _parser() -> Parser:
    made = job_parser(
        "tagger",
        "Train a bidirectional tagger of Python source twice, with torch.nn and with fused_rnn: same initial weights, same "
        "batches in the same order. Compare speed and accuracy, beside the commonest class of each character.",
    )
    text = made.add_argument_group("text")
    text.add_argument("--text", type=Path, help="a file of Python source; without it, this Python's standard library")
    text.add_argument("--batch", type=size, default=32, help="pieces of text read side by side")
    text.add_argument("--length", type=size, default=128, help="characters a piece")
    add_model(made, cell="lstm", hidden=128, layers=1, embedding=32, units="units a direction")
    add_training(made, steps=600, lr=5e-3, time_limit=150.0)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return the exit code; what cannot be done leaves through SystemExit(2)."""
    return start("tagger", _parser(), arguments, _QUICK, _run)


def _run(parser: Parser, options: argparse.Namespace) -> int:
    task = Tagger(options, standard_library() if options.text is None else from_file(options.text))
    print(task.data)
    session = Session("tagger", parser, options, [task])
    session.train()
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
