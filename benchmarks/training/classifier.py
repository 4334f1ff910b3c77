"""Classify handwritten digits read pixel by pixel, with three ways to pool the recurrent layer's outputs, and compare.

    python -m benchmarks.training.classifier [--help]

The images are scikit-learn's bundled ones: 1,797 of 8 × 8 pixels, read as 64 steps of one grey level each. Source: UCI, Optical
Recognition of Handwritten Digits (Alpaydin & Kaynak 1998). Reading an image pixel by pixel: Le, Jaitly & Hinton 2015. A linear
softmax, printed beside, has it far easier: it sees all pixels at once, each at its place.

Exit codes: 0 done; 1 a loss was not finite, or the two trainings differ in quality; 2 a wrong option or no scikit-learn, said
in one line; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training.command import Parser, add_model, add_training, job_parser, size
from benchmarks.training.job import start
from benchmarks.training.model import recurrent
from benchmarks.training.report import Measure
from benchmarks.training.session import Session, Task

# (T, B, D·H) → features of the whole sequence.
POOLINGS: dict[str, tuple[str, bool, Callable[[Tensor], Tensor]]] = {
    "last": ("last state", False, lambda out: out[-1]),
    "mean": ("mean over time", False, lambda out: out.mean(0)),
    # Each direction has read everything at one end and one pixel at the other.
    "ends": ("both ends of both directions", True, lambda out: torch.cat((out[0], out[-1]), 1)),
}


class MissingPackage(Exception):
    """A package that the job needs cannot be imported; the message is one line for the user."""


class Digits:
    """The images, a fifth of each digit's held out, and a linear softmax fitted to the others.

    Attributes:
        training: pixels (T, images, 1), standardised, and digits (images,).
        held_out: likewise.
        linear: held-out accuracy of multinomial logistic regression, which sees all pixels of an image at once.
        commonest: held-out accuracy of the training images' commonest digit.

    Raises:
        MissingPackage: if there is no scikit-learn.
    """

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.linear_model import LogisticRegression
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise MissingPackage(
                f"the digits come with scikit-learn, which is missing (pip install scikit-learn): {error}"
            ) from error
        images, digits = load_digits(return_X_y=True)
        # From 0..16.
        images = images / 16
        split = train_test_split(images, digits, test_size=0.2, random_state=0, stratify=digits)
        training, held_out, training_digits, held_out_digits = split
        linear = LogisticRegression(max_iter=1000).fit(training, training_digits)
        self.linear = float(linear.score(held_out, held_out_digits))
        self.training = _sequences(training, training), torch.from_numpy(training_digits)
        self.held_out = _sequences(held_out, training), torch.from_numpy(held_out_digits)
        commonest = torch.bincount(self.training[1]).argmax()
        self.commonest = (self.held_out[1] == commonest).double().mean().item()


def _sequences(images: Any, training: Any) -> Tensor:
    """Read images (N, pixels) row by row: (pixels, N, 1), with the training images' mean and deviation taken out."""
    pixels = torch.from_numpy((images - training.mean()) / training.std())
    return pixels.float().t().unsqueeze(2).contiguous()


class ClassifierModel(nn.Module):
    """Recurrent layers → pooling → linear."""

    def __init__(self, cell: str, hidden: int, layers: int, pooling: str) -> None:
        super().__init__()
        _, both, self.pool = POOLINGS[pooling]
        self.rnn = recurrent(cell, 1, hidden, layers, bidirectional=both)
        self.linear = nn.Linear(hidden * (4 if both else 1), 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (T, B, 1) → logits (B, 10)."""
        out, _ = self.rnn(pixels)
        logits: Tensor = self.linear(self.pool(out))
        return logits


class Classifier(Task):
    """One pooling.

    Args:
        options: of the command line.
        pooling: one of ``POOLINGS``.
        digits: the images.
    """

    items = "images"
    measures = (
        Measure("held_out_loss", "held-out loss"),
        # Two and a half standard deviations of the difference of two accuracies around 96 % on 360 images. With other roundings
        # in a single weight, torch.nn's own training comes out as far from itself.
        Measure("accuracy", "held-out accuracy", ".2%", agrees=0.04),
    )

    def __init__(self, options: argparse.Namespace, pooling: str, digits: Digits) -> None:
        self.name = pooling
        self._options = options
        self._digits = digits
        self.items_per_step = min(options.batch, len(digits.training[1]))
        self.rows_per_step = self.items_per_step * len(digits.training[0])
        self.title = (
            f"Digits pixel by pixel, {POOLINGS[pooling][0]}: {options.layers}-layer {options.cell}, hidden {options.hidden}"
        )

    def model(self) -> ClassifierModel:
        """Make the model."""
        return ClassifierModel(self._options.cell, self._options.hidden, self._options.layers, self.name)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Pixels (T, B, 1) and digits (B,); each epoch in an order of its own."""
        pixels, digits = self._digits.training
        epoch, place = divmod(number, len(digits) // self.items_per_step)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(self._options.seed + epoch))
        chosen = order[place * self.items_per_step :][: self.items_per_step]
        return pixels[:, chosen], digits[chosen]

    def loss(self, model: ClassifierModel, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy per image."""
        return functional.cross_entropy(model(batch[0]), batch[1])

    def quality(self, model: ClassifierModel) -> dict[str, float]:
        """Judge the held-out images."""
        pixels, digits = self._digits.held_out
        logits = model(pixels)
        right = (logits.argmax(1) == digits).double().mean().item()
        return {"held_out_loss": functional.cross_entropy(logits, digits).item(), "accuracy": right}

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """Chance, and what can be told from all pixels at once without any order."""
        return {"commonest digit": {"accuracy": self._digits.commonest}, "linear softmax": {"accuracy": self._digits.linear}}


_QUICK: dict[str, Any] = {"hidden": 32, "steps": 60, "time_limit": 12.0}


def _parser() -> Parser:
    made = job_parser(
        "classifier",
        "Train a classifier of handwritten digits, read pixel by pixel, twice for each way of pooling, with torch.nn and with "
        "fused_rnn: same initial weights, same batches in the same order. Compare speed and accuracy, beside a linear softmax.",
    )
    model = add_model(made, cell="gru", hidden=64, layers=1, units="units a direction")
    model.add_argument(
        "--pooling", choices=POOLINGS, nargs="+", default=list(POOLINGS), help="how the outputs become one vector"
    )
    model.add_argument("--batch", type=size, default=64, help="images read side by side")
    add_training(made, steps=2000, lr=2e-2, time_limit=300.0)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return the exit code; what cannot be done leaves through SystemExit(2)."""
    return start("classifier", _parser(), arguments, _QUICK, _run)


def _run(parser: Parser, options: argparse.Namespace) -> int:
    try:
        digits = Digits()
    except MissingPackage as error:
        parser.error(str(error))
    print(
        f"images: scikit-learn's digits; {len(digits.training[1]):,} to train on, {len(digits.held_out[1]):,} held out, "
        f"{len(digits.training[0])} pixels each"
    )
    tasks = [Classifier(options, pooling, digits) for pooling in dict.fromkeys(options.pooling)]
    session = Session("classifier", parser, options, tasks)
    session.train()
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
