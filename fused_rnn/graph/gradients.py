"""The gradients of a layer by the kernels, from what its autograd Functions keep and are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_rnn.data.steps import unwrapped as unwrapped_one
from fused_rnn.graph.batching import BackwardCall
from fused_rnn.kernels.protocol import Layer, LayerCall, OutputGradients


def unwrapped(operands: Sequence[Any]) -> list[Any]:
    """The tensors inside the wrappers of torch.func."""
    return [None if operand is None else unwrapped_one(operand) for operand in operands]


def gradients(
    layer: Layer,
    wanted: Sequence[bool],
    groups: int | None,
    reset: Tensor | None,
    out: Tensor,
    tape: Tensor | None,
    d_outputs: Sequence[Tensor | None],
    tensors: Sequence[Any],
) -> Sequence[Tensor | None]:
    """The gradients of ``tensors`` that are wanted, by the backend of the forward."""
    d_out, *d_states = d_outputs
    d_cells = d_states.pop() if layer.cell_states else None
    call = LayerCall.of(layer, tensors, reset)
    return layer.backend.backward(call, out, tape, OutputGradients(d_out, d_states, d_cells), wanted, groups)


def cut(call: BackwardCall, rest: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Cut the operands of ``_Backward`` after ``tape`` into the gradients of the results and the layer's tensors."""
    count = len(rest) - len(call.wanted)
    return rest[:count], rest[count:]
