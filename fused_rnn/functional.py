"""The layers and the cells as functions of their weights: checks, directions, layers, dropout, packed sequences.

``fused_rnn.Weights`` holds the parameters of one direction of one layer. A stack of L layers with D directions takes a
sequence of L·D of them: per layer, then per direction, as in ``state_dict``.

Legend: T steps, N sequences, I input features, H hidden units, P the size of h (H, or the size of the projection), D
directions, L layers, R rows (the active sequences of all steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import checks, operators, sequences, stack
from fused_rnn.cell_functional import gru_cell, lstm_cell, pair, rnn_relu_cell, rnn_tanh_cell, single
from fused_rnn.cells import GRU, LSTM, RNN_RELU, RNN_TANH, Cell, Weights
from fused_rnn.stack import Options, directions_of
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
    lengths: Tensor | None = None,
    reset: Input | None = None,
) -> tuple[Input, Tensor]:
    """Run a simple recurrence with tanh over a sequence; arguments, results and errors as in ``gru``."""
    options = Options(bidirectional, batch_first, dropout, training, lengths, reset)
    out, states, _ = sequence(RNN_TANH, input, weights, single(hx), options)
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
    lengths: Tensor | None = None,
    reset: Input | None = None,
) -> tuple[Input, Tensor]:
    """Run a simple recurrence with relu over a sequence; arguments, results and errors as in ``gru``."""
    options = Options(bidirectional, batch_first, dropout, training, lengths, reset)
    out, states, _ = sequence(RNN_RELU, input, weights, single(hx), options)
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
    lengths: Tensor | None = None,
    reset: Input | None = None,
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
        lengths: how many steps of each padded sequence count, 0 .. T in any order: integers (N,), or () unbatched, on any
            device, and the same for all members of torch.func.vmap. No work is done for the other steps; what they hold does
            not matter. None for all T.
        reset: where the states are zero before a step, as between the episodes of an agent: booleans (T, N), with
            ``batch_first`` (N, T), unbatched (T,), or for a packed input a PackedSequence like it. In every layer and
            direction, the steps before a reset and those after it do not see each other: the second direction comes into the
            step before it with zero states. A reset at the first step discards ``hx`` of the first direction; the second
            direction has no step before to come to.

    Returns:
        out (T, N, D·H), (N, T, D·H), (T, D·H) or a PackedSequence, as the input; and h after the last step, in the shape of
        ``hx``. With ``lengths``, out is zero beyond them, h is that after the last step which counts (``hx`` where there is
        none), and the second direction starts at that step.

    Raises:
        TypeError: if ``lengths`` are no integers or ``reset`` no booleans.
        ValueError: if the input is neither 2D nor 3D, has another dtype than the weights, weights are missing, ``lengths`` or
            ``reset`` have another shape, a length is not one of 0 .. T, or lengths are given with a packed input.
        RuntimeError: if a size, a device or the dtype of a state does not fit, or T is 0. Types and messages are those of
            torch.nn.GRU.

    Source: torch.nn.GRU.

    >>> import torch
    >>> H, I = 4, 3
    >>> weights = [Weights(torch.randn(3 * H, I), torch.randn(3 * H, H))]
    >>> out, h_n = gru(torch.randn(5, 2, I), weights)
    >>> out.shape, h_n.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    >>> out, h_n = gru(torch.randn(5, 2, I), weights, lengths=torch.tensor([3, 5]))
    >>> out[3:, 0].count_nonzero(), torch.equal(h_n[0, 0], out[2, 0])
    (tensor(0), True)
    """
    options = Options(bidirectional, batch_first, dropout, training, lengths, reset)
    out, states, _ = sequence(GRU, input, weights, single(hx), options)
    return out, states[0]


@overload
def lstm(
    input: Input,
    weights: Sequence[Weights],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Input | None = None,
    return_cell_states: Literal[False] = False,
) -> tuple[Input, tuple[Tensor, Tensor]]: ...


@overload
def lstm(
    input: Input,
    weights: Sequence[Weights],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Input | None = None,
    return_cell_states: Literal[True],
) -> tuple[Input, tuple[Tensor, Tensor], Input]: ...


def lstm(
    input: Input,
    weights: Sequence[Weights],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Input | None = None,
    return_cell_states: bool = False,
) -> tuple[Input, tuple[Tensor, Tensor]] | tuple[Input, tuple[Tensor, Tensor], Input]:
    """Run an LSTM over a sequence.

    Args:
        input: as in ``gru``.
        weights: as in ``gru``; with ``hr`` in them, h is projected to P features.
        hx: the initial (h, c), h (L·D, N, P) and c (L·D, N, H), or unbatched without N. None for zero.
        bidirectional, batch_first, dropout, training, lengths, reset: as in ``gru``.
        return_cell_states: whether c of every step is a third result.

    Returns:
        out, as in ``gru`` with P in place of H, and (h, c) after the last step, in the shapes of ``hx``. With
        ``return_cell_states`` also c of the last layer at every step: as out, with H features for each direction.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``gru``; types and messages are those of torch.nn.LSTM. TypeError if
            ``return_cell_states`` is no bool.

    Source: torch.nn.LSTM.
    """
    checks.check_flag("return_cell_states", return_cell_states)
    options = Options(bidirectional, batch_first, dropout, training, lengths, reset, return_cell_states)
    out, (h, c), cells = sequence(LSTM, input, weights, pair(hx, "lstm"), options)
    return (out, (h, c)) if cells is None else (out, (h, c), cells)


def sequence(
    cell: Cell, input: Input, weights: Sequence[Weights], states: States | None, options: Options
) -> tuple[Input, States, Input | None]:
    """Check the arguments, turn the input into rows and steps, run the layers, and turn the results back.

    Returns:
        out, the states after the last step, and with ``options.cell_states`` c of every step.
    """
    checks.check_count(weights, directions_of(options))
    if isinstance(input, PackedSequence):
        return _packed(cell, input, weights, states, options)
    checks.check_rank(cell, input)
    batched = input.dim() == 3
    if states is not None:
        checks.check_state_ranks(states, batched)
        if not batched:
            states = tuple(state.unsqueeze(1) for state in states)
    checks.check_input(input, weights[0].ih, input.dim())
    shape = tuple(input.shape[:-1])
    by_sequence = options.batch_first and batched
    length, batch = (shape[1], shape[0]) if by_sequence else (shape[0], shape[1] if batched else 1)
    ragged = None
    if options.lengths is not None:
        lengths = checks.check_lengths(options.lengths, batch, batched, input)
        if operators.traced(input, weights[0].hh):
            if not (lengths.is_meta or input.is_meta):
                ragged = operators.ragged(lengths, input, by_sequence)
        elif not lengths.is_meta:
            lengths = checks.check_length_values(lengths, length)
            if not input.is_meta:
                ragged = sequences.Ragged.of(lengths, length, by_sequence, input.device)
    reset = None if options.reset is None else checks.check_reset(options.reset, shape, input)
    if ragged is not None:
        rows = ragged.gather(input.reshape(length * batch, input.shape[-1]))
        reset = None if reset is None else ragged.gather(reset.reshape(-1))
    else:
        if by_sequence:
            input, reset = input.transpose(0, 1), None if reset is None else reset.t()
        rows = input.reshape(length * batch, input.shape[-1])
        reset = None if reset is None else reset.reshape(-1)
    states = _states(cell, rows, weights, states, batch, directions_of(options))
    if length == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    if ragged is None:
        out, states, cells = stack.layers(cell, rows, Steps(length, batch), states, weights, reset, options)
    else:
        out, states, cells = stack.layers(cell, rows, ragged.steps, ragged.sort(states), weights, reset, options)
        states = ragged.unsort(states)

    def as_input(values: Tensor) -> Tensor:
        """Rows in the shape of the input."""
        if ragged is not None:
            return ragged.scatter(values, length * batch).view(*shape, values.shape[1])
        if by_sequence:
            return values.view(length, batch, values.shape[1]).transpose(0, 1)
        return values.view(*shape, values.shape[1]) if batched else values

    if not batched:
        states = tuple(state.squeeze(1) for state in states)
    return as_input(out), states, None if cells is None else as_input(cells)


def _packed(
    cell: Cell, input: PackedSequence, weights: Sequence[Weights], states: States | None, options: Options
) -> tuple[PackedSequence, States, PackedSequence | None]:
    """As ``sequence``: the rows of a PackedSequence are ragged steps as they stand."""
    data, batch_sizes, sorted_indices, unsorted_indices = input
    checks.check_input(data, weights[0].ih, 2)
    if options.lengths is not None:
        raise ValueError("lengths: expected None for a packed input, which has its own, got a tensor")
    mask = options.reset
    reset = None if mask is None else checks.check_packed_reset(mask, input)
    if operators.traced(data, weights[0].ih):
        steps = operators.packed_steps(batch_sizes, data.shape[0], states, sorted_indices)
        if isinstance(mask, PackedSequence):
            reset = operators.packed_reset(mask, input)
    else:
        checks.check_batch_sizes(batch_sizes, data.shape[0])
        steps = Steps.packed(batch_sizes)
        if isinstance(mask, PackedSequence):
            checks.check_packed_alike(mask.batch_sizes, mask.sorted_indices, batch_sizes, sorted_indices)
    if states is not None and sorted_indices is not None:
        # Sizes first: an index into a batch that is too small has a message that nobody understands.
        _states(cell, data, weights, states, steps.batch, directions_of(options))
        states = tuple(state.index_select(1, sorted_indices) for state in states)
    states = _states(cell, data, weights, states, steps.batch, directions_of(options))
    out, states, cells = stack.layers(cell, data, steps, states, weights, reset, options)
    if unsorted_indices is not None:
        states = tuple(state.index_select(1, unsorted_indices) for state in states)

    def as_input(values: Tensor) -> PackedSequence:
        return PackedSequence(values, batch_sizes, sorted_indices, unsorted_indices)

    return as_input(out), states, None if cells is None else as_input(cells)


def _states(cell: Cell, rows: Tensor, weights: Sequence[Weights], states: States | None, batch: int, directions: int) -> States:
    """Check the weights and the initial states, (L·D, N, ·) each; make them where there are none."""
    checks.check_weights(cell, weights, directions)
    recurrences = len(weights)
    hidden = weights[0].hh.shape[1] if weights[0].hr is None else weights[0].hr.shape[1]
    sizes = [(recurrences, batch, weights[0].hh.shape[1] if name == "h" else hidden) for name in cell.states]
    if states is None:
        # Nobody writes to them, so that one tensor may serve as both.
        one = weights[0].hr is None
        states = (rows.new_zeros(sizes[0]),) * len(sizes) if one else tuple([rows.new_zeros(size) for size in sizes])
    else:
        checks.check_state_sizes(states, sizes)
        checks.check_same(rows, "hidden", states)
    for weight in weights:
        checks.check_same(rows, "parameter", weight)
    return states
