"""A layer as torch.onnx.export is to see it: in the words that torch's own exporters translate.

The exporter of traces (``dynamo=False``) translates torch's recurrent operators, and gets those. The one of exported programs
(``dynamo=True``) takes ONNX's operators as they stand (torch.onnx.ops.symbolic_multi_out): its translations of torch's freeze
the number of steps. Nothing here imports the packages of ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.cells import GRU, GRU_RESET_BEFORE, LSTM, LSTM_COUPLED, RNN_RELU, RNN_TANH
from fused_rnn.data import torch_private
from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.protocol import States

# The operator, its order of gates (torch's first letter: ONNX calls g "c", and n "h"), and its attributes.
OPERATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    LSTM.name: ("LSTM", "iofg", {}),
    # The operator has rows for f all the same, and reads none of them.
    LSTM_COUPLED.name: ("LSTM", "iofg", {"input_forget": 1}),
    # As torch and cuDNN: the reset gate is applied after the product with W_hn.
    GRU.name: ("GRU", "zrn", {"linear_before_reset": 1}),
    GRU_RESET_BEFORE.name: ("GRU", "zrn", {"linear_before_reset": 0}),
    RNN_TANH.name: ("RNN", "h", {"activations": ["Tanh"]}),
    RNN_RELU.name: ("RNN", "h", {"activations": ["Relu"]}),
}
DIRECTIONS = {(0,): "forward", (1,): "reverse", (0, 1): "bidirectional"}
_OF_TORCH: dict[str, Any] = {
    LSTM.name: torch.lstm,
    GRU.name: torch.gru,
    RNN_TANH.name: torch.rnn_tanh,
    RNN_RELU.name: torch.rnn_relu,
}
# As torch.onnx.export writes it unless asked for another; what these operators mean has not changed since 14.
_OPSET = 18

PACKED = (
    "a PackedSequence cannot be exported to ONNX by dynamo=True: give the model a padded batch, or export with dynamo=False"
)
LENGTHS = "lengths cannot be exported to ONNX: export a model without them"


def refuse(cell: Cell, projected: bool, reset: bool, cell_states: bool) -> None:
    """Raise NotImplementedError for what no ONNX operator computes."""
    if projected:
        raise NotImplementedError("no ONNX operator computes an LSTM with projections: export a model with proj_size=0")
    if reset:
        raise NotImplementedError(
            "no ONNX operator resets the state in the middle of a sequence: export a model without resets"
        )
    if cell_states:
        raise NotImplementedError("no ONNX operator gives c of every step: export a model without return_cell_states")
    if cell.name not in OPERATORS:
        raise NotImplementedError(f"no ONNX operator computes the cell {cell.name!r}")


def order_of(cell: Cell, gates: str) -> list[int | None]:
    """The blocks of torch's weights in ONNX's order of gates; None for a gate that the cell has not."""
    return [cell.gates.index(gate) if gate in cell.gates else None for gate in gates]


def wanted() -> bool:
    """Whether torch.onnx.export is looking at this call, and ``layer`` has the words for it."""
    # Before torch 2.8, fused_rnn.onnx translates the operator instead.
    if not torch.onnx.is_in_onnx_export():
        return False
    return torch_private.jit_tracing() or (hasattr(torch.onnx, "ops") and hasattr(torch.onnx.ops, "symbolic_multi_out"))


# Dynamo takes torch's own question for one whose answer is no. This is torch.compiler.assume_constant_result without the import
# of Dynamo, which takes seconds.
wanted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def layer(
    cell: Cell,
    rows: Tensor,
    steps: Steps,
    states: States,
    weights: Sequence[Weights],
    reverse: Sequence[int],
    reset: Tensor | None,
    cell_states: bool,
) -> list[Tensor]:
    """Run a layer by operators that torch.onnx.export translates.

    Args:
        rows: (T, N, I), or of a PackedSequence (R, I).
        states: (D, N, ·) each.

    Returns:
        [out, in the shape of ``rows``, the states after the walk].

    Raises:
        NotImplementedError: for what no ONNX operator computes.
    """
    refuse(cell, weights[0].hr is not None, reset is not None, cell_states)
    if tuple(reverse) not in DIRECTIONS:
        return _of_heads(cell, rows, steps, states, weights, reverse)
    if torch.jit._trace.is_tracing():  # type: ignore[no-untyped-call]
        return _of_torch(cell, rows, steps, states, weights)
    if steps.batch_sizes is not None:
        raise NotImplementedError(PACKED)
    return _of_onnx(cell, rows, states, weights, reverse)


def _of_heads(
    cell: Cell, rows: Tensor, steps: Steps, states: States, weights: Sequence[Weights], reverse: Sequence[int]
) -> list[Tensor]:
    """Several recurrences a direction, the forward ones first: an operator for each of them, or each pair."""
    heads = list(reverse).count(False)
    outs: list[list[Tensor]] = []
    ends: list[list[Tensor]] = []
    for head in range(heads):
        mine = slice(head, None, heads)
        given = tuple([state[mine] for state in states])
        out, *end = layer(cell, rows, steps, given, weights[mine], reverse[mine], None, False)
        outs.append(list(out.chunk(len(weights) // heads, -1)))
        ends.append(end)
    # (D, heads, …): all heads of a direction follow each other.
    out = torch.cat([part for direction in zip(*outs, strict=True) for part in direction], -1)
    return [out, *(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*ends, strict=True))]


def _of_torch(cell: Cell, rows: Tensor, steps: Steps, states: States, weights: Sequence[Weights]) -> list[Tensor]:
    if cell.name not in _OF_TORCH:
        raise NotImplementedError(f"torch.onnx.export(dynamo=False) has no words for the cell {cell.name!r}: use dynamo=True")
    has_bias = any(weight.bias_ih is not None for weight in weights)
    flat = [tensor for weight in weights for tensor in weight if tensor is not None]
    hx: Any = states if len(states) > 1 else states[0]
    packed = () if steps.batch_sizes is None else (steps.batch_sizes,)
    options: list[Any] = [has_bias, 1, 0.0, False, len(weights) > 1]
    if steps.batch_sizes is None:
        options.append(False)
    return list(_OF_TORCH[cell.name](rows, *packed, hx, flat, *options))


def _of_onnx(cell: Cell, rows: Tensor, states: States, weights: Sequence[Weights], reverse: Sequence[int]) -> list[Tensor]:
    name, gates, attributes = OPERATORS[cell.name]
    order = order_of(cell, gates)
    hidden, directions = weights[0].hh.shape[1], len(weights)

    def reordered(tensor: Tensor) -> Tensor:
        if len(order) == 1:
            return tensor
        unread = tensor.new_zeros(hidden, *tensor.shape[1:])
        return torch.cat([unread if i is None else tensor[i * hidden : (i + 1) * hidden] for i in order])

    def biases(weight: Weights) -> Tensor:
        zero = rows.new_zeros(len(order) * hidden)
        return torch.cat([zero if bias is None else reordered(bias) for bias in (weight.bias_ih, weight.bias_hh)])

    has_bias = any(weight.bias_ih is not None or weight.bias_hh is not None for weight in weights)
    length, batch = rows.shape[:2]
    described = {"direction": DIRECTIONS[tuple(int(each) for each in reverse)], "hidden_size": hidden, **attributes}
    if "activations" in described:
        described["activations"] = described["activations"] * directions
    results = torch.onnx.ops.symbolic_multi_out(
        name,
        [
            rows,
            torch.stack([reordered(weight.ih) for weight in weights]),
            torch.stack([reordered(weight.hh) for weight in weights]),
            torch.stack([biases(weight) for weight in weights]) if has_bias else None,
            None,
            *states,
        ],
        described,
        dtypes=[rows.dtype] * (1 + len(states)),
        shapes=[(length, directions, batch, hidden), *(tuple(state.shape) for state in states)],
        version=_OPSET,
    )
    # torch makes what stands for the results on the CPU, wherever the model is.
    out, *ends = (result.to(rows.device) for result in results)
    # (T, D, N, H) → (T, N, D·H).
    return [out.transpose(1, 2).reshape(length, batch, directions * hidden), *ends]
