"""Export to ONNX: each layer becomes one standard ONNX ``LSTM``, ``GRU`` or ``RNN``, which every runtime knows.

Needs the package ``onnxscript``, which torch.onnx.export itself asks for.

>>> import fused_rnn
>>> model, example = fused_rnn.LSTM(3, 4).eval(), (torch.randn(5, 2, 3),)
>>> sizes = ({0: torch.export.Dim("T"), 1: torch.export.Dim("N")},)
>>> fused_rnn.onnx.export(model, example, "model.onnx", dynamic_shapes=sizes)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_rnn.cells import CELLS, GRU, GRU_RESET_BEFORE, LSTM, RNN_RELU, RNN_TANH
from fused_rnn.data.cell import Weights
from fused_rnn.graph.operators import spread

__all__ = ["export", "translation_table"]

# The operator, its order of gates (torch's first letter: ONNX calls g "c", and n "h"), and its attributes.
_OPERATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    LSTM.name: ("LSTM", "iofg", {}),
    # As torch and cuDNN: the reset gate is applied after the product with W_hn.
    GRU.name: ("GRU", "zrn", {"linear_before_reset": 1}),
    GRU_RESET_BEFORE.name: ("GRU", "zrn", {"linear_before_reset": 0}),
    RNN_TANH.name: ("RNN", "h", {"activations": ["Tanh"]}),
    RNN_RELU.name: ("RNN", "h", {"activations": ["Relu"]}),
}
_DIRECTIONS = {(0,): "forward", (1,): "reverse", (0, 1): "bidirectional"}


def export(model: torch.nn.Module, args: tuple[Any, ...], f: Any = None, **options: Any) -> Any:
    """Export a model with modules of fused_rnn in it to ONNX.

    Args:
        model: as it is to be served; call ``model.eval()`` before, or dropout is exported too.
        args: example inputs. T and N are fixed to theirs but for what ``dynamic_shapes`` says.
        f: the path of the file to write, or None to write none.
        options: those of torch.onnx.export. A ``custom_translation_table`` is added to that of fused_rnn.

    Returns:
        The torch.onnx.ONNXProgram.

    Raises:
        NotImplementedError: for what no ONNX operator computes: other cells than torch.nn's, projections (``proj_size``),
            packed sequences, lengths, resets.
        ValueError: if ``dynamo=False`` is asked for.
        ImportError: if ``onnxscript`` is not installed.

    Source: torch.onnx.export.
    """
    if not options.pop("dynamo", True):
        raise ValueError("dynamo: expected True, got False: the older exporter of torch knows nothing of fused_rnn's operators")
    table = {**translation_table(), **(options.pop("custom_translation_table", None) or {})}
    try:
        return torch.onnx.export(model, args, f, dynamo=True, custom_translation_table=table, **options)
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, NotImplementedError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise NotImplementedError(*cause.args) from error


def translation_table() -> dict[Any, Callable[..., Any]]:
    """What torch.onnx.export needs as ``custom_translation_table`` to export modules of fused_rnn.

    >>> table = translation_table()
    >>> torch.onnx.export(model, args, "model.onnx", dynamo=True, custom_translation_table=table)  # doctest: +SKIP

    Raises:
        ImportError: if ``onnxscript`` is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export to ONNX needs the package onnxscript: pip install onnxscript") from error
    return {
        torch.ops.fused_rnn.layer_forward.default: _layer,
        torch.ops.fused_rnn.check_batch_sizes.default: _refuse_packed,
        torch.ops.fused_rnn.ragged.default: _refuse_lengths,
    }


def _refuse_packed(batch_sizes: Any, rows: Any, batch: Any) -> Any:
    raise NotImplementedError("a PackedSequence cannot be exported to ONNX: give the model a padded batch")


def _refuse_lengths(lengths: Any, padded: Any, batch_first: Any) -> Any:
    raise NotImplementedError("lengths cannot be exported to ONNX: export a model without them")


def _layer(
    cell_name: str,
    input: Any,
    states: Sequence[Any],
    tensors: Sequence[Any],
    present: Sequence[int],
    batch_sizes: Any,
    reset: Any,
    reverse: Sequence[int],
    keep: bool,
    cell_states: bool,
) -> tuple[Any, ...]:
    """Translate ``fused_rnn::layer_forward``; values of onnxscript stand for the tensors."""
    from onnxscript import opset18

    op: Any = opset18
    cell = CELLS[cell_name]
    flat: list[Any] = spread(tensors, present)
    each = len(Weights._fields)
    weights = [Weights(*flat[first : first + each]) for first in range(0, len(flat), each)]
    if any(weight.hr is not None for weight in weights):
        raise NotImplementedError("no ONNX operator computes an LSTM with projections: export a model with proj_size=0")
    if batch_sizes is not None:
        _refuse_packed(batch_sizes, None, None)
    if reset is not None:
        raise NotImplementedError(
            "no ONNX operator resets the state in the middle of a sequence: export a model without resets"
        )
    if cell_states:
        raise NotImplementedError("no ONNX operator gives c of every step: export a model without return_cell_states")
    if cell_name not in _OPERATORS:
        raise NotImplementedError(f"no ONNX operator computes the cell {cell_name!r}")
    name, gates, attributes = _OPERATORS[cell_name]
    order = [cell.gates.index(gate) for gate in gates]
    hidden = weights[0].hh.shape[1]

    def reordered(tensor: Any) -> Any:
        if len(order) == 1:
            return tensor
        # Not Split, whose results the exporter does not compute at export.
        bounds = [op.Constant(value_ints=[i * hidden]) for i in range(len(order) + 1)]
        return op.Concat(*(op.Slice(tensor, bounds[i], bounds[i + 1]) for i in order), axis=0)

    def stacked(tensors: Sequence[Any]) -> Any:
        """A tensor of each direction, along a new first dimension."""
        axes = op.Constant(value_ints=[0])
        return op.Concat(*(op.Unsqueeze(tensor, axes) for tensor in tensors), axis=0)

    def biases(weight: Weights) -> Any:
        zero = op.CastLike(op.Constant(value_floats=[0.0] * len(order) * hidden), input)
        return op.Concat(*(zero if bias is None else reordered(bias) for bias in (weight.bias_ih, weight.bias_hh)), axis=0)

    has_bias = any(weight.bias_ih is not None or weight.bias_hh is not None for weight in weights)
    batch = op.Shape(states[0], start=1, end=2)
    features = op.Constant(value_ints=[int(weights[0].ih.shape[1])])
    sequence = op.Reshape(input, op.Concat(op.Constant(value_ints=[-1]), batch, features, axis=0))
    if "activations" in attributes:
        attributes = {"activations": attributes["activations"] * len(weights)}
    results = getattr(op, name)(
        sequence,
        stacked([reordered(weight.ih) for weight in weights]),
        stacked([reordered(weight.hh) for weight in weights]),
        stacked([biases(weight) for weight in weights]) if has_bias else None,
        None,
        *states,
        direction=_DIRECTIONS[tuple(reverse)],
        hidden_size=hidden,
        **attributes,
    )
    # (T, D, N, H) → rows (T·N, D·H).
    columns = op.Constant(value_ints=[-1, len(weights) * hidden])
    out = op.Reshape(op.Transpose(results[0], perm=[0, 2, 1, 3]), columns)
    # In place of the tape, which nothing reads.
    zero = op.Constant(value_ints=[0])
    return (out, *results[1:], op.Slice(op.Reshape(input, op.Constant(value_ints=[-1])), zero, zero))
