"""The layers and the cells as functions of their weights: checks, directions, layers, dropout, packed sequences.

``fused_rnn.Weights`` holds the parameters of one direction of one layer. A stack of L layers with D directions takes a
sequence of L·D of them: per layer, then per direction, as in ``state_dict``.

Legend: T steps, N sequences, I input features, H hidden units, P the size of h (H, or the size of the projection), D
directions, L layers, R rows (the active sequences of all steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from fused_rnn.cells import GRU, GRU_RESET_BEFORE, LSTM, LSTM_COUPLED, RNN_RELU, RNN_TANH
from fused_rnn.data.cell import Weights
from fused_rnn.nn import checks
from fused_rnn.nn.calls import Input, pair, sequence, step

__all__ = ["Weights", "gru", "gru_cell", "lstm", "lstm_cell", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell"]


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
    given = None if hx is None else (hx,)
    dropout = dropout if training else 0.0
    out, states, _ = sequence(RNN_TANH, input, weights, given, bidirectional, batch_first, dropout, lengths, reset)
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
    given = None if hx is None else (hx,)
    dropout = dropout if training else 0.0
    out, states, _ = sequence(RNN_RELU, input, weights, given, bidirectional, batch_first, dropout, lengths, reset)
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
    reset_after: bool = True,
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
        reset_after: whether the reset gate comes after the product with W_hn, as in torch.nn; or before it, as in ONNX's
            ``linear_before_reset=0``.

    Returns:
        out (T, N, D·H), (N, T, D·H), (T, D·H) or a PackedSequence, as the input; and h after the last step, in the shape of
        ``hx``. With ``lengths``, out is zero beyond them, h is that after the last step which counts (``hx`` where there is
        none), and the second direction starts at that step.

    Raises:
        TypeError: if ``lengths`` are no integers, ``reset`` no booleans, or ``reset_after`` is no bool.
        ValueError: if the input is neither 2D nor 3D, has another dtype than the weights, weights are missing, ``lengths`` or
            ``reset`` have another shape, a length is not one of 0 .. T, or lengths are given with a packed input.
        RuntimeError: if a size, a device or the dtype of a state does not fit, or T is 0. Types and messages are those of
            torch.nn.GRU.

    Source: torch.nn.GRU; without ``reset_after`` Cho et al. 2014.

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
    checks.check_flag("reset_after", reset_after)
    given = None if hx is None else (hx,)
    dropout = dropout if training else 0.0
    cell = GRU if reset_after else GRU_RESET_BEFORE
    out, states, _ = sequence(cell, input, weights, given, bidirectional, batch_first, dropout, lengths, reset)
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
    coupled: bool = False,
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
    coupled: bool = False,
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
    coupled: bool = False,
    return_cell_states: bool = False,
) -> tuple[Input, tuple[Tensor, Tensor]] | tuple[Input, tuple[Tensor, Tensor], Input]:
    """Run an LSTM over a sequence.

    Args:
        input: as in ``gru``.
        weights: as in ``gru``; with ``hr`` in them, h is projected to P features.
        hx: the initial (h, c), h (L·D, N, P) and c (L·D, N, H), or unbatched without N. None for zero.
        bidirectional, batch_first, dropout, training, lengths, reset: as in ``gru``.
        coupled: whether the forget gate is 1 − i, as of ``fused_rnn.LSTM``: the weights have the rows of three gates, i, g, o.
        return_cell_states: whether c of every step is a third result.

    Returns:
        out, as in ``gru`` with P in place of H, and (h, c) after the last step, in the shapes of ``hx``. With
        ``return_cell_states`` also c of the last layer at every step: as out, with H features for each direction.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``gru``; types and messages are those of torch.nn.LSTM. TypeError if
            ``return_cell_states`` or ``coupled`` is no bool.

    Source: torch.nn.LSTM; with ``coupled`` Greff et al. 2017.
    """
    checks.check_flag("return_cell_states", return_cell_states)
    checks.check_flag("coupled", coupled)
    cell = LSTM_COUPLED if coupled else LSTM
    given, dropout = pair(hx, "lstm"), dropout if training else 0.0
    out, (h, c), cells = sequence(
        cell, input, weights, given, bidirectional, batch_first, dropout, lengths, reset, return_cell_states
    )
    return (out, (h, c)) if cells is None else (out, (h, c), cells)


def rnn_tanh_cell(input: Tensor, weights: Weights, hx: Tensor | None = None) -> Tensor:
    """Take one step of a simple recurrence with tanh; arguments, result and errors as in ``gru_cell``."""
    return step(RNN_TANH, input, weights, None if hx is None else (hx,))[0]


def rnn_relu_cell(input: Tensor, weights: Weights, hx: Tensor | None = None) -> Tensor:
    """Take one step of a simple recurrence with relu; arguments, result and errors as in ``gru_cell``."""
    return step(RNN_RELU, input, weights, None if hx is None else (hx,))[0]


def gru_cell(input: Tensor, weights: Weights, hx: Tensor | None = None, *, reset_after: bool = True) -> Tensor:
    """Take one step of a GRU.

    Args:
        input: (N, I), or unbatched (I,).
        weights: the parameters.
        hx: h before the step, (N, H), or unbatched (H,). None for zero.
        reset_after: as in ``gru``.

    Returns:
        h after the step, in the shape of ``hx``.

    Raises:
        TypeError: if ``reset_after`` is no bool.
        ValueError: if the input or the state is neither 1D nor 2D.
        RuntimeError: if a size, a dtype or a device does not fit. Types and messages are those of torch.nn.GRUCell.

    Source: torch.nn.GRUCell.
    """
    checks.check_flag("reset_after", reset_after)
    return step(GRU if reset_after else GRU_RESET_BEFORE, input, weights, None if hx is None else (hx,))[0]


def lstm_cell(
    input: Tensor, weights: Weights, hx: tuple[Tensor, Tensor] | None = None, *, coupled: bool = False
) -> tuple[Tensor, Tensor]:
    """Take one step of an LSTM; as ``gru_cell``, but the state is the pair (h, c), and ``coupled`` as in ``lstm``.

    Raises:
        ValueError, RuntimeError: as in ``gru_cell``; types and messages are those of torch.nn.LSTMCell. TypeError if
            ``coupled`` is no bool.

    Source: torch.nn.LSTMCell.
    """
    checks.check_flag("coupled", coupled)
    h, c = step(LSTM_COUPLED if coupled else LSTM, input, weights, pair(hx, "lstm_cell"))
    return h, c
