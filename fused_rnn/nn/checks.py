"""What a wrong argument raises: torch.nn's exception types and messages, once for all cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.data import sequences, torch_private
from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import mapped
from fused_rnn.graph import autocast
from fused_rnn.graph.tracing import quietly

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

# As torch prints a dtype in the messages that come from C++.
_DTYPE_NAMES = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.bool: "Bool",
}


def _dtype_name(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES.get(dtype, str(dtype))


def check_rank(cell: Cell, input: Tensor) -> None:
    """Raise ValueError unless a sequence is 2D (unbatched) or 3D."""
    if input.dim() not in (2, 3):
        name = cell.mode.partition("_")[0]
        # torch.nn.RNN has a word that the others have not.
        noun = " tensor" if name == "RNN" else ""
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{noun} instead")


def check_state_ranks(states: Sequence[Tensor], batched: bool) -> None:
    """Raise RuntimeError unless the states have as many dimensions as the input."""
    rank = 3 if batched else 2
    for state in states:
        if state.dim() != rank:
            break
    else:
        return
    what = f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx"
    if len(states) == 1:
        raise RuntimeError(f"{what} should also be {rank}-D but got {states[0].dim()}-D tensor")
    ranks = ", ".join(f"{state.dim()}-D" for state in states)
    raise RuntimeError(f"{what} and cx should also be {rank}-D but got ({ranks}) tensors")


@quietly
def check_input(input: Tensor, weight: Tensor, rank: int) -> None:
    """Check dtype, rank and features of a sequence against ``weight_ih`` of the first layer.

    Raises:
        ValueError: if the dtypes differ (outside autocast).
        RuntimeError: if the input has another rank or another number of features.
        NotImplementedError: if the dtype is none of DTYPES.
    """
    if input.dtype != weight.dtype and not torch_private.any_autocast():
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    if input.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {input.dim()}")
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {weight.shape[1]}, got {input.shape[-1]}")
    check_dtype(input)


def check_dtype(input: Tensor) -> None:
    """Raise NotImplementedError if the dtype of the input is none of DTYPES."""
    if input.dtype not in DTYPES:
        raise NotImplementedError(
            f"fused_rnn computes in {', '.join(sorted(str(dtype) for dtype in DTYPES))}, got an input of {input.dtype}"
        )


@quietly
def check_state_sizes(states: Sequence[Tensor], expected: Sequence[tuple[int, ...]]) -> None:
    """Raise RuntimeError unless each state of a sequence has its shape."""
    for index, (state, shape) in enumerate(zip(states, expected, strict=True)):
        if state.shape != shape:
            which = "" if len(states) == 1 else f"[{index}]"
            raise RuntimeError(f"Expected hidden{which} size {shape}, got {list(state.shape)}")


def check_same(input: Tensor, what: str, tensors: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError unless ``tensors`` (called ``what``) are on the device of ``input`` and have its dtype.

    Under autocast they may have any that it converts.
    """
    device, dtype = input.device, input.dtype
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device != device:
            raise RuntimeError(
                f"Input and {what} tensors are not at the same device, "
                f"found input tensor at {device} and {what} tensor at {tensor.device}"
            )
        if tensor.dtype != dtype and not autocast.converts(input, tensor):
            raise RuntimeError(
                f"Input and {what} tensors are not the same dtype, found input tensor with {_dtype_name(dtype)} "
                f"and {what} tensor with {_dtype_name(tensor.dtype)}"
            )


def check_count(weights: Sequence[Weights], directions: int) -> None:
    """Raise ValueError unless there is one ``Weights`` for each layer and direction."""
    if not weights or len(weights) % directions:
        raise ValueError(f"weights: expected {directions} for each layer, one or more layers, got {len(weights)}")


@quietly
def check_weights(cell: Cell, weights: Sequence[Weights], directions: int, grows: bool = False) -> None:
    """Raise unless the weights of all layers fit together.

    Args:
        grows: whether each layer reads what the one before it reads as well, not its output alone.

    Raises:
        ValueError: if there is a projection in a cell that has none.
        RuntimeError: if a tensor has another shape than those before it ask for.
    """
    first = weights[0]
    if first.hh.dim() != 2 or first.ih.dim() != 2 or (first.hr is not None and first.hr.dim() != 2):
        raise RuntimeError("weight_ih, weight_hh and weight_hr must have 2 dimensions")
    if first.hr is None:
        projected = hidden = first.hh.shape[1]
    elif cell.projected is not None:
        projected, hidden = first.hr.shape
    else:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    gates = cell.num_gates * hidden
    bias, hr_shape = (gates,), (projected, hidden)
    ih_shape, hh_shape = (gates, first.ih.shape[1]), (gates, projected)
    for index, weight in enumerate(weights):
        if index and index % directions == 0:
            ih_shape = (gates, directions * projected + (ih_shape[1] if grows else 0))
        ih, hh, bias_ih, bias_hh, hr = weight
        if (
            ih.shape != ih_shape
            or hh.shape != hh_shape
            or (bias_ih is not None and bias_ih.shape != bias)
            or (bias_hh is not None and bias_hh.shape != bias)
            or (hr is None) != (first.hr is None)
            or (hr is not None and hr.shape != hr_shape)
        ):
            expected = (ih_shape, hh_shape, bias, bias, None if first.hr is None else hr_shape)
            _raise_weight_shape(weight, expected, *divmod(index, directions))


def _raise_weight_shape(weight: Weights, expected: tuple[tuple[int, ...] | None, ...], layer: int, direction: int) -> None:
    for field, tensor, shape in zip(Weights._fields, weight, expected, strict=True):
        got = None if tensor is None else tuple(tensor.shape)
        if got != shape and not (got is None and field.startswith("bias")):
            name = field if field.startswith("bias") else f"weight_{field}"
            raise RuntimeError(f"{name} of layer {layer}, direction {direction}: expected shape {shape}, got {got}")


@quietly
def check_layers(
    cell: Cell,
    rows: Tensor,
    weights: Sequence[Weights],
    directions: int,
    states: Sequence[Tensor] | None,
    batch: int,
    grows: bool = False,
) -> None:
    """Check the weights of all layers and the initial states, (L·D, N, ·) each, against each other and against the input.

    Args:
        grows: as of ``check_weights``.

    Raises: as ``check_weights``, ``check_state_sizes`` and ``check_same``.
    """
    check_weights(cell, weights, directions, grows)
    if states is not None:
        hh, hr = weights[0].hh, weights[0].hr
        hidden = hh.shape[1] if hr is None else hr.shape[1]
        sizes = [(len(weights), batch, hh.shape[1] if name == "h" else hidden) for name in cell.states]
        check_state_sizes(states, sizes)
        check_same(rows, "hidden", states)
    for weight in weights:
        check_same(rows, "parameter", weight)


def check_cell_rank(cell: Cell, input: Tensor, states: Sequence[Tensor] | None) -> None:
    """Raise ValueError unless the input and the states of one step are 1D (unbatched) or 2D."""
    if not 1 <= input.dim() <= 2:
        raise ValueError(f"{_class_of(cell)}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for state in states or ():
        if not 1 <= state.dim() <= 2:
            which = "hidden" if len(cell.states) == 1 else f"hx[{[each is state for each in states or ()].index(True)}]"
            raise ValueError(f"{_class_of(cell)}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")


def _class_of(cell: Cell) -> str:
    return f"{cell.mode.partition('_')[0]}Cell"


@quietly
def check_cell(cell: Cell, input: Tensor, states: Sequence[Tensor], weights: Weights) -> None:
    """Check one step: input (N, I) and states (N, H), against each other and against the weights.

    Raises:
        RuntimeError: as torch.nn's cells raise, for features, hidden size, batch size, dtype and device.
        NotImplementedError: if the dtype is none of DTYPES.
    """
    if input.shape[1] != weights.ih.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {weights.ih.shape[1]}")
    hidden = weights.hh.shape[1]
    for index, state in enumerate(states):
        if input.shape[0] != state.shape[0]:
            raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden{index} batch size {state.shape[0]}")
        if state.size(1) != hidden:
            raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {hidden}")
    for tensor in (input, *states, *weights):
        if tensor is None:
            continue
        if tensor.device != weights.ih.device:
            raise RuntimeError(f"Tensor on device {weights.ih.device} is not on the expected device {tensor.device}!")
        if tensor.dtype != weights.ih.dtype and not autocast.converts(weights.ih, tensor):
            raise RuntimeError(
                "mat1 and mat2 must have the same dtype, "
                f"but got {_dtype_name(tensor.dtype)} and {_dtype_name(weights.ih.dtype)}"
            )
    check_dtype(input)
    check_weights(cell, (weights,), 1)


@quietly
def check_lengths(lengths: object, batch: int, batched: bool, input: Tensor) -> Tensor:
    """Check what ``lengths`` are without a look at their values.

    Returns:
        (N,), on the caller's device.

    Raises:
        TypeError: if they are no integer tensor.
        ValueError: if the shape is not (N,), or () for an unbatched input, or they have no values while ``input`` has.
        RuntimeError: if torch.func.vmap maps over them.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected an integer tensor, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected an integer tensor, got one of {lengths.dtype}")
    if mapped(lengths):
        raise RuntimeError(sequences.MAPPED_LENGTHS)
    if lengths.is_meta and not input.is_meta:
        raise ValueError("lengths: expected a tensor with values, as the input has them, got one on the meta device")
    shape = (batch,) if batched else ()
    if lengths.shape != shape:
        what = f"{shape}, one length for each sequence" if batched else "(), as the input is unbatched"
        raise ValueError(f"lengths: expected shape {what}, got {tuple(lengths.shape)}")
    return lengths.reshape(-1)


@quietly
def check_reset(reset: object, shape: tuple[int, ...], input: Tensor) -> Tensor:
    """Check a mask of resets.

    Args:
        shape: (T, N), (N, T) with ``batch_first``, or (T,) unbatched.

    Raises:
        TypeError: if it is no boolean tensor.
        ValueError: if it has another shape.
        RuntimeError: if it is on another device than the input.
    """
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a boolean tensor, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset: expected a boolean tensor, got one of {reset.dtype}")
    if reset.shape != shape:
        raise ValueError(f"reset: expected shape {shape}, a flag for each step of each sequence, got {tuple(reset.shape)}")
    if reset.device != input.device:
        raise RuntimeError(
            "Input and reset tensors are not at the same device, "
            f"found input tensor at {input.device} and reset tensor at {reset.device}"
        )
    return reset


@quietly
def check_packed_reset(reset: object, input: PackedSequence) -> Tensor:
    """Check a mask of resets for a packed input; return its rows, (R,).

    Its values are another matter: see ``fused_rnn.data.sequences.check_packed_alike``.

    Raises:
        TypeError: if it is no PackedSequence of booleans.
        ValueError: if it has another number of rows than the input.
        RuntimeError: if it is on another device than the input.
    """
    if not isinstance(reset, PackedSequence):
        raise TypeError(
            "reset: expected a PackedSequence of booleans, packed with the lengths of the input, as the input is packed, "
            f"got {type(reset).__name__}"
        )
    return check_reset(reset.data, (input.data.shape[0],), input.data)


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless a switch is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_coupled(coupled: object, forget_bias: object) -> None:
    """Raise TypeError unless ``coupled`` is a bool, ValueError if there is to be a forget gate's bias all the same."""
    check_flag("coupled", coupled)
    if coupled and forget_bias is not None:
        raise ValueError(f"forget_bias: expected None with coupled=True, whose forget gate is 1 - i, got {forget_bias}")


def refuse_proj_size(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a ``proj_size`` of what is no LSTM."""
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def refuse_positional(module: torch.nn.Module, positional: tuple[Any, ...]) -> None:
    """Raise TypeError for keywords that are given by position.

    torch.onnx.export(dynamo=False) gives the defaults of keywords so: these alone, and there alone, are let pass.
    """
    # A flag has become a tensor there.
    none = all(value is None or value is False or (torch.is_tensor(value) and not value.any()) for value in positional)
    if none and torch.onnx.is_in_onnx_export():
        return
    name = type(module).__name__
    raise TypeError(f"{name}.forward() takes from 2 to 3 positional arguments but {3 + len(positional)} were given")
