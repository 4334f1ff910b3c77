"""The yardstick of the language model: an order-2 Markov model, also known as a character trigram."""

from __future__ import annotations

import torch
from torch import Tensor


class Trigram:
    """Predict a symbol from the two before it, by smoothed counts.

    Witten-Bell smoothing: a context seen n times with k different successors gives the share k / (n + k) to the
    prediction from the context one symbol shorter, and so on down to the uniform distribution. It has no parameter to tune
    and gives every symbol a probability above zero.

    Source: Witten & Bell 1991, method C; in the recursive form of Chen & Goodman 1998, section 2.5.

    Args:
        symbols: the text to fit, (characters,) int64 in [0, size).
        size: the number of symbols.
    """

    def __init__(self, symbols: Tensor, size: int) -> None:
        if not 0 < size < 2_000_000:
            raise ValueError(f"size: expected 1 to 1,999,999 symbols (three of them must fit an int64), got {size}")
        self.size = size
        self._orders = [_Counts(symbols, order, size) for order in range(3)]

    def log_probability(self, symbols: Tensor) -> Tensor:
        """Return the log-probability of each symbol but the first, given up to two before it.

        Args:
            symbols: (characters,) int64.

        Returns:
            (characters - 1,) float64, in nats.
        """
        probability = torch.full((len(symbols),), 1.0 / self.size, dtype=torch.float64)
        for order, counts in enumerate(self._orders):
            # The first `order` symbols have too short a context: they keep the prediction of the order below.
            probability[order:] = counts.mix(symbols, probability[order:])
        return probability[1:].log()


class _Counts:
    """How often each symbol follows each context of one length."""

    def __init__(self, symbols: Tensor, order: int, size: int) -> None:
        self._order, self._size = order, size
        self._keys, self._counts = torch.unique(self._windows(symbols), return_counts=True)
        # Keys are sorted, and a key divided by the alphabet's size is its context: contexts are sorted too.
        self._contexts, successors = torch.unique_consecutive(self._keys // size, return_counts=True)
        where = torch.searchsorted(self._contexts, self._keys // size)
        totals = torch.zeros(len(self._contexts), dtype=torch.int64).index_add_(0, where, self._counts)
        self._totals, self._successors = totals, successors

    def _windows(self, symbols: Tensor) -> Tensor:
        """Number every window of order + 1 symbols in base `size`, the context in the high digits."""
        length = max(len(symbols) - self._order, 0)
        keys = torch.zeros(length, dtype=torch.int64)
        for position in range(self._order + 1):
            keys = keys * self._size + symbols[position : position + length]
        return keys

    def mix(self, symbols: Tensor, shorter: Tensor) -> Tensor:
        """Mix the share of each symbol after its context with the prediction `shorter` from a shorter context."""
        keys = self._windows(symbols)
        count = _look_up(self._keys, self._counts, keys)
        total = _look_up(self._contexts, self._totals, keys // self._size)
        successors = _look_up(self._contexts, self._successors, keys // self._size)
        # A context that was never seen has no say: the shorter one speaks alone.
        return torch.where(total == 0, shorter, (count + successors * shorter) / (total + successors).clamp(min=1))


def _look_up(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Return the value of each wanted key, 0 where it is missing, as float64."""
    if not len(keys):
        return torch.zeros(len(wanted), dtype=torch.float64)
    where = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[where] == wanted, values[where], 0).double()
