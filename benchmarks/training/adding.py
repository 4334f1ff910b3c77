"""The adding problem: remember two numbers over a long sequence, and see what becomes of the gradient on the way back.

    python -m benchmarks.training.adding [--help]

A sequence of T steps has a number, uniform in [0, 1], and a mark at each; two steps are marked, one in each half. The target is
the sum of the two marked numbers. Who answers 1 whatever comes has a mean squared error of 1/6 = 0.167.

Source: Hochreiter & Schmidhuber 1997, experiment 4; numbers and sum in the form of Le, Jaitly & Hinton 2015.

Exit codes: 0 done; 1 a loss was not finite, or the two trainings differ in quality or in their gradients; 2 a wrong option,
said in one line; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training.command import Parser, add_model, add_training, job_parser, number, size
from benchmarks.training.gradient_flow import GradientFlow
from benchmarks.training.job import start
from benchmarks.training.model import recurrent
from benchmarks.training.report import Measure
from benchmarks.training.session import Session, Task

# Hochreiter & Schmidhuber count a sequence as solved within 0.04 of a target that spans half of what theirs does here.
_SOLVED = 0.08
_HELD_OUT = 512


def sequences(length: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw numbers and marks (T, B, 2), and the sums (B,)."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    numbers = torch.rand(length, batch, generator=generator)
    marks = torch.zeros(length, batch)
    half = length // 2
    for low, high in ((0, half), (half, length)):
        marks.scatter_(0, torch.randint(low, high, (1, batch), generator=generator), 1.0)
    return torch.stack((numbers, marks), 2), (numbers * marks).sum(0)


class AddingModel(nn.Module):
    """Recurrent layers → the last output → linear, one number per sequence.

    Args:
        cell: one of ``CELLS``.
        length: of the sequences, T.
        chrono: whether the gates that keep the state start with time scales spread over 1 to T steps, in place of torch.nn's
            initial biases. Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?", equation 16.
    """

    def __init__(self, cell: str, hidden: int, layers: int, length: int, *, chrono: bool) -> None:
        super().__init__()
        self.rnn = recurrent(cell, 2, hidden, layers)
        self.linear = nn.Linear(hidden, 1)
        if chrono and cell in ("lstm", "gru"):
            with torch.no_grad():
                for layer in range(layers):
                    self._spread(getattr(self.rnn, f"bias_ih_l{layer}"), getattr(self.rnn, f"bias_hh_l{layer}"), cell, length)

    @staticmethod
    def _spread(bias_ih: Tensor, bias_hh: Tensor, cell: str, length: int) -> None:
        keep = torch.empty(bias_ih.shape[0] // (4 if cell == "lstm" else 3)).uniform_(1, max(length - 1, 1)).log()
        for bias in (bias_ih, bias_hh):
            bias.zero_()
        # Both have the gate that keeps as their second block: LSTM i, f, g, o; GRU r, z, n.
        bias_ih[len(keep) : 2 * len(keep)] = keep
        if cell == "lstm":
            bias_ih[: len(keep)] = -keep

    def forward(self, inputs: Tensor) -> Tensor:
        """Numbers and marks (T, B, 2) → sums (B,)."""
        out, _ = self.rnn(inputs)
        sums: Tensor = self.linear(out[-1]).squeeze(1)
        return sums


def _seed(options: argparse.Namespace, number: int) -> int:
    """The seed of a training step's sequences, or with a negative number of others."""
    return int(options.seed) * 1_000_003 + number


class Adding(Task):
    """One length.

    Args:
        options: of the command line.
        length: T.
    """

    items = "sequences"
    loss_unit: ClassVar[str] = "squared error"
    log_loss: ClassVar[bool] = True
    measures = (
        # A tenth of what there is to learn.
        Measure("held_out_loss", "held-out squared error", ".5f", agrees=1 / 60),
        Measure("solved", f"solved, error below {_SOLVED:g}", ".1%"),
    )

    def __init__(self, options: argparse.Namespace, length: int) -> None:
        self.name = f"T{length}"
        self._options = options
        self._length = length
        self.items_per_step = options.batch
        self.rows_per_step = max(options.batch, _HELD_OUT) * length
        self.title = f"Adding problem, T = {length:,}: {options.layers}-layer {options.cell}, hidden {options.hidden}"

    def model(self) -> AddingModel:
        """Make the model."""
        options = self._options
        return AddingModel(options.cell, options.hidden, options.layers, self._length, chrono=not options.no_chrono)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Sequences that no other step has."""
        return sequences(self._length, self._options.batch, _seed(self._options, number))

    def loss(self, model: AddingModel, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error."""
        return functional.mse_loss(model(batch[0]), batch[1])

    def quality(self, model: AddingModel) -> dict[str, float]:
        """Judge new sequences."""
        inputs, wanted = self._held_out()
        return _figures(model(inputs), wanted)

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """The best answer that does not look."""
        _, wanted = self._held_out()
        return {"always 1": _figures(torch.ones_like(wanted), wanted)}

    def _held_out(self) -> tuple[Tensor, Tensor]:
        return sequences(self._length, _HELD_OUT, _seed(self._options, -1))


def _figures(sums: Tensor, wanted: Tensor) -> dict[str, float]:
    error = sums - wanted
    return {"held_out_loss": error.square().mean().item(), "solved": (error.abs() < _SOLVED).double().mean().item()}


_QUICK: dict[str, Any] = {"lengths": [50, 100], "steps": 100, "time_limit": 8.0, "gradient_steps": 10}


def _parser() -> Parser:
    made = job_parser(
        "adding",
        "Train on the adding problem twice for each length, with torch.nn and with fused_rnn: same initial weights, same "
        "batches in the same order. Compare speed and error. Then draw the norm of the gradient on its way back through "
        "time, for RNN, GRU and LSTM, before and after some training, clipped and not clipped.",
    )
    model = add_model(made, cell="gru", hidden=32, layers=1)
    lengths = number(int, 2, 1 << 20)
    model.add_argument("--lengths", type=lengths, nargs="+", default=[100, 400, 1000], metavar="T", help="steps of a sequence")
    model.add_argument(
        "--no-chrono", action="store_true", help="torch.nn's initial biases; long sequences take far longer then"
    )
    model.add_argument("--batch", type=size, default=32, help="sequences a step")
    add_training(made, steps=500, lr=2e-2, time_limit=130.0)
    pictures = made.add_argument_group("gradients through time")
    pictures.add_argument(
        "--gradient-steps",
        type=number(int, 0, 10**9),
        default=60,
        help="steps of training before the gradients are looked at again; 0: do not look at gradients at all",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return the exit code; what cannot be done leaves through SystemExit(2)."""
    return start("adding", _parser(), arguments, _QUICK, _run)


def _run(parser: Parser, options: argparse.Namespace) -> int:
    lengths = sorted(set(options.lengths))
    session = Session("adding", parser, options, [Adding(options, length) for length in lengths])
    session.train()
    if options.gradient_steps and not session.stopped:

        def make(cell: str, length: int, chrono: bool) -> AddingModel:
            return AddingModel(cell, options.hidden, options.layers, length, chrono=chrono)

        def draw(length: int, batch: int, number: int) -> tuple[Tensor, Tensor]:
            return sequences(length, batch, _seed(options, number))

        GradientFlow(session, options, lengths, make, draw).run()
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
