"""The norm of the gradient of each layer's weights, at every step of a training."""

from __future__ import annotations

import math
import re
from functools import partial

from torch import Tensor, nn
from torch.linalg import vector_norm


class LayerNorms:
    """Watches a stack. Its hooks see each gradient as the backward leaves it, so clipping comes after.

    Args:
        stack: torch.nn's or fused_rnn's layers; ``_l{k}`` in the name of a parameter is its layer.

    Attributes:
        steps: of each backward, the norm for each layer.
    """

    def __init__(self, stack: nn.Module) -> None:
        self.steps: list[list[float]] = []
        layers = {name: int(found[1]) for name, _ in stack.named_parameters() if (found := re.search(r"_l(\d+)", name))}
        self._count = 1 + max(layers.values())
        for name, parameter in stack.named_parameters():
            # Of a layer, weights and biases of both directions; a copy of the stack has none of these hooks.
            parameter.register_hook(partial(self._add, layers[name]))

    def begin(self) -> None:
        """What comes is another step's."""
        if not self.steps or any(self.steps[-1]):
            self.steps.append([0.0] * self._count)

    def mean(self, first: int, last: int | None) -> list[float]:
        """For each layer, the mean over steps ``first`` to ``last``, as of a slice."""
        found = [norms for norms in self.steps if any(norms)][first:last]
        return [math.fsum(of_layer) / len(found) for of_layer in zip(*found, strict=True)]

    def _add(self, layer: int, gradient: Tensor) -> None:
        if self.steps:
            self.steps[-1][layer] = math.hypot(self.steps[-1][layer], vector_norm(gradient).item())
