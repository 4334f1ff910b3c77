"""Recurrent modules for inference with int8 weights: what ``fused_rnn.quantize_dynamic`` makes of the float modules.

As torch's dynamically quantized modules: weights are rounded once, to 8 bits; the rows that they are multiplied with, of the
input and of h, are rounded on the way; everything else, and what goes in and comes out, is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from fused_rnn.cells import GRU as GRU_CELL
from fused_rnn.cells import LSTM as LSTM_CELL
from fused_rnn.cells import RNN_RELU, RNN_TANH
from fused_rnn.data.cell import Cell
from fused_rnn.data.int8 import Packed, packed, quantized, unpacked
from fused_rnn.kernels.protocol import Int8Weights
from fused_rnn.nn import calls, checks, quantized_calls, symbolic
from fused_rnn.nn import layers as layer_modules
from fused_rnn.nn.stack_options import StackOptions

__all__ = ["QuantizedGRU", "QuantizedLSTM", "QuantizedRNN"]


class Quantized(nn.Module):
    """What the modules share: weights and their names.

    For each layer and direction, with torch's suffix (``_l0``, ``_l0_reverse``; none of a cell), the state_dict has in int8
    ``weight_ih`` (G·H, I) and ``weight_hh`` (G·H, H), and in float32 ``scale_ih`` and ``scale_hh`` (G·H,), with ``bias``
    ``bias_ih`` and ``bias_hh`` (G·H,) too. A row of the weight is its whole numbers times its scale. In memory the weights are
    kept once, in the order that the kernels read.
    """

    # The float module of the same name.
    _FLOAT_MODULE: ClassVar[type[nn.Module]]

    input_size: int
    hidden_size: int
    bias: bool
    # The buffers of each layer and direction, in the order of ``Int8Weights``.
    _names: list[list[str]]

    def _suffixes(self) -> list[tuple[str, int]]:
        """Of each layer and direction, the suffix and the features of its input."""
        raise NotImplementedError

    @property
    def cell(self) -> Cell:
        """Which cell it is."""
        raise NotImplementedError

    def _make(self) -> None:
        """Weights of zero."""
        rows = self.cell.num_gates * self.hidden_size
        self._names = [
            [f"packed_{field}_{which}{suffix}" for which in ("ih", "hh") for field in Packed._fields]
            + [f"bias_{which}{suffix}" for which in ("ih", "hh")]
            for suffix, _ in self._suffixes()
        ]
        for suffix, inner in self._suffixes():
            for which, columns in (("ih", inner), ("hh", self.hidden_size)):
                self._keep(which + suffix, torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows))
                self.register_buffer(f"bias_{which}{suffix}", torch.zeros(rows) if self.bias else None)

    def _keep(self, name: str, whole: Tensor, scale: Tensor) -> None:
        for field, value in packed(whole, scale, self.cell.num_gates)._asdict().items():
            self.register_buffer(f"packed_{field}_{name}", value, persistent=False)

    def _kept(self, name: str) -> Packed:
        return Packed(*(self._buffers[f"packed_{field}_{name}"] for field in Packed._fields))  # type: ignore[arg-type]

    def _weights(self) -> list[Int8Weights]:
        buffers = self._buffers
        return [Int8Weights._make([buffers[name] for name in names]) for names in self._names]

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Quantized:
        """Make the module of a float one, fused or torch.nn's.

        This is what torch.ao.quantization calls of a mapping's module.

        Args:
            mod: RNN, LSTM, GRU or a cell, of this package or torch.nn's, with parameters on the CPU. If it has a qconfig of
                torch.ao.quantization, that asks for int8.
            use_precomputed_fake_quant: of no effect here, as there are no observers.

        Raises:
            NotImplementedError: for a projection, ``reset_after=False``, ``coupled=True``, ``connections`` or ``num_heads``,
                and for a qconfig that asks for another dtype.
            ValueError: if a weight has a NaN or an infinity.
        """
        reason = cls.refuses(mod)
        if reason is not None:
            raise NotImplementedError(f"fused_rnn: {type(mod).__name__} cannot be quantized: {reason}")
        made = cls._like(mod)
        made.train(mod.training)
        with torch.no_grad():
            for suffix, _ in made._suffixes():
                for which in ("ih", "hh"):
                    made._keep(which + suffix, *quantized(getattr(mod, f"weight_{which}{suffix}")))
                    if made.bias:
                        bias = getattr(mod, f"bias_{which}{suffix}").detach()
                        made.register_buffer(f"bias_{which}{suffix}", bias.to(torch.float32, copy=True))
        return made

    @staticmethod
    def refuses(mod: nn.Module) -> str | None:
        """Why a float module cannot be quantized."""
        if getattr(mod, "proj_size", 0):
            return "no int8 kernel has a projection (proj_size)"
        if not getattr(mod, "reset_after", True):
            return "no int8 kernel has reset_after=False"
        if getattr(mod, "coupled", False):
            return "no int8 kernel has coupled=True"
        if isinstance(mod, StackOptions) and mod.connections is not None:
            return f"no int8 module has connections between its layers ({mod.connections!r})"
        if isinstance(mod, StackOptions) and mod.num_heads > 1:
            return f"no int8 module has several heads (num_heads={mod.num_heads})"
        qconfig: Any = getattr(mod, "qconfig", None)
        dtype = torch.qint8 if qconfig is None else qconfig.weight().dtype
        if dtype != torch.qint8:
            return f"its qconfig asks for weights of {dtype}, expected torch.qint8"
        return None

    @classmethod
    def _like(cls, mod: Any) -> Quantized:
        """A module of the same sizes and options."""
        raise NotImplementedError

    def dequantize(self) -> nn.Module:
        """The fused float module that computes with the same weights: whole numbers times scales, in float32."""
        made = self._float()
        made.train(self.training)
        own = made.state_dict()
        for suffix, inner in self._suffixes():
            for which, columns in (("ih", inner), ("hh", self.hidden_size)):
                whole, scale = unpacked(self._kept(which + suffix), self.cell.num_gates, self.hidden_size, columns)
                own[f"weight_{which}{suffix}"] = whole * scale[:, None]
                if self.bias:
                    own[f"bias_{which}{suffix}"] = self._buffers[f"bias_{which}{suffix}"]
        made.load_state_dict(own)
        return made

    def _float(self) -> nn.Module:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for suffix, inner in self._suffixes():
            for which, columns in (("ih", inner), ("hh", self.hidden_size)):
                whole, scale = unpacked(self._kept(which + suffix), self.cell.num_gates, self.hidden_size, columns)
                destination[f"{prefix}weight_{which}{suffix}"] = whole
                destination[f"{prefix}scale_{which}{suffix}"] = scale

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found, taken = dict(state_dict), []
        rows = self.cell.num_gates * self.hidden_size
        for suffix, inner in self._suffixes():
            for which, columns in (("ih", inner), ("hh", self.hidden_size)):
                names = [f"{prefix}{kind}_{which}{suffix}" for kind in ("weight", "scale")]
                taken += names
                missing = [name for name in names if name not in found]
                missing_keys += missing if strict else []
                if missing:
                    continue
                whole, scale = (found[name] for name in names)
                if whole.dtype != torch.int8 or whole.shape != (rows, columns) or scale.shape != (rows,):
                    error_msgs.append(
                        f"{names[0]}: expected torch.int8 of shape {(rows, columns)} and a scale of shape {(rows,)}, got "
                        f"{whole.dtype} of shape {tuple(whole.shape)} and {tuple(scale.shape)}. "
                        "A float module's weights are quantized by fused_rnn.quantize_dynamic"
                    )
                    continue
                # With assign=True, what is loaded decides, as for a module that was made on the meta device.
                assigned = local_metadata.get("assign_to_params_buffers", False)
                device = scale.device if assigned else self._kept(which + suffix).scale.device
                self._keep(which + suffix, whole.to(device), scale.to(device, torch.float32))
        rest = {name: value for name, value in found.items() if name not in taken}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `half()`, `to(dtype)` and the like are about the float modules of a model: scales and biases stay in float32.
        def keeping(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keeping, recurse)  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            "torch.jit.script cannot compile the kernels of fused_rnn: use torch.export, torch.compile or torch.jit.trace, or "
            "script the float model"
        )


class _Layers(Quantized):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self._make()

    def _suffixes(self) -> list[tuple[str, int]]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        inner = self.hidden_size * len(directions)
        return [
            (f"_l{layer}{direction}", inner if layer else self.input_size)
            for layer in range(self.num_layers)
            for direction in directions
        ]

    @classmethod
    def _like(cls, mod: Any) -> Quantized:
        options = (mod.num_layers, mod.bias, mod.batch_first, mod.dropout, mod.bidirectional)
        return cls(mod.input_size, mod.hidden_size, *options)

    def _float(self) -> nn.Module:
        sizes = (self.input_size, self.hidden_size, self.num_layers)
        options = {"bias": self.bias, "batch_first": self.batch_first, "bidirectional": self.bidirectional}
        return self._FLOAT_MODULE(*sizes, dropout=self.dropout, **options, **self._options())

    def _options(self) -> dict[str, Any]:
        """Of the float module's constructor."""
        return {}

    def _run(self, input: Any, states: Any, lengths: Any, reset: Any, cell_states: bool = False) -> Any:
        dropout = self.dropout if self.training else 0.0
        directions = 2 if self.bidirectional else 1
        stack = quantized_calls.Stack(self.cell, self.input_size, self.hidden_size, directions, self._weights(), dropout)
        return quantized_calls.sequence(stack, self.batch_first, input, states, lengths, reset, cell_states)

    def flatten_parameters(self) -> None:
        """Do nothing: here so that callers of torch.nn's keep working."""

    def extra_repr(self) -> str:
        """As torch.nn's."""
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        return described(self, defaults.items())


def described(module: Any, defaults: Iterable[tuple[str, Any]]) -> str:
    """The sizes, and the options that differ from their defaults."""
    options = [f", {name}={value}" for name, default in defaults if (value := getattr(module, name)) != default]
    return f"{module.input_size}, {module.hidden_size}{''.join(options)}"


class QuantizedRNN(_Layers):
    """An RNN with int8 weights; arguments and results of ``forward`` are those of ``fused_rnn.RNN``, in float32.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional: as of ``fused_rnn.RNN``.
            The weights are zero, to be loaded.

    Raises: as ``QuantizedLSTM``.
    """

    _FLOAT_MODULE = layer_modules.RNN

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", *args: Any, **kwargs: Any
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, num_layers, *args, **kwargs)

    @property
    def cell(self) -> Cell:
        """Which cell it is."""
        return RNN_TANH if self.nonlinearity == "tanh" else RNN_RELU

    @classmethod
    def _like(cls, mod: Any) -> Quantized:
        options = (mod.num_layers, mod.nonlinearity, mod.bias, mod.batch_first, mod.dropout, mod.bidirectional)
        return cls(mod.input_size, mod.hidden_size, *options)

    def _options(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}

    def extra_repr(self) -> str:
        """As torch.nn's, and the nonlinearity if it is relu."""
        return super().extra_repr() + ("" if self.nonlinearity == "tanh" else ", nonlinearity=relu")

    def forward(self, input: Any, hx: Tensor | None = None, *, lengths: Any = None, reset: Any = None) -> Any:
        """Run the layers; shapes and errors as ``fused_rnn.RNN``."""
        return _single(self, input, hx, lengths, reset)


class QuantizedGRU(_Layers):
    """A GRU with int8 weights; arguments and results of ``forward`` are those of ``fused_rnn.GRU``, in float32.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as of ``fused_rnn.GRU``. The weights are
            zero, to be loaded.

    Raises: as ``QuantizedLSTM``.
    """

    _FLOAT_MODULE = layer_modules.GRU

    @property
    def cell(self) -> Cell:
        """Which cell it is."""
        return GRU_CELL

    def forward(self, input: Any, hx: Tensor | None = None, *, lengths: Any = None, reset: Any = None) -> Any:
        """Run the layers; shapes and errors as ``fused_rnn.GRU``."""
        return _single(self, input, hx, lengths, reset)


def _single(module: _Layers, input: Any, hx: Tensor | None, lengths: Any, reset: Any) -> Any:
    if symbolic.traced() and (proxy := symbolic.recorded(module, input, hx, lengths=lengths, reset=reset)) is not None:
        return proxy
    out, states, _ = module._run(input, None if hx is None else (hx,), lengths, reset)
    return out, states[0]


class QuantizedLSTM(_Layers):
    """An LSTM with int8 weights; arguments and results of ``forward`` are those of ``fused_rnn.LSTM``, in float32.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as of ``fused_rnn.LSTM``. The weights
            are zero, to be loaded.

    Raises:
        TypeError, ValueError, RuntimeError: in ``forward`` as the float module; ValueError for an input that is not float32;
            RuntimeError in a backward that arrives here, because there are no gradients, and if the C++ backend is not there.
    """

    _FLOAT_MODULE = layer_modules.LSTM

    @property
    def cell(self) -> Cell:
        """Which cell it is."""
        return LSTM_CELL

    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Any = None,
        reset: Any = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Run the layers; shapes and errors as ``fused_rnn.LSTM``."""
        if symbolic.traced():
            keywords = {"lengths": lengths, "reset": reset, "return_cell_states": return_cell_states}
            if (proxy := symbolic.recorded(self, input, hx, **keywords)) is not None:
                return proxy
        if return_cell_states is not False:
            checks.check_flag("return_cell_states", return_cell_states)
        out, after, cells = self._run(input, calls.pair(hx, "lstm"), lengths, reset, return_cell_states)
        return (out, after) if cells is None else (out, after, cells)
