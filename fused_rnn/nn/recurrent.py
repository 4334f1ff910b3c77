"""Any cell as a module: a stack of layers, as ``torch.nn.LSTM`` is one of its cell."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.cells.definition import Definition
from fused_rnn.data.cell import Weights
from fused_rnn.nn import calls, checks, symbolic
from fused_rnn.nn.stack_options import StackOptions

__all__ = ["Recurrent"]

Input = TypeVar("Input", Tensor, PackedSequence)


class Recurrent(StackOptions):
    r"""A stack of recurrences of a cell that was made by ``fused_rnn.cell``.

    Args:
        cell: which cell: your own, or of ``fused_rnn.cells``: ``mgu``, ``gru_reset_before``, ``gru``, ``lstm``, ``rnn_tanh``,
            ``rnn_relu``.
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        num_layers: layers, L. Default: 1
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: whether a batched input and output have N before T. Default: ``False``
        dropout: the probability of zeroing an output of all layers but the last in training. Default: 0
        bidirectional: whether a second recurrence walks from the last step to the first (D = 2). Default: ``False``
        device, dtype: of the parameters.
        connections, weight_dropout, num_heads: as of ``fused_rnn.LSTM``, with H in place of P

    Inputs: input, hx
        - **input**: (T, N, I), (N, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence.
        - **hx**: the states before the first step, (D·L, N, H) each, or (D·L, H) unbatched; a pair where the cell has two.
          Default: zero
        - **lengths**, **reset** (keywords): as of ``fused_rnn.LSTM``.

    Outputs: output, states
        - **output**: h of the last layer at every step, (T, N, D·H), (N, T, D·H), (T, D·H) or a PackedSequence.
        - **states**: those of every layer after its last step, as ``hx``.

    Parameters, per layer k and direction: ``weight_ih_l{k}`` (G·H, I or D·H), ``weight_hh_l{k}`` (G·H, H), ``bias_ih_l{k}`` and
    ``bias_hh_l{k}`` (G·H,), and the same with ``_reverse``; G gates, in the order of the cell. They are drawn from
    U(−1/√H, 1/√H).

    Raises:
        TypeError: if ``cell`` is no cell, or a size is no integer.
        ValueError: if a size is not positive, ``dropout`` or ``weight_dropout`` no probability, ``connections`` none of those
            or no layer could have such a one, or ``num_heads`` no divisor of H.
        NotImplementedError: in ``forward``, on a device without a backend that makes kernels of equations.
        TypeError, ValueError, RuntimeError: in ``forward``, as of ``fused_rnn.LSTM``.

    >>> from fused_rnn import cell
    >>> from fused_rnn.cells import sigmoid, tanh
    >>> @cell(gates="f g")
    ... def forgetful(x, W, h):
    ...     f = sigmoid(x.f + W.f(h))
    ...     return f * h + (1 - f) * tanh(x.g + W.g(h))
    >>> rnn = Recurrent(forgetful, 10, 20, num_layers=2)
    >>> output, h_n = rnn(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        cell: Definition,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        connections: str | None = None,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
    ) -> None:
        super().__init__(connections=connections, weight_dropout=weight_dropout, num_heads=num_heads)
        if not isinstance(cell, Definition):
            raise TypeError(f"cell: expected a cell made by fused_rnn.cell, got {type(cell).__name__}")
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value <= 0:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability, 0 to 1, got {dropout!r}")
        self.cell = cell
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        rows = cell.row.num_gates * hidden_size
        directions = 2 if bidirectional else 1
        self._names: list[tuple[str, ...]] = []
        for layer in range(num_layers):
            inputs = input_size if layer == 0 else directions * hidden_size
            for suffix in ("", "_reverse")[:directions]:
                shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, inputs), "weight_hh": (rows, hidden_size)}
                if bias:
                    shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
                names = tuple(f"{kind}_l{layer}{suffix}" for kind in shapes)
                for name, shape in zip(names, shapes.values(), strict=True):
                    values = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(name, torch.nn.Parameter(values))
                self._names.append(names)
        self._make_connections()
        self._make_heads()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, from U(−1/√H, 1/√H); but a highway's bias is −1."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)
        self._shut_gates()

    def extra_repr(self) -> str:
        """The cell, the sizes, and what is not as by default."""
        text = f"{self.cell.body.__name__}, {self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value}"
        return text + self._described()

    def forward(
        self, input: Input, hx: Any = None, *positional: None, lengths: Tensor | None = None, reset: Input | None = None
    ) -> tuple[Input, Any]:
        """Run the layers; shapes and errors in the class docstring."""
        if positional:
            checks.refuse_positional(self, positional)
        if symbolic.traced() and (proxy := symbolic.recorded(self, input, hx, lengths=lengths, reset=reset)) is not None:
            return proxy  # type: ignore[no-any-return]
        cell = self.cell.row
        weights = [Weights(*[getattr(self, name) for name in names]) for names in self._names]
        states = hx
        if hx is not None:
            states = (hx,) if len(cell.states) == 1 else calls.pair(hx, cell.mode)
        out, after, _ = self._run(cell, input, weights, states, lengths, reset)
        return out, after[0] if len(after) == 1 else after
