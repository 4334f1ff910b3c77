"""One step of each cell as a function of its weights; public as part of ``fused_rnn.functional``."""

from __future__ import annotations

from torch import Tensor

from fused_rnn import checks, entry
from fused_rnn.cells import GRU, LSTM, RNN_RELU, RNN_TANH, Cell, Weights
from fused_rnn.steps import Steps

States = tuple[Tensor, ...]


def rnn_tanh_cell(input: Tensor, weights: Weights, hx: Tensor | None = None) -> Tensor:
    """Take one step of a simple recurrence with tanh; arguments, result and errors as in ``gru_cell``."""
    return _cell(RNN_TANH, input, weights, single(hx))[0]


def rnn_relu_cell(input: Tensor, weights: Weights, hx: Tensor | None = None) -> Tensor:
    """Take one step of a simple recurrence with relu; arguments, result and errors as in ``gru_cell``."""
    return _cell(RNN_RELU, input, weights, single(hx))[0]


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
    return _cell(GRU, input, weights, single(hx))[0]


def lstm_cell(input: Tensor, weights: Weights, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Take one step of an LSTM; as ``gru_cell``, but the state is the pair (h, c).

    Raises:
        ValueError, RuntimeError: as in ``gru_cell``; types and messages are those of torch.nn.LSTMCell.

    Source: torch.nn.LSTMCell.
    """
    h, c = _cell(LSTM, input, weights, pair(hx, "lstm_cell"))
    return h, c


def single(hx: Tensor | None) -> States | None:
    """A state as the tuple of states, or None."""
    return None if hx is None else (hx,)


def pair(hx: tuple[Tensor, Tensor] | Tensor | None, function: str) -> States | None:
    """A pair of states; raises as torch's ``function`` does where it is none."""
    if hx is None:
        return None
    if isinstance(hx, Tensor):
        raise TypeError(f"{function}(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")
    return tuple(hx)


def _cell(cell: Cell, input: Tensor, weights: Weights, states: States | None) -> States:
    """Check the arguments of one step and take it: a sequence of length one."""
    checks.check_cell_rank(cell, input, states)
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
    batch = input.shape[0]
    if states is None:
        size = (batch, weights.hh.shape[1])
        states = tuple(input.new_zeros(size) for _ in cell.states)
    elif not batched:
        states = tuple(state.unsqueeze(0) for state in states)
    checks.check_cell(cell, input, states, weights)
    checks.check_weights(cell, (weights,), 1)
    before = tuple(state.unsqueeze(0) for state in states)
    out, after = entry.layer(cell, input, Steps(1, batch), before, (weights,), (False,), as_dense=False)
    # The output of the one step is h, without the dimension of the directions.
    after = (out, *(state.squeeze(0) for state in after[1:]))
    return after if batched else tuple(state.squeeze(0) for state in after)
