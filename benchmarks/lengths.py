"""How long sequences are in a ragged batch: a distribution met in the wild, not a uniform one."""

from __future__ import annotations

import functools
import random

# Words per sentence in the docstrings of the standard library of Python 3.11 (23,403 sentences, mean 12.2): 32 quantiles,
# at 1/64, 3/64, ... A line of words that ends a paragraph counts as a sentence.
# fmt: off
WORDS = (
    2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 14, 15, 16, 17, 18, 20, 22, 24, 29, 39,
)
# fmt: on


@functools.cache
def lengths(B: int, T: int) -> tuple[int, ...]:
    """Lengths of B sequences, longest first; the longest has T steps.

    They are the quantiles of ``WORDS`` stretched to T: evenly spread where B is below their number, else drawn with a fixed
    seed after every one was taken as often as it fits.
    """
    count = len(WORDS)
    if count > B:
        taken = [WORDS[round((i + 0.5) * count / B - 0.5)] for i in range(B)]
    else:
        taken = list(WORDS) * (B // count)
        taken += random.Random(0).sample(WORDS, B - len(taken))
    longest = max(taken)
    return tuple(sorted((max(1, round(T * words / longest)) for words in taken), reverse=True))
