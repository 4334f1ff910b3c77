"""How the norm of the gradient changes on its way back through time: vanishing, exploding, clipped.

Sources: Hochreiter 1991; Bengio, Simard & Frasconi 1994; Pascanu, Mikolov & Bengio 2013 (clipping by norm).
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import fused_rnn
from benchmarks.training.gradient_curves import NAMES, Curve, Descent, norms_through_time, scale_recurrent
from benchmarks.training.gradient_plots import plot_curves, plot_exploding
from benchmarks.training.report import print_wide
from benchmarks.training.session import Session
from benchmarks.training.trainer import Outcome

_SEQUENCES = 32
# The number of the step whose sequences no training sees.
_UNSEEN = -2

# Cells, and whether their initial biases are the job's or torch.nn's.
_STARTS = (("rnn_tanh", False), ("gru", False), ("gru", True), ("lstm", False), ("lstm", True))
# Spectral radii of each gate's recurrent matrix; torch.nn's initial ones have about 1/√3.
RADII = (0.6, 1.0, 2.0, 4.0, 8.0)
_EXPLODING = 2.0
_DESCENT_LR = 0.1

# The two implementations round differently in float64, over a thousand steps; a wrong gradient is off by far more.
_SAME = 1e-6
# Below, a norm has lost its digits to the smallest numbers of float64.
_TINY = 1e-290


class GradientFlow:
    """The gradient part of the adding job.

    Args:
        session: takes the rows and the pictures.
        options: of the job.
        lengths: T of the curves.
        make: (cell, length, chrono) → a model with torch.nn's layers.
        draw: (length, batch, seed) → inputs and sums.
    """

    def __init__(
        self,
        session: Session,
        options: argparse.Namespace,
        lengths: Sequence[int],
        make: Callable[[str, int, bool], nn.Module],
        draw: Callable[[int, int, int], tuple[Tensor, Tensor]],
    ) -> None:
        self.curves: list[Curve] = []
        self.descents: list[Descent] = []
        self.worst = 0.0
        self._session, self._options, self._lengths = session, options, lengths
        self._make, self._draw = make, draw

    def run(self) -> None:
        """Measure, draw, write. Ctrl-C ends it, and what was measured is drawn."""
        options = self._options
        print(
            f"\nGradients through time: {options.hidden} units, {_SEQUENCES} sequences, "
            f"{options.gradient_steps} steps of training"
        )
        short = self._lengths[0]
        work = [partial(self._cell, length, cell, chrono) for length in self._lengths for cell, chrono in _STARTS]
        work += [partial(self._radius, short, cell, radius) for cell in NAMES for radius in RADII]
        work += [partial(self._descend, short, clip) for clip in (0.0, options.clip_norm or 1.0)]
        try:
            for piece in tqdm(work, desc="gradients", dynamic_ncols=True):
                piece()
        except KeyboardInterrupt:
            self._session.outcome = Outcome.INTERRUPTED
            print("stopped by Ctrl-C, the curves are those so far")
        if self.curves:
            print(
                f"largest difference between torch.nn's and fused_rnn's gradients at any step, in float64: "
                f"{self.worst:.1e} of the gradient's norm"
            )
            if not self.worst < _SAME:
                self._session.disagree()
            self._summary()
        rows = [{"task": "gradients", **asdict(each)} for each in (*self.curves, *self.descents)]
        self._session.add(rows)
        if self.curves:
            with self._session.writing("adding_gradients.png") as path:
                plot_curves(path, self.curves, options.gradient_steps)
        if self.descents:
            with self._session.writing("adding_exploding.png") as path:
                plot_exploding(path, self.curves, self.descents)

    def _new(self, cell: str, length: int, chrono: bool) -> Any:
        torch.manual_seed(self._options.seed)
        return self._make(cell, length, chrono)

    def _look(self, model: Any, curve: Curve, *, check: bool = False) -> None:
        """Measure a curve in float64, in which what float32 would round to zero can be seen, and keep it."""
        inputs, wanted = (x.double() for x in self._draw(curve.length, _SEQUENCES, _UNSEEN))
        theirs = copy.deepcopy(model).double()
        ours = fused_rnn.convert(copy.deepcopy(theirs))
        curve.steps, curve.norms = norms_through_time(ours, inputs, wanted)
        if check:
            _, expected = norms_through_time(theirs, inputs, wanted)
            gaps = [abs(a - b) / b if b > _TINY else abs(a - b) for a, b in zip(curve.norms, expected, strict=True)]
            self.worst = max(self.worst, *gaps)
        self.curves.append(curve)

    def _cell(self, length: int, cell: str, chrono: bool) -> None:
        start = self._new(cell, length, chrono)
        initial = "chrono" if chrono else "torch.nn"
        self._look(start, Curve(cell, length, "start", initial), check=True)
        if cell != "rnn_tanh" and not chrono:
            return
        for stage, clip in (("clipped", self._options.clip_norm or 1.0), ("not clipped", 0.0)):
            model = fused_rnn.convert(copy.deepcopy(start))
            optimizer = torch.optim.Adam(model.parameters(), lr=self._options.lr)
            for number in range(self._options.gradient_steps):
                _step(model, optimizer, *self._draw(length, self._options.batch, number), clip)
            self._look(fused_rnn.revert(model), Curve(cell, length, stage, initial))

    def _radius(self, length: int, cell: str, radius: float) -> None:
        model = self._new(cell, length, False)
        scale_recurrent(model, radius)
        # Not compared: where gradients explode, roundings do, too, and any two implementations part.
        self._look(model, Curve(cell, length, "radius", f"{radius:g}"))

    def _descend(self, length: int, clip: float) -> None:
        """Train an exploding recurrence with plain gradient descent, whose steps are as long as the gradients."""
        descent = Descent(length, _EXPLODING, clip)
        self.descents.append(descent)
        model = self._new("rnn_tanh", length, False)
        scale_recurrent(model, descent.radius)
        model = fused_rnn.convert(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=_DESCENT_LR)
        for number in range(2 * self._options.gradient_steps):
            loss, norm = _step(model, optimizer, *self._draw(length, self._options.batch, number), clip)
            descent.losses.append(loss)
            descent.norms.append(norm)
            if not math.isfinite(loss):
                break

    def _summary(self) -> None:
        lengths = [f"T = {length:,}" for length in self._lengths]
        through = Table("cell", "initial weights", "stage", *lengths, title="what is left of the gradient at t = 0")
        left = {(c.cell, c.initial, c.stage, c.length): f"{_left(c):.1e}" for c in self.curves}
        for cell, initial, stage in dict.fromkeys(key[:3] for key in left if key[2] != "radius"):
            cells = [left.get((cell, initial, stage, length), "–") for length in self._lengths]
            through.add_row(NAMES[cell], initial, stage, *cells)
        short = self._lengths[0]
        scaled = Table("spectral radius", *NAMES.values(), title=f"the same at T = {short:,}, recurrent matrices scaled")
        for radius in (f"{radius:g}" for radius in RADII):
            scaled.add_row(radius, *(left.get((cell, radius, "radius", short), "–") for cell in NAMES))
        print_wide(through)
        print_wide(scaled)


def _left(curve: Curve) -> float:
    return curve.norms[0] / curve.norms[-1] if curve.norms[-1] else math.nan


def _step(model: Any, optimizer: torch.optim.Optimizer, inputs: Tensor, wanted: Tensor, clip: float) -> tuple[float, float]:
    """Take a training step; return the loss and the norm of all gradients together before clipping."""
    optimizer.zero_grad()
    loss = functional.mse_loss(model(inputs), wanted)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    optimizer.step()
    return loss.item(), norm.item()
