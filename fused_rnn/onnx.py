"""Export to ONNX: each layer becomes one standard ONNX ``LSTM``, ``GRU`` or ``RNN``, which every runtime knows.

Plain ``torch.onnx.export`` does so wherever fused_rnn is imported, by both of its exporters (``fused_rnn.graph.onnx_export``).
What is here serves programs that ``torch.export.export`` has made before, and torch before 2.8.

>>> import fused_rnn
>>> model, example = fused_rnn.LSTM(3, 4).eval(), (torch.randn(5, 2, 3),)
>>> sizes = ({0: torch.export.Dim("T"), 1: torch.export.Dim("N")},)
>>> torch.onnx.export(model, example, "model.onnx", dynamo=True, dynamic_shapes=sizes)  # doctest: +SKIP
>>> program = torch.export.export(model, example, dynamic_shapes=sizes)
>>> fused_rnn.onnx.export(program, f="model.onnx")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_rnn.cells import CELLS
from fused_rnn.data.cell import Weights
from fused_rnn.graph.onnx_export import DIRECTIONS, LENGTHS, OPERATORS, PACKED, order_of, refuse
from fused_rnn.graph.operators import spread

__all__ = ["export", "translation_table"]


def export(model: Any, args: tuple[Any, ...] = (), f: Any = None, **options: Any) -> Any:
    """Export a model with modules of fused_rnn in it to ONNX: torch.onnx.export with the translations of its operators.

    Args:
        model: as it is to be served (call ``model.eval()`` before, or dropout is exported too), or what torch.export.export
            has made of it.
        args: example inputs of a module. T and N are fixed to theirs but for what ``dynamic_shapes`` (``dynamic_axes`` with
            ``dynamo=False``) says.
        f: the path of the file to write, or None to write none.
        options: those of torch.onnx.export. A ``custom_translation_table`` is added to that of fused_rnn.

    Returns:
        The torch.onnx.ONNXProgram; None with ``dynamo=False``.

    Raises:
        NotImplementedError: for what no ONNX operator computes: other cells than torch.nn's, projections (``proj_size``),
            lengths, resets; and packed sequences unless ``dynamo=False``.
        ImportError: if ``onnxscript`` is not installed.

    Source: torch.onnx.export.
    """
    if not options.pop("dynamo", True):
        return torch.onnx.export(model, args, f, dynamo=False, **options)
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
    """What torch.onnx.export needs as ``custom_translation_table`` to export a torch.export.ExportedProgram.

    >>> table = translation_table()
    >>> torch.onnx.export(program, f="model.onnx", dynamo=True, custom_translation_table=table)  # doctest: +SKIP

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


def _refuse_packed(batch_sizes: Any, data: Any, order: Any, state: Any) -> Any:
    raise NotImplementedError(PACKED)


def _refuse_lengths(lengths: Any, padded: Any, batch_first: Any) -> Any:
    raise NotImplementedError(LENGTHS)


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
    refuse(cell, any(weight.hr is not None for weight in weights), reset is not None, cell_states)
    if batch_sizes is not None:
        raise NotImplementedError(PACKED)
    if tuple(reverse) not in DIRECTIONS:
        raise NotImplementedError("with this torch, layers with num_heads cannot be exported to ONNX: use torch 2.8 or newer")
    name, gates, attributes = OPERATORS[cell_name]
    order = order_of(cell, gates)
    hidden = weights[0].hh.shape[1]

    def reordered(tensor: Any) -> Any:
        if len(order) == 1:
            return tensor
        # Not Split, whose results the exporter does not compute at export.
        bounds = [op.Constant(value_ints=[i * hidden]) for i in range(len(order) + 1)]
        blocks = [None if i is None else op.Slice(tensor, bounds[i], bounds[i + 1]) for i in order]
        # Of a gate that the cell has not, nothing is read: any block will do.
        return op.Concat(*(blocks[0] if block is None else block for block in blocks), axis=0)

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
        direction=DIRECTIONS[tuple(reverse)],
        hidden_size=hidden,
        **attributes,
    )
    # (T, D, N, H) → rows (T·N, D·H).
    columns = op.Constant(value_ints=[-1, len(weights) * hidden])
    out = op.Reshape(op.Transpose(results[0], perm=[0, 2, 1, 3]), columns)
    # In place of the tape, which nothing reads.
    zero = op.Constant(value_ints=[0])
    return (out, *results[1:], op.Slice(op.Reshape(input, op.Constant(value_ints=[-1])), zero, zero))
