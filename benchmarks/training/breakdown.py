"""How much of a training step is the recurrent layers, and how much is the rest, which no recurrent kernel can speed up."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.training.model import CharacterModel, cross_entropy
from benchmarks.training.trainer import Settings


def breakdown(
    models: Sequence[CharacterModel], inputs: Tensor, targets: Tensor, settings: Settings, rounds: int = 7
) -> list[tuple[float, float]]:
    """Time the recurrent layers and the rest of one training step, model by model, round by round.

    Works on copies: the models stay as they are.

    Returns:
        per model (seconds in the recurrent layers, seconds elsewhere), medians over the rounds.
    """
    copies = [copy.deepcopy(model) for model in models]
    optimizers = [torch.optim.Adam(model.parameters(), lr=settings.lr) for model in copies]
    samples: list[list[tuple[float, float]]] = [[] for _ in copies]
    for _ in range(rounds):
        for model, optimizer, taken in zip(copies, optimizers, samples, strict=True):
            time.sleep(0.03)
            # The first call after a change of provider is not timed.
            _timed_step(model, optimizer, inputs, targets, settings)
            taken.append(_timed_step(model, optimizer, inputs, targets, settings))
    return [(statistics.median(r for r, _ in taken), statistics.median(o for _, o in taken)) for taken in samples]


def _timed_step(
    model: CharacterModel, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, settings: Settings
) -> tuple[float, float]:
    """Take a training step with the graph cut before and after the recurrent layers, so that its parts can be timed."""
    times = [time.perf_counter()]
    optimizer.zero_grad()
    embedded = model.embed(inputs)
    rnn_input = embedded.detach().requires_grad_()
    times.append(time.perf_counter())
    out, _ = model.rnn(rnn_input)
    times.append(time.perf_counter())
    rnn_output = out.detach().requires_grad_()
    cross_entropy(model.predict(rnn_output), targets).backward()
    times.append(time.perf_counter())
    out.backward(rnn_output.grad)
    times.append(time.perf_counter())
    embedded.backward(rnn_input.grad)
    settings.clip(list(model.parameters()))
    optimizer.step()
    times.append(time.perf_counter())
    before, forward, head, backward, after = (end - start for start, end in pairwise(times))
    return forward + backward, before + head + after
