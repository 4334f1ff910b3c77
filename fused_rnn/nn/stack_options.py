"""What a stack of layers may have that torch.nn's have not: connections between its layers, dropped out weights, heads."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_rnn.data.cell import Cell, Weights
from fused_rnn.nn import calls
from fused_rnn.nn.connections import Connection, Dense, Highway, Residual
from fused_rnn.nn.heads import join_states, split_states, split_weights

__all__ = ["ATTRIBUTES", "ConnectedLayers", "StackOptions"]

# The attributes that ``StackOptions`` adds to a module, and what they are by default.
ATTRIBUTES = {"connections": None, "weight_dropout": 0.0, "num_heads": 1}

_KINDS = ("residual", "highway", "dense")
# The transform gates start mostly shut: Srivastava et al. 2015, section 2.2, whose first example this value is.
_CARRY = -1.0


class _Options(NamedTuple):
    connections: str | None = None
    weight_dropout: float = 0.0
    num_heads: int = 1


class StackOptions(nn.Module):
    """What RNN, LSTM, GRU and Recurrent share: the options, and the parameters that they change.

    It reads the sizes that torch.nn.RNNBase keeps: input_size, hidden_size, num_layers, bidirectional, proj_size.
    """

    # None without any option: the one thing that a plain call looks at.
    _stack_options: _Options | None = None

    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    batch_first: bool
    dropout: float

    def __init__(
        self,
        *args: Any,
        connections: str | None = None,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
        **kwargs: Any,
    ) -> None:
        _check_kind(connections)
        _check_probability(weight_dropout)
        _check_heads(num_heads)
        self._keep_options(_Options(connections, float(weight_dropout), num_heads))
        super().__init__(*args, **kwargs)

    @property
    def connections(self) -> str | None:
        """``"residual"``, ``"highway"``, ``"dense"``, or None. It is fixed, because parameters depend on it."""
        return None if self._stack_options is None else self._stack_options.connections

    @property
    def weight_dropout(self) -> float:
        """The probability of zeroing an element of ``weight_hh`` in training; may be set at any time."""
        return 0.0 if self._stack_options is None else self._stack_options.weight_dropout

    @weight_dropout.setter
    def weight_dropout(self, value: float) -> None:
        _check_probability(value)
        self._keep_options((self._stack_options or _Options())._replace(weight_dropout=float(value)))

    @property
    def num_heads(self) -> int:
        """How many groups of units there are that do not read each other's h. It is fixed, because parameters depend on it."""
        return 1 if self._stack_options is None else self._stack_options.num_heads

    def _keep_options(self, options: _Options) -> None:
        if options != _Options():
            self._stack_options = options
        else:
            vars(self).pop("_stack_options", None)

    @property
    def _features(self) -> int:
        """Of the output of a layer, D·P."""
        return (2 if self.bidirectional else 1) * (getattr(self, "proj_size", 0) or self.hidden_size)

    @property
    def _first(self) -> int:
        """The first layer around which a residual or a highway fits."""
        return 0 if self.input_size == self._features else 1

    def _make_connections(self) -> None:
        """Make and draw the parameters of the connections, once those of torch.nn's layers are there.

        Raises:
            ValueError: if there is no layer that could have such a connection.
        """
        kind, layers, features = self.connections, self.num_layers, self._features
        if kind is None:
            return
        if layers == 1 and (kind == "dense" or self._first):
            fits = "" if kind == "dense" else f", or for one layer an input_size of {features}, as many features as it gives"
            raise ValueError(
                f"connections: {kind!r} expects num_layers of 2 or more{fits}; "
                f"got num_layers=1 and input_size={self.input_size}"
            )
        if kind == "dense":
            for layer in range(1, layers):
                for suffix in ("", "_reverse") if self.bidirectional else ("",):
                    name = f"weight_ih_l{layer}{suffix}"
                    rows = self._parameters[name].shape[0]  # type: ignore[union-attr]
                    self._draw(name, rows, self.input_size + layer * features)
        elif kind == "highway":
            for layer in range(self._first, layers):
                self._draw(f"weight_t_l{layer}", features, features)
                self._draw(f"bias_t_l{layer}", features)
            self._shut_gates()

    def _draw(self, name: str, *shape: int) -> None:
        like: Any = self._parameters["weight_ih_l0"]
        parameter = nn.Parameter(like.new_empty(shape))
        bound = 1 / math.sqrt(self.hidden_size)
        self.register_parameter(name, nn.init.uniform_(parameter, -bound, bound))  # type: ignore[arg-type]

    def _shut_gates(self) -> None:
        """Have the highways carry at first."""
        if self.connections == "highway":
            for layer in range(self._first, self.num_layers):
                nn.init.constant_(getattr(self, f"bias_t_l{layer}"), _CARRY)

    def _make_heads(self) -> None:
        """Leave the recurrent weights as many columns as a head has units.

        Raises:
            ValueError: if the units cannot be shared so, or there is a projection.
        """
        heads = self.num_heads
        if heads == 1:
            return
        if self.hidden_size % heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size={self.hidden_size}, got {heads}")
        if getattr(self, "proj_size", 0):
            raise ValueError(f"num_heads: expected 1 with proj_size, as a projection mixes the units of all heads, got {heads}")
        for name, parameter in list(self._parameters.items()):
            if name.startswith("weight_hh") and parameter is not None:
                self.register_parameter(name, nn.Parameter(parameter.detach()[:, : self.hidden_size // heads].clone()))

    def _run(
        self, cell: Cell, input: Any, weights: list[Weights], states: Any, lengths: Any, reset: Any, cell_states: bool = False
    ) -> tuple[Any, Any, Any]:
        """Call the layers: with the weights masked where they are dropped out, and those of each head."""
        dropout = self.dropout if self.training else 0.0
        options = self._stack_options
        if options is None:
            return calls.sequence(
                cell, input, weights, states, self.bidirectional, self.batch_first, dropout, lengths, reset, cell_states
            )
        heads = options.num_heads
        if options.weight_dropout and self.training:
            p = options.weight_dropout
            weights = [Weights(w.ih, torch.dropout(w.hh, p, True), w.bias_ih, w.bias_hh, w.hr) for w in weights]
        if heads > 1:
            weights = split_weights(weights, heads)
            states = None if states is None else split_states(states, heads, self.hidden_size)
        out, after, cells = calls.sequence(
            cell,
            input,
            weights,
            states,
            self.bidirectional,
            self.batch_first,
            dropout,
            lengths,
            reset,
            cell_states,
            self._connection(options.connections),
            heads,
        )
        return out, after if heads == 1 else join_states(after, heads), cells

    def _connection(self, kind: str | None) -> Connection | None:
        if kind is None:
            return None
        if kind == "dense":
            return Dense()
        if kind == "residual":
            return Residual(self._first)
        gates: list[tuple[Tensor, Tensor]] = [
            (getattr(self, f"weight_t_l{layer}"), getattr(self, f"bias_t_l{layer}"))
            for layer in range(self._first, self.num_layers)
        ]
        return Highway(self._first, gates)

    def _described(self) -> str:
        """The options as ``extra_repr`` shows them."""
        text = "" if self.connections is None else f", connections={self.connections!r}"
        text += f", weight_dropout={self.weight_dropout}" if self.weight_dropout else ""
        return text + (f", num_heads={self.num_heads}" if self.num_heads > 1 else "")


class ConnectedLayers(StackOptions):
    """The same between what makes torch.nn's layers and what draws their parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._make_connections()
        if self.num_heads > 1:
            self._make_heads()
            # What is drawn depends on a block's columns.
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn's, and the highways carry."""
        super().reset_parameters()  # type: ignore[misc]
        if f"bias_t_l{self.num_layers - 1}" in self._parameters:
            self._shut_gates()

    def extra_repr(self) -> str:
        """As torch.nn's, and the options that were given."""
        return super().extra_repr() + self._described()


def _check_kind(connections: object) -> None:
    if connections is None:
        return
    if not isinstance(connections, str):
        raise TypeError(f"connections: expected a str or None, got {type(connections).__name__}")
    if connections not in _KINDS:
        raise ValueError(f"connections: expected one of {', '.join(_KINDS)} or None, got {connections!r}")


def _check_probability(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"weight_dropout: expected a probability, 0 to 1, got {value!r}")


def _check_heads(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"num_heads: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"num_heads: expected 1 or more, got {value}")
