"""Cells for inference with int8 weights, as the layers in ``fused_rnn.nn.quantized``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_rnn.cells import GRU, LSTM, RNN_RELU, RNN_TANH
from fused_rnn.data.cell import Cell
from fused_rnn.kernels.protocol import States
from fused_rnn.nn import calls, quantized_calls, symbolic
from fused_rnn.nn import cells as cell_modules
from fused_rnn.nn.quantized import Quantized, described

__all__ = ["QuantizedGRUCell", "QuantizedLSTMCell", "QuantizedRNNCell"]


class _Cell(Quantized):
    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self._make()

    def _suffixes(self) -> list[tuple[str, int]]:
        return [("", self.input_size)]

    @classmethod
    def _like(cls, mod: Any) -> Quantized:
        return cls(mod.input_size, mod.hidden_size, mod.bias)

    def _float(self) -> nn.Module:
        return self._FLOAT_MODULE(self.input_size, self.hidden_size, self.bias)

    def _step(self, input: Tensor, states: States | None) -> States:
        stack = quantized_calls.Stack(self.cell, self.input_size, self.hidden_size, 1, self._weights())
        return quantized_calls.step(stack, input, states)

    def extra_repr(self) -> str:
        """As torch.nn's."""
        return described(self, (("bias", True),))


class QuantizedRNNCell(_Cell):
    """One step of an RNN with int8 weights, as ``fused_rnn.RNNCell`` in float32."""

    _FLOAT_MODULE = cell_modules.RNNCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh") -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias)

    @property
    def cell(self) -> Cell:
        """Which cell it is."""
        return RNN_TANH if self.nonlinearity == "tanh" else RNN_RELU

    @classmethod
    def _like(cls, mod: Any) -> Quantized:
        return cls(mod.input_size, mod.hidden_size, mod.bias, mod.nonlinearity)

    def _float(self) -> nn.Module:
        return cell_modules.RNNCell(self.input_size, self.hidden_size, self.bias, self.nonlinearity)

    def extra_repr(self) -> str:
        """As torch.nn's."""
        return super().extra_repr() + ("" if self.nonlinearity == "tanh" else ", nonlinearity=relu")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; shapes and errors as ``fused_rnn.RNNCell``."""
        return _single(self, input, hx)


class QuantizedGRUCell(_Cell):
    """One step of a GRU with int8 weights, as ``fused_rnn.GRUCell`` in float32."""

    _FLOAT_MODULE = cell_modules.GRUCell

    @property
    def cell(self) -> Cell:
        """Which cell it is."""
        return GRU

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; shapes and errors as ``fused_rnn.GRUCell``."""
        return _single(self, input, hx)


def _single(module: _Cell, input: Tensor, hx: Tensor | None) -> Tensor:
    if symbolic.traced() and (proxy := symbolic.recorded(module, input, hx)) is not None:
        return proxy  # type: ignore[no-any-return]
    return module._step(input, None if hx is None else (hx,))[0]


class QuantizedLSTMCell(_Cell):
    """One step of an LSTM with int8 weights, as ``fused_rnn.LSTMCell`` in float32."""

    _FLOAT_MODULE = cell_modules.LSTMCell

    @property
    def cell(self) -> Cell:
        """Which cell it is."""
        return LSTM

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take one step; shapes and errors as ``fused_rnn.LSTMCell``."""
        if symbolic.traced() and (proxy := symbolic.recorded(self, input, hx)) is not None:
            return proxy  # type: ignore[no-any-return]
        h, c = self._step(input, calls.pair(hx, "lstm_cell"))
        return h, c
