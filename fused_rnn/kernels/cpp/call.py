"""The contract's functions (``fused_rnn.kernels``) of any cell, as calls of ``fused_rnn._C``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import _C
from fused_rnn.kernels.cpp import has_rows
from fused_rnn.steps import Steps

# Up to so many rows, weights can be read as torch stores them: a dot product per unit. A step of one row then takes some 10 %
# longer, and half as long again where rows of the weights begin in the middle of a vector or are multiplied with two rows at
# once. Packing takes as long as some five steps: it pays from so many steps on.
_ROWS_WITHOUT_PACKING = 2
_STEPS_TO_PACK = 64
_STEPS_TO_PACK_UNALIGNED = 16
_VECTOR = 16


def _as_columns(steps: Steps, inner: int) -> bool:
    """Whether the forward reads weights of so many columns as they are."""
    one = steps.batch == 1 and inner % _VECTOR == 0
    return steps.batch <= _ROWS_WITHOUT_PACKING and steps.length < (_STEPS_TO_PACK if one else _STEPS_TO_PACK_UNALIGNED)


class Packed(NamedTuple):
    """The weights of a call, laid out for the kernels."""

    hh: _C.Packed
    hr: _C.Packed | None
    ih: _C.Packed | None


def kernels_of(cell: str) -> tuple[Callable[..., Packed], Callable[..., None], Callable[..., None]]:
    """Return ``<cell>_pack``, ``<cell>_forward`` and ``<cell>_backward``."""

    def pack(
        weight_hh: Sequence[Tensor],
        weight_hr: Sequence[Tensor] | None,
        steps: Steps,
        backward: bool,
        weight_ih: Sequence[Tensor] | None = None,
    ) -> Packed:
        as_columns = False
        if not backward and weight_ih is None:
            as_columns = steps.length == 1 or _as_columns(steps, weight_hh[0].shape[1])
        threads = torch.get_num_threads()

        def packed(weights: Sequence[Tensor] | None, product: str) -> Any:
            if weights is None:
                return None
            weights = [weight if has_rows(weight) else weight.contiguous() for weight in weights]
            return _C.Packed(cell, weights, backward, product, as_columns, threads)

        return Packed(packed(weight_hh, "hidden"), packed(weight_hr, "projection"), packed(weight_ih, "input"))

    def forward(
        tape: Tensor | None,
        out: Tensor,
        states: tuple[Tensor, ...],
        packed: Packed,
        bias: Tensor | None,
        steps: Steps,
        reverse: Sequence[bool],
        reset: Tensor | None,
        keep: bool,
        input: Tensor | None = None,
    ) -> None:
        if input is not None and not has_rows(input):
            input = input.contiguous()
        _C.forward(
            cell,
            input,
            tape,
            out,
            states,
            packed.ih,
            packed.hh,
            packed.hr,
            bias,
            steps.length,
            steps.batch,
            steps.batch_sizes,
            steps.offsets,
            reverse,
            reset,
            keep,
            torch.get_num_threads(),
        )

    def backward(
        d_gates: Tensor,
        d_states: tuple[Tensor, ...],
        d_out: Tensor | None,
        d_cells: Tensor | None,
        tape: Tensor,
        out: Tensor,
        states_0: tuple[Tensor, ...],
        packed: Packed,
        steps: Steps,
        t_begin: int,
        t_end: int,
        reverse: Sequence[bool],
        reset: Tensor | None,
        d_input: Tensor | None = None,
    ) -> None:
        _C.backward(
            cell,
            d_gates,
            d_states,
            d_out,
            d_cells,
            tape,
            out,
            states_0,
            packed.ih,
            packed.hh,
            packed.hr,
            steps.length,
            steps.batch,
            steps.batch_sizes,
            steps.offsets,
            t_begin,
            t_end,
            reverse,
            reset,
            d_input,
            torch.get_num_threads(),
        )

    return pack, forward, backward
