"""Lengths and resets: which rows of a padded batch the steps work on, and where the states start anew.

Legend as in ``fused_rnn.functional``. A padded batch is seen as a matrix of its positions: (T·N, I), or (N·T, I) with
``batch_first``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.steps import Steps


@dataclass(frozen=True)
class Ragged:
    """The rows that sequences of these lengths have in a padded batch, and the way there and back.

    Attributes:
        steps: the steps of the longest sequence, with the active sequences of each, longest first. A sequence of length zero
            has no step.
        positions: of each row, (R,).
        order: of each sequence in the steps, which it is in the batch, (N,).
        places: of each sequence in the batch, which it is in the steps, (N,).
    """

    steps: Steps
    positions: Tensor
    order: Tensor
    places: Tensor

    @staticmethod
    def of(lengths: Tensor, length: int, batch_first: bool, device: torch.device) -> Ragged | None:
        """Find the rows; None where there is nothing to leave out, because every sequence has all T steps.

        Args: as of ``found``.
        """
        return None if bool((lengths == length).all()) else Ragged.found(lengths, length, batch_first, device)

    @staticmethod
    def found(lengths: Tensor, length: int, batch_first: bool, device: torch.device) -> Ragged:
        """Find the rows.

        Args:
            lengths: (N,) int64 on the CPU, from 0 to ``length``.
            length: T of the padded batch.
            batch_first: whether the batch has N before T.
            device: of the batch.
        """
        batch = len(lengths)
        # One step without a row where no sequence has any: the gradients of the weights are zero, not absent.
        longest = max(1, int(lengths.max())) if batch else 1
        order = lengths.argsort(descending=True, stable=True)
        batch_sizes = batch - torch.bincount(lengths, minlength=longest + 1).cumsum(0)[:longest]
        steps = Steps.packed(batch_sizes, batch)
        assert steps.offsets is not None
        # On the CPU by name: the default device may be another.
        t = torch.repeat_interleave(torch.arange(longest, device="cpu"), batch_sizes)
        n = order[torch.arange(len(t), device="cpu") - torch.repeat_interleave(steps.offsets, batch_sizes)]
        positions = n * length + t if batch_first else t * batch + n
        places = torch.empty_like(order).index_copy_(0, order, torch.arange(batch, device="cpu"))
        return Ragged(steps, positions.to(device), order.to(device), places.to(device))

    def gather(self, padded: Tensor) -> Tensor:
        """The rows, (R, ·), of a matrix of positions; the others get a gradient of zero."""
        return padded.index_select(0, self.positions)

    def scatter(self, rows: Tensor, count: int) -> Tensor:
        """The matrix of ``count`` positions that has these rows, and zero elsewhere."""
        padded = rows.new_zeros(count, rows.shape[1])
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            # vmap has no rule of its own for index_copy_, and warns of it.
            return padded.index_put_((self.positions,), rows)
        return padded.index_copy_(0, self.positions, rows)

    def sort(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states, (·, N, ·) each, in the order of the steps."""
        return tuple(state.index_select(1, self.order) for state in states)

    def unsort(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states in the order of the batch."""
        return tuple(state.index_select(1, self.places) for state in states)


def resets_by_direction(reset: Tensor, steps: Steps, directions: int) -> Tensor:
    """For each direction, the rows before which its walk has zero states.

    A reset at step t parts t - 1 from t. A walk from the first step to the last crosses there into t, one from the last to the
    first into t - 1: its rows are those one step earlier. A reset at the first step parts nothing on its way.

    Args:
        reset: (R,) bool, as the caller means it.

    Returns:
        D contiguous masks, (D, R) bool.
    """
    reset = reset.contiguous()
    if directions == 1:
        return reset.unsqueeze(0)
    if steps.batch_sizes is None:
        backwards = torch.cat((reset[steps.batch :], reset.new_zeros(min(steps.batch, len(reset)))))
    else:
        backwards = one_step_earlier(reset, steps.batch_sizes)
    return torch.stack((reset, backwards))


def one_step_earlier(reset: Tensor, batch_sizes: Tensor) -> Tensor:
    """Each row's flag, (R,), in the row of the same sequence one step earlier; none where there is no step after."""
    first = int(batch_sizes[0])
    # That row lies as many rows before as the earlier step has.
    earlier = torch.arange(first, len(reset), device="cpu") - torch.repeat_interleave(batch_sizes[:-1], batch_sizes[1:])
    return torch.zeros_like(reset).index_copy_(0, earlier.to(reset.device), reset[first:])
