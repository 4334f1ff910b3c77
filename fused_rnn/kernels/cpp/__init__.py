"""The C++ backend: ``fused_rnn._C``, one source compiled for several instruction sets, the best one picked at import.

``FUSED_RNN_ISA`` (``avx512``, ``avx2`` or ``baseline``) forces one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn import kernels
from fused_rnn.cells import Weights
from fused_rnn.steps import Steps

_missing: str | None = None
try:
    from fused_rnn import _C
except ImportError as error:
    _missing = (
        f"the extension fused_rnn._C is not built or does not load ({error}); "
        "install a C++17 compiler and run: pip install --force-reinstall --no-deps fused_rnn"
    )

_ENVIRONMENT = "FUSED_RNN_ISA"


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here.

    Raises:
        ValueError: if ``FUSED_RNN_ISA`` asks for an instruction set that cannot be had.
    """
    if _missing is not None:
        return _missing
    wanted = os.environ.get(_ENVIRONMENT)
    if wanted:
        if wanted not in _C.isas():
            raise ValueError(
                f"{_ENVIRONMENT}={wanted}: expected one that this build and this machine have: {', '.join(_C.isas())}"
            )
        _C.set_isa(wanted)
    return None


def describe() -> str:
    """The instruction set in use and the others that could be."""
    others = [name for name in _C.isas() if name != _C.isa()]
    return f"{_C.isa()}" + (f" (also built: {', '.join(others)})" if others else "")


# The kernels form the products with the input's weights for several steps at once, from as many rows in all as make up for
# laying these weights out: from so many on, or from so many if both weights stay in the caches.
_ROWS_FOR_INPUT = 256
_ROWS_FOR_SMALL_INPUT = 64
_SMALL_BYTES = 2 << 20


def takes_input(steps: Steps, weight: Weights) -> bool:
    """Whether the kernels do the input's products themselves; see ``fused_rnn.kernels``."""
    if steps.length == 1:
        return False
    rows = steps.rows(0, steps.length).stop
    small = weight.ih.nbytes + weight.hh.nbytes <= _SMALL_BYTES
    return bool(rows >= (_ROWS_FOR_SMALL_INPUT if small else _ROWS_FOR_INPUT))


# Each thread copies all of the inputs, for its share of d_weight's rows. With so many times as many rows as columns the copies
# pay. Below so many multiplications, what torch's product does before it multiplies takes longer than they do.
_ROWS_PER_COLUMN = 1
_FEW_MULTIPLICATIONS = 1 << 18


def _is_faster(rows: int, outputs: int, columns: int) -> bool:
    """Whether the extension sums a weight's gradient, (outputs, columns), over so many rows sooner than torch."""
    return outputs >= _ROWS_PER_COLUMN * columns or rows * outputs * columns <= _FEW_MULTIPLICATIONS


def weight_gradient(
    d_gates: Tensor, inputs: Sequence[Tensor], d_weight: Tensor | None, d_bias: Tensor | None, add: bool
) -> None:
    """Sum a weight's gradient over the rows of many steps; see ``fused_rnn.kernels``."""
    if d_weight is None or not _is_faster(d_gates.shape[0], *d_weight.shape):
        kernels.weight_gradient(d_gates, inputs, d_weight, d_bias, add)
        return
    parts = [part if has_rows(part) else part.contiguous() for part in inputs]
    _C.weight_gradient(d_gates, parts, d_weight, d_bias, add, torch.get_num_threads())


# So few rows are bound by reading the weights, which the extension does with all threads and without packing.
_FEW_ROWS = 4


def has_rows(matrix: Tensor) -> bool:
    """Whether the extension can read a matrix as it is: contiguous columns, and rows that do not overlap (expanded ones do)."""
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def project(input: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write input · weightᵀ to ``out``; see ``fused_rnn.kernels``."""
    if input.shape[0] > _FEW_ROWS or not has_rows(weight):
        kernels.project(input, weight, out)
    else:
        _C.project(input if has_rows(input) else input.contiguous(), weight, out, torch.get_num_threads())


def step(
    cell: str, input: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor | None], batch_first: bool
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Take one step of a few rows; see ``fused_rnn.kernels``."""
    return _C.step(cell, input, states, weights, batch_first, torch.get_num_threads())


def layer_forward(
    cell: str, input: Tensor, states: tuple[Tensor, ...] | None, weights: Sequence[Tensor | None], keep: bool
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None] | None:
    """Run a layer; see ``fused_rnn.kernels``."""
    return _C.layer_forward(cell, input, states, weights, keep, torch.get_num_threads())


def layer_backward(
    cell: str,
    input: Tensor,
    states: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor | None],
    out: Tensor,
    tape: Tensor | None,
    d_out: Tensor | None,
    d_states: Sequence[Tensor | None],
    input_wanted: bool,
    states_wanted: bool,
    weights_wanted: bool,
) -> tuple[Tensor | None, ...] | None:
    """The gradients of a layer; see ``fused_rnn.kernels``."""
    wanted = (input_wanted, states_wanted, weights_wanted)
    return _C.layer_backward(cell, input, states, weights, out, tape, d_out, d_states, *wanted, torch.get_num_threads())
