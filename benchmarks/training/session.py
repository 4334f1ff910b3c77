"""A job made of tasks: each is trained with torch.nn and with fused_rnn, judged, and compared with yardsticks."""

from __future__ import annotations

import abc
import argparse
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.json_file import write_rows
from benchmarks.training import job
from benchmarks.training.command import Parser, training_settings
from benchmarks.training.plots import plot_race
from benchmarks.training.report import Measure, Row, contender_row, environment, json_rows, print_table
from benchmarks.training.trainer import Contender, Outcome, apart, race

# How far apart the losses of the first steps may be, relative to the first; 1e-6 is what rounding does.
_SAME = 1e-3


class Task(abc.ABC):
    """What a job says of one training: the data, the model, and how good it is.

    Attributes:
        name: tells the tasks of one job apart; empty where there is one.
        title: the headline of the table and the picture.
        items: what a training step sees, in the plural.
        items_per_step: how many of them.
        rows_per_step: steps of all sequences together that the recurrent layers take at most in one call.
        loss_unit: of the training loss.
        log_loss: whether the picture's axis of the loss is logarithmic.
        measures: the figures of ``quality``. The first is in the training loss's unit.
    """

    name: str = ""
    title: str
    items: str
    items_per_step: int
    rows_per_step: int
    loss_unit: ClassVar[str] = "nats"
    log_loss: ClassVar[bool] = False
    measures: ClassVar[Sequence[Measure]]

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """Make the model, its recurrent layers torch.nn's."""

    @abc.abstractmethod
    def batch(self, number: int) -> Any:
        """The batch of a training step."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: Any) -> Tensor:
        """The training loss, a scalar."""

    @abc.abstractmethod
    def quality(self, model: Any) -> dict[str, float]:
        """Judge a model, in evaluation mode and without gradients, on data that it was not trained on."""

    @abc.abstractmethod
    def yardsticks(self) -> dict[str, dict[str, float]]:
        """What else to compare with: name → figures of ``measures``, as many as make sense."""


class Session:
    """One run of a job. What is measured is printed and written task by task.

    Args:
        name: of the job, and of its files.
        parser: says what cannot go on.
        options: of the command line, with those of ``add_training``.
        tasks: what will be trained; they share the time limit. One that cannot fit into the machine ends the job here.
    """

    def __init__(self, name: str, parser: Parser, options: argparse.Namespace, tasks: Sequence[Task]) -> None:
        self.name = name
        self.outcome = Outcome.FINISHED
        self.files = job.Outputs(options.out)
        self._parser = parser
        self._options = options
        self._tasks = tasks
        self._end = time.perf_counter() + options.time_limit if options.time_limit else None
        self._written: list[dict[str, Any]] = []
        self._agree = True
        self._backend = ""
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        for task in tasks:
            self._check_memory(task)

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be begun."""
        return self.outcome in (Outcome.INTERRUPTED, Outcome.DIVERGED)

    def train(self) -> None:
        """Train each task with both implementations, judge them, print the table, write the rows and the picture."""
        for number, task in enumerate(self._tasks):
            if not self.stopped:
                self._train(task, len(self._tasks) - number)

    def _train(self, task: Task, left: int) -> None:
        settings = training_settings(self._options)
        if self._end is not None:
            # A task that needs less than its share leaves the rest to those after it. Zero would mean no limit.
            seconds = max(self._end - time.perf_counter(), 1e-9)
            settings = dataclasses.replace(settings, time_limit=seconds / left)
        torch.manual_seed(settings.seed)
        model = task.model()
        fused, self._backend = job.fused_copy(self._parser, model)

        def loss_of(model: nn.Module, batch: Any, carry: None) -> tuple[Tensor, None]:
            return task.loss(model, batch), None

        base = Contender("torch.nn", model, loss_of, settings)
        ours = Contender("fused_rnn", fused, loss_of, settings)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"\n{task.title}: {parameters:,} parameters, {settings.steps:,} steps of {task.items_per_step:,} {task.items}, "
            f"{torch.get_num_threads()} threads, fused_rnn on {self._backend}",
            flush=True,
        )
        outcome = race([base, ours], task.batch, settings, task.name or "training")
        rows = [contender_row(contender, base, task.items_per_step, task.items) for contender in (base, ours)]
        if outcome in (Outcome.FINISHED, Outcome.TIME_LIMIT) and base.losses:
            try:
                for contender, row in zip((base, ours), rows, strict=True):
                    row.measures = _judged(task, contender.model)
                rows += [Row(name, measures=figures, items=task.items) for name, figures in task.yardsticks().items()]
            except KeyboardInterrupt:
                outcome = Outcome.INTERRUPTED
        # The last outcome that was not the best one; after an interrupt or a divergence there is no next task.
        if outcome is not Outcome.FINISHED:
            self.outcome = outcome
        if base.losses:
            print_table(rows, task.title, task.measures)
        job.print_remarks(outcome, (base, ours))
        self._compare((base, ours), task.measures, rows)
        facts = {"task": task.name, "title": task.title, "parameters": parameters}
        self.add(json_rows(rows, task.measures, facts | {"outcome": outcome.value}))
        if base.losses and ours.losses:
            first = task.measures[0]
            levels = {
                f"{first.label}, {row.provider}: {level:.3g}": level
                for row in rows[1:]
                if math.isfinite(level := row.measures.get(first.key, math.nan))
            }
            with self.writing(f"{self.name}_{task.name}.png" if task.name else f"{self.name}.png") as picture:
                title = f"{task.title}: {ours.name} against {base.name}"
                plot_race(picture, title, base, ours, levels, task.loss_unit, log=task.log_loss)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows of the JSON, with those before them: even a kill leaves what was measured."""
        settings = job.settings_of(self._options)
        common = {"job": self.name, "backend": self._backend, "settings": settings, **environment()}
        self._written += [{**row, **common} for row in rows]
        with self.writing(f"{self.name}.json") as path:
            write_rows(path, self._written)

    def disagree(self) -> None:
        """The two implementations differ in something that the job has said: it will not end with exit code 0."""
        self._agree = False

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give the path of a file to write; that it cannot be written ends the job, in one line."""
        try:
            yield self.files.path(name)
        except OSError as error:
            self._parser.error(f"cannot write the results to {self._options.out}: {error.strerror or error}")

    def finish(self) -> int:
        """Name the files, and return the exit code."""
        if self.outcome is not Outcome.INTERRUPTED:
            with self.writing(f"{self.name}.json"):
                self.files.complete()
        print(f"wrote {self.files}")
        return job.CODES[self.outcome] or int(not self._agree)

    def _check_memory(self, task: Task) -> None:
        with torch.device("meta"):
            model = task.model()
        kept = 0
        for layer in model.modules():
            if isinstance(layer, nn.RNNBase):
                # The gates, the output and the cell state of every row.
                units = layer.num_layers * (2 if layer.bidirectional else 1) * layer.hidden_size
                kept += task.rows_per_step * (layer.weight_hh_l0.shape[0] // layer.hidden_size + 2) * units
        weights = sum(parameter.numel() for parameter in model.parameters())
        job.check_memory(self._parser, weights, kept, "--hidden, --layers or --batch")

    def _compare(self, contenders: Sequence[Contender], measures: Sequence[Measure], rows: Sequence[Row]) -> None:
        """Say whether the two trainings are the same at their start and come out equally good at their end."""
        base, ours = rows[:2]
        if base.losses and ours.losses:
            early = apart(contenders, job.EARLY)
            # Not "early > …": what is no number agrees with nothing. A loss that is not finite has been reported as such.
            if not early <= _SAME * max(1.0, abs(base.losses[0])) and math.isfinite(base.losses[-1] + ours.losses[-1]):
                self._agree = False
                print(f"the two trainings DISAGREE from the start: their first losses are {early:.1e} apart")
        for measure in measures:
            if measure.agrees is None or measure.key not in ours.measures:
                continue
            gap = abs(base.measures[measure.key] - ours.measures[measure.key])
            agree = gap <= measure.agrees
            self._agree &= agree
            print(
                f"{measure.label}: the two trainings {'agree' if agree else 'DISAGREE'}, {gap:{measure.form}} apart "
                f"(allowed: {measure.agrees:{measure.form}})"
            )


def _judged(task: Task, model: nn.Module) -> dict[str, float]:
    training = model.training
    model.eval()
    with torch.no_grad():
        figures = task.quality(model)
    model.train(training)
    return figures
