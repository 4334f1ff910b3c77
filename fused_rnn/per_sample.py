"""Weight gradients of each sample of a batch, as ``torch.func.vmap`` of a gradient asks for them.

The rows of a folded batch (``fused_rnn.batching``) belong to groups: row r is of group r modulo their number. One backward of
the kernels serves all groups; only the products after it are done group by group, as one batched product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.cells import Weights
from fused_rnn.gradients import WeightGradients
from fused_rnn.layer import Layer


class GroupedWeightGradients(WeightGradients):
    """As ``WeightGradients``, with the groups as the first dimension of every gradient."""

    def __init__(self, groups: int, layer: Layer, weight: Weights, wanted: Weights, dtype: torch.dtype) -> None:
        self.groups = groups
        super().__init__(layer, weight, wanted, dtype)
        self.product = self._product

    def room(self, shape: Sequence[int]) -> Tensor:
        """Room for the gradients of a parameter of this shape."""
        return super().room((self.groups, *shape))

    def _by_group(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self.groups, rows.shape[1])

    def _product(
        self, d_gates: Tensor, inputs: Sequence[Tensor], d_weight: Tensor | None, d_bias: Tensor | None, add: bool
    ) -> None:
        """As ``fused_rnn.kernels.weight_gradient``, for each group."""
        row = 0
        for part in inputs if d_weight is not None else ():
            left = self._by_group(d_gates[row : row + part.shape[0]]).permute(1, 2, 0)
            products = torch.bmm(left, self._by_group(part.to(d_gates.dtype)).transpose(0, 1))
            _put(d_weight, products, add or row > 0)
            row += part.shape[0]
        _put(d_bias, self._by_group(d_gates).sum(0), add)


def _put(total: Tensor | None, values: Tensor, add: bool) -> None:
    if total is not None:
        total.add_(values) if add else total.copy_(values)
