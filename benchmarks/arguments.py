"""What the command lines of the benchmarks share: errors of one line, and numbers within bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the message as one line to standard error and exit with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind: type[int] | type[float], holds: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """Make a type for argparse: a finite number for which ``holds``, which is ``wanted`` in words."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not holds(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return convert


positive_seconds = number(float, lambda value: value > 0, "a number of seconds above 0")


def names(text: str) -> list[str]:
    """A type for argparse: names with commas between."""
    return [name for name in (part.strip() for part in text.split(",")) if name]
