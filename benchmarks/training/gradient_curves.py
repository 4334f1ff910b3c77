"""The gradient's norm at the steps of a sequence: what is measured, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fused_rnn

NAMES = {"rnn_tanh": "RNN", "gru": "GRU", "lstm": "LSTM"}

# Points of a curve; between them the layer runs in one call.
_POINTS = 100


@dataclass
class Curve:
    """The gradient's norm at some steps of one length.

    Attributes:
        cell: of the recurrent layer.
        length: T.
        stage: "start", "clipped" or "not clipped" (after training), "radius" (at the start, the recurrent matrix scaled).
        initial: "torch.nn", "chrono", or the spectral radius as text.
        steps: t, ascending, 0 to T.
        norms: of d loss / d state after t steps, mean over the sequences.
    """

    cell: str
    length: int
    stage: str
    initial: str
    steps: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@dataclass
class Descent:
    """A training with plain gradient descent.

    Attributes:
        clip: the norm that gradients are scaled down to, or 0.
        losses: of every step, not finite where the training broke down.
        norms: of all parameters' gradients together, before clipping.
    """

    length: int
    radius: float
    clip: float
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def norms_through_time(model: Any, inputs: Tensor, wanted: Tensor) -> tuple[list[int], list[float]]:
    """Measure d loss / d state on the way back, for the squared error of each sequence.

    The layer runs piece by piece, so that the states between the pieces, h and for an LSTM c, receive their gradients: those of
    the whole recurrence after them, as in one call.

    Args:
        model: has ``rnn`` and ``linear``, as ``AddingModel``.
        inputs: (T, B, 2).
        wanted: (B,).

    Returns:
        steps, 0 to T, ascending, and the norms there: of the gradient of h and c together, mean over the sequences.
    """
    length, piece = len(inputs), math.ceil(len(inputs) / _POINTS)
    layers, hidden = model.rnn.num_layers, model.rnn.hidden_size
    parts = 2 if isinstance(model.rnn, (nn.LSTM, fused_rnn.LSTM)) else 1
    zeros = tuple(inputs.new_zeros(layers, inputs.shape[1], hidden).requires_grad_() for _ in range(parts))
    states, steps = [zeros], [0]
    for begin in range(0, length, piece):
        _, state = model.rnn(inputs[begin : begin + piece], states[-1] if parts == 2 else states[-1][0])
        states.append(state if parts == 2 else (state,))
        steps.append(min(begin + piece, length))
    # The top layer's h after the last step is its last output; from the state, so that this state has a gradient, too.
    loss = (model.linear(states[-1][0][-1]).squeeze(1) - wanted).square().sum()
    gradients = torch.autograd.grad(loss, [tensor for state in states for tensor in state], allow_unused=True)
    # The loss does not look at the last c.
    flat = [torch.zeros_like(zeros[0]) if gradient is None else gradient for gradient in gradients]
    return steps, [_mean_norm(flat[i : i + parts]) for i in range(0, len(flat), parts)]


def _mean_norm(gradients: Sequence[Tensor]) -> float:
    """Mean over the sequences of the joint 2-norm of (layers, B, H) tensors, of numbers whose squares are too small, too."""
    rows = torch.cat([gradient.transpose(0, 1).flatten(1) for gradient in gradients], 1)
    largest = rows.abs().amax()
    return 0.0 if largest == 0 else (largest * (rows / largest).norm(dim=1).mean()).item()


def scale_recurrent(model: Any, radius: float) -> None:
    """Scale each gate's block of the first layer's recurrent matrix to a spectral radius, in place."""
    with torch.no_grad():
        for block in model.rnn.weight_hh_l0.split(model.rnn.hidden_size):
            block *= radius / torch.linalg.eigvals(block.double()).abs().max().item()
