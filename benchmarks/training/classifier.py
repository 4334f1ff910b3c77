"""Classify handwritten digits read pixel by pixel, with three ways to pool the recurrent layer's outputs, and compare.

    python -m benchmarks.training.classifier [--help]

The images are scikit-learn's bundled ones: 1,797 of 8 × 8 pixels, read as 64 steps of one grey level each. Source: UCI, Optical
Recognition of Handwritten Digits (Alpaydin & Kaynak 1998). Reading an image pixel by pixel: Le, Jaitly & Hinton 2015.

Exit codes: 0 done; 1 a loss was not finite, or the two trainings differ in quality; 2 a wrong option or no scikit-learn, said in
one line; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training.command import Parser, add_training, job_parser, number, parse_job, size
from benchmarks.training.job import guarded
from benchmarks.training.model import CELLS, recurrent
from benchmarks.training.report import Measure
from benchmarks.training.session import Session, Task

# (T, B, D·H) → features of the whole sequence.
POOLINGS: dict[str, tuple[str, bool, Callable[[Tensor], Tensor]]] = {
    "last": ("last state", False, lambda out: out[-1]),
    "mean": ("mean over time", False, lambda out: out.mean(0)),
    # Each direction has read everything at one end and one pixel at the other.
    "ends": ("both ends of both directions", True, lambda out: torch.cat((out[0], out[-1]), 1)),
}
