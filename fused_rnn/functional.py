"""The layers and the cells as functions of their weights: checks, directions, layers, dropout, packed sequences.

``fused_rnn.Weights`` holds the parameters of one direction of one layer. A stack of L layers with D directions takes a
sequence of L·D of them: per layer, then per direction, as in ``state_dict``.

Legend: T steps, N sequences, I input features, H hidden units, P the size of h (H, or the size of the projection), D
directions, L layers, R rows (the active sequences of all steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import autograd, checks
from fused_rnn.cells import GRU, LSTM, RNN_RELU, RNN_TANH, Cell, Weights
from fused_rnn.steps import Steps

__all__ = ["Weights", "gru", "gru_cell", "lstm", "lstm_cell", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell"]

Input = TypeVar("Input", Tensor, PackedSequence)
States = tuple[Tensor, ...]


def rnn_tanh(
    input: Input,
    weights: Sequence[Weights],
    hx: Tensor | None = None,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Input, Tensor]:
    """Run a simple recurrence with tanh over a sequence; arguments, results and errors as in ``gru``."""
    out, states = _sequence(RNN_TANH, input, weights, _single(hx), bidirectional, batch_first, dropout, training)
    return out, states[0]


def rnn_relu(
    input: Input,
    weights: Sequence[Weights],
    hx: Tensor | None = None,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Input, Tensor]:
    """Run a simple recurrence with relu over a sequence; arguments, results and errors as in ``gru``."""
    out, states = _sequence(RNN_RELU, input, weights, _single(hx), bidirectional, batch_first, dropout, training)
    return out, states[0]


def gru(
    input: Input,
    weights: Sequence[Weights],
    hx: Tensor | None = None,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Input, Tensor]:
    """Run a GRU over a sequence.

    Args:
        input: (T, N, I); with ``batch_first`` (N, T, I); unbatched (T, I); or a PackedSequence.
        weights: L·D ``Weights``, per layer, then per direction.
        hx: the initial h, (L·D, N, H), or unbatched (L·D, H). None for zero.
        bidirectional: whether D is 2.
        batch_first: whether a batched input has N before T. States never have.
        dropout: the probability of zeroing an output of all layers but the last, while ``training``.
        training: whether ``dropout`` applies.

    Returns:
        out (T, N, D·H), (N, T, D·H), (T, D·H) or a PackedSequence, as the input; and h after the last step, in the shape of
        ``hx``.

    Raises:
        ValueError: if the input is neither 2D nor 3D, has another dtype than the weights, or weights are missing.
        RuntimeError: if a size, a device or the dtype of a state does not fit, or T is 0. Types and messages are those of
            torch.nn.GRU.

    Source: torch.nn.GRU.

    >>> H, I = 4, 3
    >>> weights = [Weights(torch.randn(3 * H, I), torch.randn(3 * H, H))]
    >>> out, h_n = gru(torch.randn(5, 2, I), weights)
    >>> out.shape, h_n.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """
    out, states = _sequence(GRU, input, weights, _single(hx), bidirectional, batch_first, dropout, training)
    return out, states[0]


def lstm(
    input: Input,
    weights: Sequence[Weights],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Input, tuple[Tensor, Tensor]]:
    """Run an LSTM over a sequence.

    Args:
        input: as in ``gru``.
        weights: as in ``gru``; with ``hr`` in them, h is projected to P features.
        hx: the initial (h, c), h (L·D, N, P) and c (L·D, N, H), or unbatched without N. None for zero.
        bidirectional: as in ``gru``.
        batch_first: as in ``gru``.
        dropout: as in ``gru``.
        training: as in ``gru``.

    Returns:
        out, as in ``gru`` with P in place of H, and (h, c) after the last step, in the shapes of ``hx``.

    Raises:
        ValueError, RuntimeError: as in ``gru``; types and messages are those of torch.nn.LSTM.

    Source: torch.nn.LSTM.
    """
    out, (h, c) = _sequence(LSTM, input, weights, _pair(hx, "lstm"), bidirectional, batch_first, dropout, training)
    return out, (h, c)


def rnn_tanh_cell(input: Tensor, weights: Weights, hx: Tensor | None = None) -> Tensor:
    """Take one step of a simple recurrence with tanh; arguments, result and errors as in ``gru_cell``."""
    return _cell(RNN_TANH, input, weights, _single(hx))[0]


def rnn_relu_cell(input: Tensor, weights: Weights, hx: Tensor | None = None) -> Tensor:
    """Take one step of a simple recurrence with relu; arguments, result and errors as in ``gru_cell``."""
    return _cell(RNN_RELU, input, weights, _single(hx))[0]


def gru_cell(input: Tensor, weights: Weights, hx: Tensor | None = None) -> Tensor:
    """Take one step of a GRU.

    Args:
        input: (N, I), or unbatched (I,).
        weights: the parameters.
        hx: h before the step, (N, H), or unbatched (H,). None for zero.

    Returns:
        h after the step, in the shape of ``hx``.

    Raises:
        ValueError: if the input or the state is neither 1D nor 2D.
        RuntimeError: if a size, a dtype or a device does not fit. Types and messages are those of torch.nn.GRUCell.

    Source: torch.nn.GRUCell.
    """
    return _cell(GRU, input, weights, _single(hx))[0]


def lstm_cell(input: Tensor, weights: Weights, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Take one step of an LSTM; as ``gru_cell``, but the state is the pair (h, c).

    Raises:
        ValueError, RuntimeError: as in ``gru_cell``; types and messages are those of torch.nn.LSTMCell.

    Source: torch.nn.LSTMCell.
    """
    h, c = _cell(LSTM, input, weights, _pair(hx, "lstm_cell"))
    return h, c


def _single(hx: Tensor | None) -> States | None:
    return None if hx is None else (hx,)


def _pair(hx: tuple[Tensor, Tensor] | Tensor | None, function: str) -> States | None:
    if hx is None:
        return None
    if isinstance(hx, Tensor):
        raise TypeError(f"{function}(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")
    return tuple(hx)


def _sequence(
    cell: Cell,
    input: Input,
    weights: Sequence[Weights],
    states: States | None,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
) -> tuple[Input, States]:
    """Check the arguments, turn the input into rows and steps, run the layers, and turn the result back."""
    directions = 2 if bidirectional else 1
    checks.check_count(weights, directions)
    if isinstance(input, PackedSequence):
        return _packed(cell, input, weights, states, directions, dropout, training)
    checks.check_rank(cell, input)
    batched = input.dim() == 3
    if states is not None:
        checks.check_state_ranks(states, batched)
        if not batched:
            states = tuple(state.unsqueeze(1) for state in states)
    checks.check_input(input, weights[0].ih, input.dim())
    if not batched:
        length, batch = input.shape[0], 1
        rows = input
    else:
        if batch_first:
            input = input.transpose(0, 1)
        length, batch = input.shape[:2]
        rows = input.reshape(length * batch, input.shape[2])
    states = _states(cell, rows, weights, states, batch, directions)
    if length == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    out, states = _layers(cell, rows, Steps(length, batch), states, weights, directions, dropout if training else 0.0)
    if not batched:
        return out, tuple(state.squeeze(1) for state in states)
    out = out.view(length, batch, out.shape[1])
    return out.transpose(0, 1) if batch_first else out, states


def _packed(
    cell: Cell,
    input: PackedSequence,
    weights: Sequence[Weights],
    states: States | None,
    directions: int,
    dropout: float,
    training: bool,
) -> tuple[PackedSequence, States]:
    """As ``_sequence``: the rows of a PackedSequence are ragged steps as they stand."""
    data, batch_sizes, sorted_indices, unsorted_indices = input
    checks.check_input(data, weights[0].ih, 2)
    checks.check_batch_sizes(batch_sizes, data.shape[0])
    steps = Steps.packed(batch_sizes)
    if states is not None and sorted_indices is not None:
        # Sizes first: an index into a batch that is too small has a message that nobody understands.
        _states(cell, data, weights, states, steps.batch, directions)
        states = tuple(state.index_select(1, sorted_indices) for state in states)
    states = _states(cell, data, weights, states, steps.batch, directions)
    out, states = _layers(cell, data, steps, states, weights, directions, dropout if training else 0.0)
    if unsorted_indices is not None:
        states = tuple(state.index_select(1, unsorted_indices) for state in states)
    return PackedSequence(out, batch_sizes, sorted_indices, unsorted_indices), states


def _states(cell: Cell, rows: Tensor, weights: Sequence[Weights], states: States | None, batch: int, directions: int) -> States:
    """Check the weights and the initial states, (L·D, N, ·) each; make them where there are none."""
    checks.check_weights(cell, weights, directions)
    recurrences = len(weights)
    hidden = weights[0].hh.shape[1] if weights[0].hr is None else weights[0].hr.shape[1]
    sizes = [(recurrences, batch, weights[0].hh.shape[1] if name == "h" else hidden) for name in cell.states]
    if states is None:
        states = tuple(torch.zeros(size, dtype=rows.dtype, device=rows.device) for size in sizes)
    else:
        checks.check_state_sizes(states, sizes)
        checks.check_same(rows, "hidden", states)
    for weight in weights:
        checks.check_same(rows, "parameter", weight)
    return states


def _layers(
    cell: Cell,
    rows: Tensor,
    steps: Steps,
    states: States,
    weights: Sequence[Weights],
    directions: int,
    dropout: float,
) -> tuple[Tensor, States]:
    """Run the layers one after another: rows (R, I) and states (L·D, N, ·) in, rows (R, D·P) and states (L·D, N, ·) out."""
    reverse = (False, True)[:directions]
    if len(weights) == directions:
        return autograd.layer(cell, rows, steps, states, tuple(weights), reverse)
    ends = []
    for first in range(0, len(weights), directions):
        if first and dropout:
            rows = torch.dropout(rows, dropout, True)
        part = slice(first, first + directions)
        before = tuple(state[part] for state in states)
        rows, end = autograd.layer(cell, rows, steps, before, tuple(weights[part]), reverse)
        ends.append(end)
    return rows, tuple(torch.cat(layers) for layers in zip(*ends, strict=True))


def _cell(cell: Cell, input: Tensor, weights: Weights, states: States | None) -> States:
    """Check the arguments of one step and take it: a sequence of length one."""
    checks.check_cell_rank(cell, input, states)
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
    batch = input.shape[0]
    if states is None:
        size = (batch, weights.hh.shape[1])
        states = tuple(torch.zeros(size, dtype=input.dtype, device=input.device) for _ in cell.states)
    elif not batched:
        states = tuple(state.unsqueeze(0) for state in states)
    checks.check_cell(cell, input, states, weights)
    checks.check_weights(cell, (weights,), 1)
    before = tuple(state.unsqueeze(0) for state in states)
    out, after = autograd.layer(cell, input, Steps(1, batch), before, (weights,), (False,))
    # The output of the one step is h, without the dimension of the directions.
    after = (out, *(state.squeeze(0) for state in after[1:]))
    return after if batched else tuple(state.squeeze(0) for state in after)
