"""Which way a layer with int8 weights goes: to the kernels, or to an operator where torch traces the call.

There are no gradients. Legend as in ``fused_rnn.kernels.protocol``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from fused_rnn.cells import named
from fused_rnn.data.cell import Cell
from fused_rnn.data.steps import Steps
from fused_rnn.graph import autocast, onnx_export, operators
from fused_rnn.graph.autograd import Outputs
from fused_rnn.graph.derivatives import transformed
from fused_rnn.kernels import dispatch
from fused_rnn.kernels.protocol import Int8Backend, Int8Call, Int8Weights, Layer, States

NO_GRADIENTS = (
    "fused_rnn: int8 modules have no gradients. Call them under torch.no_grad() or torch.inference_mode(), and train the model "
    "before fused_rnn.quantize_dynamic"
)

# Of the weights, that which every recurrence has; the biases are there for all or for none.
_ALWAYS = len(Int8Weights._fields) - 2

operators.library.define(
    "int8_forward(str cell, Tensor input, Tensor[] states, int hidden, Tensor[] weights, Tensor? batch_sizes, Tensor? reset, "
    "int[] reverse, bool cell_states) -> Tensor[]"
)


def layer(
    cell: Cell,
    hidden: int,
    weights: Sequence[Int8Weights],
    reverse: tuple[bool, ...],
    input: Tensor,
    steps: Steps,
    states: States | None,
    reset: Tensor | None = None,
    cell_states: bool = False,
    step: bool = False,
    batch_first: bool = False,
) -> Outputs:
    """Compute one layer.

    Args:
        hidden: H.
        cell, weights, reverse, input, steps, states, reset, cell_states, step: as in ``fused_rnn.kernels.protocol.Int8Call``.
        batch_first: as in ``fused_rnn.kernels.protocol.Backend.forward``, outside of a trace.

    Returns:
        out, the states after the walk, and c of every step or None, as in ``fused_rnn.kernels.protocol.LayerResult``.

    Raises:
        RuntimeError: if another backend than C++ was asked for, or it cannot run here; in a trace, if a gradient is asked for.
            Outside of one, that raises when the gradient is computed.
        NotImplementedError: within a transform of torch.func.
    """
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, *(states or ())))
    if operators.traced(input, input) or input.is_meta:
        if recorded:
            raise RuntimeError(NO_GRADIENTS)
        return _operator(cell, hidden, weights, reverse, input, steps, states, reset, cell_states, step)
    if transformed():
        raise NotImplementedError("fused_rnn: int8 modules have no torch.func transforms (vmap, grad, jvp)")
    call = Int8Call(
        Layer(cell, _backend(input.device), steps, reverse, cell_states, step), input, states, hidden, weights, reset
    )
    out, ends, cells, _ = call.layer.backend.int8_forward(call, batch_first)  # type: ignore[attr-defined]
    if recorded:
        into = (input, *(states or ()))
        out, *rest = _Refuses.apply(len(into), *into, out, *ends, *(() if cells is None else (cells,)))  # type: ignore[no-untyped-call]
        cells = rest.pop() if cell_states else None
        ends = tuple(rest)
    return out, ends, cells


class _Refuses(torch.autograd.Function):
    """Results that look as if they had a gradient, and say that they have none to whoever asks for it."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[count:]

    @staticmethod
    def backward(ctx: Any, *d_results: Any) -> NoReturn:
        raise RuntimeError(NO_GRADIENTS)


def _backend(device: torch.device) -> Int8Backend:
    backend = dispatch.choose(device)
    if not hasattr(backend, "int8_forward"):
        raise RuntimeError(
            f"fused_rnn: the {backend.name} backend, which runs here, does not compute with int8 weights; cpp does, "
            f"on the CPU: {dispatch.backends()['cpp'].detail}"
        )
    return cast(Int8Backend, backend)


def _operator(
    cell: Cell,
    hidden: int,
    weights: Sequence[Int8Weights],
    reverse: tuple[bool, ...],
    input: Tensor,
    steps: Steps,
    states: States | None,
    reset: Tensor | None,
    cell_states: bool,
    step: bool,
) -> Outputs:
    """As ``layer``, by way of the operator; of ``steps``, only ``batch_sizes`` and the batch are read."""
    if onnx_export.wanted():
        raise NotImplementedError("ONNX has no recurrent operator with int8 weights: export the float model")
    leading = input.shape[:-1]
    rows = input.reshape(-1, input.shape[-1]) if len(leading) > 1 else input
    if states is None:
        states = tuple([input.new_zeros((len(reverse), steps.batch, hidden)) for _ in cell.states])
    elif step:
        states = tuple([state.unsqueeze(0) for state in states])
    outputs = torch.ops.fused_rnn.int8_forward(
        cell.name,
        rows.detach(),
        [state.detach() for state in states],
        hidden,
        [tensor for one in weights for tensor in one if tensor is not None],
        steps.batch_sizes,
        reset,
        [int(backwards) for backwards in reverse],
        cell_states,
    )
    return operators.shaped(outputs, len(cell.states), leading, cell_states, step)


@autocast.without
def _forward(
    cell_name: str,
    input: Tensor,
    states: list[Tensor],
    hidden: int,
    tensors: list[Tensor],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: list[int],
    cell_states: bool,
) -> list[Tensor]:
    """Run the forward. Returns [out, the states after the walk, c of every step if asked for]."""
    if input.shape[0] == 0:
        out, *_, cells = _forward_fake(cell_name, input, states, hidden, tensors, reverse, True)
        return [out, *(state.clone() for state in states), *((cells,) if cell_states else ())]
    each = len(tensors) // len(reverse)
    found: list[list[Tensor | None]] = [list(tensors[i : i + each]) for i in range(0, len(tensors), each)]
    weights = [Int8Weights(*one[:_ALWAYS], *(one[_ALWAYS:] or (None, None))) for one in found]  # type: ignore[arg-type]
    described = Layer(
        named(cell_name),
        _backend(input.device),
        operators.steps_of(input, states, batch_sizes),
        tuple(map(bool, reverse)),
        cell_states,
    )
    call = Int8Call(described, input, tuple(states), hidden, weights, reset)
    out, ends, cells, _ = described.backend.int8_forward(call)  # type: ignore[attr-defined]
    return [out, *ends, *(() if cells is None else (cells,))]


def _forward_fake(
    cell_name: str, input: Tensor, states: list[Tensor], hidden: int, tensors: list[Tensor], *rest: Any
) -> list[Tensor]:
    *_, reverse, cell_states = rest
    out = input.new_empty((input.shape[0], len(reverse) * hidden))
    return [out, *(state.new_empty(state.shape) for state in states), *((torch.empty_like(out),) if cell_states else ())]


operators.library.impl("int8_forward", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rnn::int8_forward", _forward_fake, lib=operators.library)
