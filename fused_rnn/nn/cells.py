"""The modules of one step: torch.nn's contract over ``fused_rnn.nn.calls``; instances of torch.nn's cells too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rnn.cells import GRU, GRU_RESET_BEFORE, LSTM, LSTM_COUPLED, RNN_RELU, RNN_TANH
from fused_rnn.data.cell import Cell, Weights
from fused_rnn.kernels.protocol import States
from fused_rnn.nn import calls, checks, symbolic
from fused_rnn.nn.initialisation import Initialised, keep_gates
from fused_rnn.nn.qconfig import Quantizable

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(Quantizable, Initialised, torch.nn.modules.rnn.RNNCellBase):
    """What the cells share."""

    def _step(self, cell: Cell, input: Tensor, states: States | None) -> States:
        get: Any = self._parameters.get
        ih, hh, bias_ih, bias_hh = get("weight_ih"), get("weight_hh"), get("bias_ih"), get("bias_hh")
        if ih is None or hh is None or bias_ih is None or bias_hh is None:
            # A parametrized, pruned or reassigned weight is an attribute, not a parameter; and so is a bias that is not there.
            ih, hh, bias_ih, bias_hh = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        # As the class does it, in half the time.
        return calls.step(cell, input, tuple.__new__(Weights, (ih, hh, bias_ih, bias_hh, None)), states)


class RNNCell(_Cell, torch.nn.RNNCell):
    r"""One step of a simple (Elman) recurrence: the fused replacement of torch.nn.RNNCell.

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: ``True``
        nonlinearity: ``'tanh'`` or ``'relu'``. Default: ``'tanh'``
        device, dtype: of the parameters.
        recurrent_init: ``"orthogonal"`` draws each gate's block of ``weight_hh`` so. Default: ``None``, torch's values

    Inputs: input (N, I) or (I,); h (N, H) or (H,), default zero.
    Outputs: h after the step, (N, H) or (H,).

    Parameters: ``weight_ih`` (H, I), ``weight_hh`` (H, H), ``bias_ih`` (H,), ``bias_hh`` (H,), drawn from U(−1/√H, 1/√H).

    Raises:
        ValueError, RuntimeError: with torch.nn.RNNCell's messages. An unknown nonlinearity raises in ``forward``.

    >>> RNNCell(10, 20)(torch.randn(3, 10)).shape
    torch.Size([3, 20])
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        recurrent_init: str | None = None,
    ) -> None:
        options = {"device": device, "dtype": dtype, "recurrent_init": recurrent_init}
        super().__init__(input_size, hidden_size, bias, nonlinearity, **options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; shapes and errors in the class docstring."""
        if symbolic.traced() and (proxy := symbolic.recorded(self, input, hx)) is not None:
            return proxy  # type: ignore[no-any-return]
        if self.nonlinearity == "tanh":
            return self._step(RNN_TANH, input, None if hx is None else (hx,))[0]
        if self.nonlinearity == "relu":
            return self._step(RNN_RELU, input, None if hx is None else (hx,))[0]
        raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")


class GRUCell(_Cell, torch.nn.GRUCell):
    r"""One step of a gated recurrent unit: the fused replacement of torch.nn.GRUCell.

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: ``True``
        device, dtype: of the parameters.
        recurrent_init: ``"orthogonal"`` draws each gate's block of ``weight_hh`` so. Default: ``None``, torch's values
        reset_after: whether the reset gate comes after the product with W_hn; as in ``GRU``. Default: ``True``

    Inputs: input (N, I) or (I,); h (N, H) or (H,), default zero.
    Outputs: h after the step, (N, H) or (H,).

    Parameters: ``weight_ih`` (3H, I), ``weight_hh`` (3H, H), ``bias_ih`` (3H,), ``bias_hh`` (3H,), gate order r, z, n, drawn
    from U(−1/√H, 1/√H). The equations are those of ``GRU``.

    Raises:
        ValueError, RuntimeError: with torch.nn.GRUCell's messages; TypeError if ``reset_after`` is no bool.

    >>> GRUCell(10, 20)(torch.randn(3, 10)).shape
    torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        recurrent_init: str | None = None,
        reset_after: bool = True,
    ) -> None:
        checks.check_flag("reset_after", reset_after)
        options = {"device": device, "dtype": dtype, "recurrent_init": recurrent_init}
        super().__init__(input_size, hidden_size, bias, **options)
        if not reset_after:
            self.reset_after = False

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; shapes and errors in the class docstring."""
        if symbolic.traced() and (proxy := symbolic.recorded(self, input, hx)) is not None:
            return proxy  # type: ignore[no-any-return]
        return self._step(GRU if self.reset_after else GRU_RESET_BEFORE, input, None if hx is None else (hx,))[0]


class LSTMCell(_Cell, torch.nn.LSTMCell):
    r"""One step of a long short-term memory: the fused replacement of torch.nn.LSTMCell.

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: ``True``
        device, dtype: of the parameters.
        forget_bias: what the forget gate's bias_ih + bias_hh start with: the value and zero. Default: ``None``, random
        recurrent_init: ``"orthogonal"`` draws each gate's block of ``weight_hh`` so. Default: ``None``, torch's values
        coupled: whether the forget gate is 1 − i; as in ``LSTM``: three gates, i, g, o. Default: ``False``

    Inputs: input (N, I) or (I,); the pair (h, c), each (N, H) or (H,), default zero.
    Outputs: the pair (h, c) after the step, each (N, H) or (H,).

    Parameters: ``weight_ih`` (4H, I), ``weight_hh`` (4H, H), ``bias_ih`` (4H,), ``bias_hh`` (4H,), gate order i, f, g, o, drawn
    from U(−1/√H, 1/√H). The equations are those of ``LSTM``.

    Raises:
        ValueError, RuntimeError: with torch.nn.LSTMCell's messages; TypeError if ``coupled`` is no bool, ValueError for
            ``forget_bias`` with it.

    >>> h, c = LSTMCell(10, 20)(torch.randn(3, 10))
    >>> h.shape
    torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        forget_bias: float | None = None,
        recurrent_init: str | None = None,
        coupled: bool = False,
    ) -> None:
        checks.check_coupled(coupled, forget_bias)
        options = {"device": device, "dtype": dtype, "forget_bias": forget_bias, "recurrent_init": recurrent_init}
        super().__init__(input_size, hidden_size, bias, **options)
        if coupled:
            self.coupled = True
            keep_gates(self, _NAMES, LSTM_COUPLED)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take one step; shapes and errors in the class docstring."""
        if symbolic.traced() and (proxy := symbolic.recorded(self, input, hx)) is not None:
            return proxy  # type: ignore[no-any-return]
        h, c = self._step(LSTM_COUPLED if self.coupled else LSTM, input, calls.pair(hx, "lstm_cell"))
        return h, c
