"""Lengths and resets: which rows of a padded batch the steps work on, and where the states start anew.

Legend as in ``fused_rnn.functional``. A padded batch is seen as a matrix of its positions: (T·N, I), or (N·T, I) with
``batch_first``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fused_rnn.data import torch_private
from fused_rnn.data.steps import Steps, mapped, unwrapped

# The kernels walk one set of steps.
MAPPED_LENGTHS = "lengths: expected the same for all members of torch.func.vmap, got lengths that are mapped over"


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
    def of(lengths: np.ndarray, length: int, batch_first: bool, device: torch.device) -> Ragged | None:
        """Find the rows; None where there is nothing to leave out, because every sequence has all T steps.

        Args: as of ``found``.
        """
        return None if (lengths == length).all() else Ragged.found(lengths, length, batch_first, device)

    @staticmethod
    def found(lengths: np.ndarray, length: int, batch_first: bool, device: torch.device) -> Ragged:
        """Find the rows, by NumPy, whose functions take a third of the time that torch's take for so few numbers.

        Args:
            lengths: (N,) int64, from 0 to ``length``.
            length: T of the padded batch.
            batch_first: whether the batch has N before T.
            device: of the batch.
        """
        batch = len(lengths)
        # One step without a row where no sequence has any: the gradients of the weights are zero, not absent.
        longest = max(1, int(lengths.max())) if batch else 1
        order = np.argsort(-lengths, kind="stable")
        batch_sizes = batch - np.bincount(lengths, minlength=longest + 1).cumsum()[:longest]
        ends = batch_sizes.cumsum()
        offsets = ends - batch_sizes
        t = np.repeat(np.arange(longest), batch_sizes)
        n = order[np.arange(ends[-1]) - offsets[t]]
        places = np.empty_like(order)
        places[order] = np.arange(batch)
        positions = n * length + t if batch_first else t * batch + n
        # A transform of torch.func would wrap what is made inside of it.
        with torch_private.WithoutTransforms():
            steps = Steps(longest, batch, torch.from_numpy(batch_sizes), torch.from_numpy(offsets))
            return Ragged(steps, *[torch.from_numpy(each).to(device) for each in (positions, order, places)])

    def gather(self, padded: Tensor) -> Tensor:
        """The rows, (R, ·), of a matrix of positions; the others get a gradient of zero."""
        return padded.index_select(0, self.positions)

    def scatter(self, rows: Tensor, count: int) -> Tensor:
        """The matrix of ``count`` positions that has these rows, and zero elsewhere."""
        padded = rows.new_zeros(count, rows.shape[1])
        if not torch.compiler.is_compiling() and torch_private.transforms_active():
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


def check_length_values(lengths: Tensor, length: int) -> np.ndarray:
    """Bring ``lengths``, (N,), to the host and check their values.

    Returns:
        (N,) int64.

    Raises:
        ValueError: if a value is not one of 0 .. T.
    """
    # What the steps are made of is read on the host: the one wait for the device that lengths need. A list, because memory
    # that NumPy shares with a tensor can never be resized.
    values = unwrapped(lengths.detach()).tolist()
    if values and not 0 <= min(values) <= max(values) <= length:
        wrong = next(value for value in values if not 0 <= value <= length)
        raise ValueError(f"lengths: expected values from 0 to {length}, the steps of the input, got {wrong}")
    return np.array(values, dtype=np.int64)


def check_batch_sizes_shape(batch_sizes: Tensor) -> None:
    """Raise RuntimeError unless ``batch_sizes`` have the shape, dtype and device of a PackedSequence's."""
    if mapped(batch_sizes):
        raise RuntimeError(
            "vmap cannot map over the batch_sizes of a PackedSequence: all members share one set of lengths. Map over the data "
            "alone and make PackedSequence(data, batch_sizes) inside, with batch_sizes from outside the mapped function"
        )
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            f"batch_sizes should be a 1D int64 tensor on the CPU, got {tuple(batch_sizes.shape)}, "
            f"{batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.numel() == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """Raise RuntimeError unless ``batch_sizes`` are those of a PackedSequence with so many rows."""
    check_batch_sizes_shape(batch_sizes)
    if int(batch_sizes[-1]) < 0 or bool((batch_sizes[1:] > batch_sizes[:-1]).any()):
        raise RuntimeError("batch_sizes should be in decreasing order and not negative")
    if int(batch_sizes.sum()) != rows:
        raise RuntimeError(f"batch_sizes add up to {int(batch_sizes.sum())} rows, but the packed data has {rows}")


def check_packed_alike(sizes: Tensor, order: Tensor | None, input_sizes: Tensor, input_order: Tensor | None) -> None:
    """Raise ValueError unless a mask of resets, given by its batch_sizes and sorted_indices, is packed as the input is."""
    if not torch.equal(sizes, input_sizes):
        raise ValueError(f"reset: expected the batch_sizes of the input, {input_sizes.tolist()}, got {sizes.tolist()}")
    found, expected = (
        torch.arange(int(input_sizes[0]), device="cpu") if indices is None else indices.cpu()
        for indices in (order, input_order)
    )
    if not torch.equal(found, expected):
        raise ValueError(f"reset: expected the sorted_indices of the input, {expected.tolist()}, got {found.tolist()}")
