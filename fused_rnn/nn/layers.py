"""The modules: torch.nn's contract (arguments, parameters, state_dict, results, errors) over ``fused_rnn.nn.calls``.

They derive from torch.nn.RNNBase, which makes and checks the parameters, and not from torch.nn.LSTM and its like, at whose
instances torch.compile stops tracing. The cells are in ``fused_rnn.nn.cells``.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.cells import GRU as GRU_CELL
from fused_rnn.cells import GRU_RESET_BEFORE, LSTM_COUPLED, RNN_RELU, RNN_TANH
from fused_rnn.cells import LSTM as LSTM_CELL
from fused_rnn.nn import calls, checks, symbolic
from fused_rnn.nn.flat_weights import FlatWeights
from fused_rnn.nn.initialisation import Initialised, keep_gates
from fused_rnn.nn.qconfig import Quantizable
from fused_rnn.nn.stack_options import ConnectedLayers

__all__ = ["GRU", "LSTM", "RNN"]

Input = TypeVar("Input", torch.Tensor, PackedSequence)


class _Layers(Quantizable, Initialised, ConnectedLayers, FlatWeights):
    """What RNN, LSTM and GRU share."""


class RNN(_Layers):
    r"""A stack of simple (Elman) recurrences: the fused replacement of torch.nn.RNN.

    .. math:: h_t = \phi(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        num_layers: layers, L. Default: 1
        nonlinearity: ``'tanh'`` or ``'relu'``. Default: ``'tanh'``
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: whether a batched input and output have N before T. Default: ``False``
        dropout: the probability of zeroing an output of all layers but the last in training. Default: 0
        bidirectional: whether a second recurrence walks from the last step to the first (D = 2). Default: ``False``
        device, dtype: of the parameters.
        recurrent_init: ``"orthogonal"`` draws each gate's block of ``weight_hh`` so. Default: ``None``, torch's values
        connections, weight_dropout, num_heads: as of ``LSTM``

    Inputs: input, h_0
        - **input**: (T, N, I), (N, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence.
        - **h_0**: (D·L, N, H), or (D·L, H) unbatched. Default: zero
        - **lengths**, **reset** (keywords): how many steps of each sequence count, and where its state starts anew; see
          ``LSTM``.

    Outputs: output, h_n
        - **output**: h of the last layer at every step, (T, N, D·H), (N, T, D·H), (T, D·H) or a PackedSequence.
        - **h_n**: h of every layer after its last step, in the shape of h_0.

    Parameters, per layer k and direction: ``weight_ih_l{k}`` (H, I or D·H), ``weight_hh_l{k}`` (H, H), ``bias_ih_l{k}`` (H,),
    ``bias_hh_l{k}`` (H,), and the same with ``_reverse``. They are drawn from U(−1/√H, 1/√H).

    Raises:
        TypeError, ValueError, RuntimeError: with torch.nn.RNN's messages, in the constructor and in ``forward``; TypeError and
            ValueError for keywords of a wrong type or shape, or lengths that are not 0 … T.

    >>> rnn = RNN(10, 20, 2)
    >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
    >>> output.shape
    torch.Size([5, 3, 20])
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        recurrent_init: str | None = None,
        connections: str | None = None,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        checks.refuse_proj_size(kwargs)
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)

    def forward(
        self,
        input: Input,
        hx: Tensor | None = None,
        *positional: None,
        lengths: Tensor | None = None,
        reset: Input | None = None,
    ) -> tuple[Input, Tensor]:
        """Run the layers; shapes and errors in the class docstring."""
        if positional:
            checks.refuse_positional(self, positional)
        if symbolic.traced() and (proxy := symbolic.recorded(self, input, hx, lengths=lengths, reset=reset)) is not None:
            return proxy  # type: ignore[no-any-return]
        cell = RNN_TANH if self.mode == "RNN_TANH" else RNN_RELU
        out, states, _ = self._run(cell, input, self._weights(), None if hx is None else (hx,), lengths, reset)
        return out, states[0]


class GRU(_Layers):
    r"""A stack of gated recurrent units: the fused replacement of torch.nn.GRU.

    .. math::
        \begin{array}{ll}
        r_t = \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t = \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t = \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}
        \end{array}

    With ``reset_after=False``, the reset gate comes before the product, which torch.nn has not:
    :math:`n_t = \tanh(W_{in} x_t + b_{in} + W_{hn} (r_t \odot h_{t-1}) + b_{hn})`.

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        num_layers: layers, L. Default: 1
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: whether a batched input and output have N before T. Default: ``False``
        dropout: the probability of zeroing an output of all layers but the last in training. Default: 0
        bidirectional: whether a second recurrence walks from the last step to the first (D = 2). Default: ``False``
        device, dtype: of the parameters.
        recurrent_init: ``"orthogonal"`` draws each gate's block of ``weight_hh`` so. Default: ``None``, torch's values
        reset_after: whether the reset gate comes after the product with W_hn, as in torch.nn and cuDNN; or before it, as in Cho
            et al. 2014, ONNX's ``linear_before_reset=0`` and Keras' ``reset_after=False``. The parameters are the same, what
            they compute is not. Default: ``True``
        connections, weight_dropout, num_heads: as of ``LSTM``

    Inputs: input, h_0
        - **input**: (T, N, I), (N, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence.
        - **h_0**: (D·L, N, H), or (D·L, H) unbatched. Default: zero
        - **lengths**, **reset** (keywords): how many steps of each sequence count, and where its state starts anew; see
          ``LSTM``.

    Outputs: output, h_n
        - **output**: h of the last layer at every step, (T, N, D·H), (N, T, D·H), (T, D·H) or a PackedSequence.
        - **h_n**: h of every layer after its last step, in the shape of h_0.

    Parameters, per layer k and direction: ``weight_ih_l{k}`` (3H, I or D·H), ``weight_hh_l{k}`` (3H, H), ``bias_ih_l{k}``
    (3H,), ``bias_hh_l{k}`` (3H,), and the same with ``_reverse``; gate order r, z, n. They are drawn from U(−1/√H, 1/√H).

    Raises:
        TypeError, ValueError, RuntimeError: with torch.nn.GRU's messages, in the constructor and in ``forward``; TypeError and
            ValueError for keywords of a wrong type or shape, or lengths that are not 0 … T; TypeError if ``reset_after`` is no
            bool.

    >>> rnn = GRU(10, 20, 2)
    >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
    >>> output.shape
    torch.Size([5, 3, 20])
    """

    @overload
    def __init__(
        self,
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
        recurrent_init: str | None = None,
        reset_after: bool = True,
        connections: str | None = None,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        checks.refuse_proj_size(kwargs)
        checks.check_flag("reset_after", reset_after)
        super().__init__("GRU", *args, **kwargs)
        if not reset_after:
            self.reset_after = False

    def forward(
        self,
        input: Input,
        hx: Tensor | None = None,
        *positional: None,
        lengths: Tensor | None = None,
        reset: Input | None = None,
    ) -> tuple[Input, Tensor]:
        """Run the layers; shapes and errors in the class docstring."""
        if positional:
            checks.refuse_positional(self, positional)
        if symbolic.traced() and (proxy := symbolic.recorded(self, input, hx, lengths=lengths, reset=reset)) is not None:
            return proxy  # type: ignore[no-any-return]
        cell = GRU_CELL if self.reset_after else GRU_RESET_BEFORE
        out, states, _ = self._run(cell, input, self._weights(), None if hx is None else (hx,), lengths, reset)
        return out, states[0]


class LSTM(_Layers):
    r"""A stack of long short-term memories: the fused replacement of torch.nn.LSTM.

    .. math::
        \begin{array}{ll}
        i_t = \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t = \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t = \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t = \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t = f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t = o_t \odot \tanh(c_t)
        \end{array}

    With ``proj_size`` P > 0, :math:`h_t = W_{hr} (o_t \odot \tanh(c_t))` has P features; otherwise P is H below.

    With ``coupled=True``, :math:`f_t = 1 - i_t`: there are three gates, i, g, o, and 3H in place of 4H below.

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        num_layers: layers, L. Default: 1
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: whether a batched input and output have N before T. Default: ``False``
        dropout: the probability of zeroing an output of all layers but the last in training. Default: 0
        bidirectional: whether a second recurrence walks from the last step to the first (D = 2). Default: ``False``
        proj_size: features of a projected h, smaller than ``hidden_size``; 0 for none. Default: 0
        device, dtype: of the parameters.
        forget_bias: what the forget gates' bias_ih + bias_hh start with: the value and zero. Default: ``None``, random
        recurrent_init: ``"orthogonal"`` draws each gate's block of ``weight_hh`` so. Default: ``None``, torch's values
        coupled: whether the forget gate is 1 − i, as in Greff et al. 2017 and ONNX's ``input_forget=1``. Default: ``False``
        connections: around the layers: ``"residual"``, ``"highway"`` or ``"dense"``, below. Default: ``None``
        weight_dropout: the probability of zeroing an element of ``weight_hh`` in training, below. Default: 0
        num_heads: groups of units that read no h but their own, below. Default: 1

    Options of a stack that torch.nn has not. With x what layer k reads and y its output:
        - **connections="residual"** (He et al. 2016): layer k gives y + x. Around each layer that gives as many features as it
          reads, D·P: all but the first, and the first where ``input_size`` is D·P.
        - **connections="highway"** (Srivastava et al. 2015, Zhang et al. 2016): layer k gives t ⊙ y + (1 − t) ⊙ x with the gate
          t = σ(W_t x + b_t), around the same layers. ``weight_t_l{k}`` (D·P, D·P) is drawn as the others; ``bias_t_l{k}``
          (D·P,), there with ``bias=False`` too, starts at −1: x is carried at first.
        - **connections="dense"** (Huang et al. 2017): layer k reads the input of the module and the outputs of all layers
          before it, and ``weight_ih_l{k}`` has I + k·D·P columns. The output is the last layer's.
        - ``dropout`` is inside of a connection: a layer reads dropout(x), and x itself is added, gated and carried. Of a dense
          one each y is dropped out once, for all layers; the module's input never is.
        - h_n, c_n and cell_states are the layers' own: with a residual or a highway, the output is another than h_n's last.
        - **weight_dropout** (Wan et al. 2013, Merity et al. 2018): in training, each call draws one mask over the weight_hh of
          each layer and direction, for all steps; what is left is divided by 1 − p. It may be set later.
        - **num_heads** (Pöppel et al. 2025): ``weight_hh`` (4H, H / heads) has blocks on a diagonal. Rows of weights and biases
          lie head after head, each with its gates; h has a head's units next to each other. Not with ``proj_size``.

    Inputs: input, (h_0, c_0)
        - **input**: (T, N, I), (N, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence.
        - **h_0**: (D·L, N, P), or (D·L, P) unbatched. Default: zero
        - **c_0**: (D·L, N, H), or (D·L, H) unbatched. Default: zero

    Keywords that torch.nn has not:
        - **lengths**: integers (N,), () unbatched, on any device: how many steps of each padded sequence count, 0 … T, in any
          order. As packing, running and padding again: the output is zero beyond a length, h_n and c_n are the states there
          (h_0 and c_0 for length 0), the reverse direction starts there, and no work is done for the steps beyond. Not with a
          PackedSequence, which has lengths of its own. The same for all members of ``torch.func.vmap``. Default: all T
        - **reset**: booleans (T, N), (N, T) with ``batch_first``, (T,) unbatched, or a PackedSequence like the input. Where
          set, h and c are zero before that step, and no gradient crosses. The steps before a reset and those after it do not
          see each other in any layer or direction: the reverse direction enters the step *before* the reset with zero states.
          A reset at the first step discards the h_0 and c_0 of the forward direction. Default: nowhere
        - **return_cell_states**: whether c of every step is a third output. Default: ``False``

    Outputs: output, (h_n, c_n), or with ``return_cell_states`` output, (h_n, c_n), cell_states
        - **output**: h of the last layer at every step, (T, N, D·P), (N, T, D·P), (T, D·P) or a PackedSequence.
        - **h_n**, **c_n**: the states of every layer after its last step, in the shapes of h_0 and c_0.
        - **cell_states**: c of the last layer at every step, (T, N, D·H), (N, T, D·H), (T, D·H) or a PackedSequence; H features
          for each direction with a projection too. Zero beyond ``lengths``. Gradients flow through it.

    Parameters, per layer k and direction: ``weight_ih_l{k}`` (4H, I or D·P), ``weight_hh_l{k}`` (4H, P), ``bias_ih_l{k}``
    (4H,), ``bias_hh_l{k}`` (4H,), with a projection ``weight_hr_l{k}`` (P, H), and the same with ``_reverse``; gate order i, f,
    g, o. They are drawn from U(−1/√H, 1/√H).

    Raises:
        TypeError, ValueError, RuntimeError: with torch.nn.LSTM's messages, in the constructor and in ``forward``; TypeError and
            ValueError for keywords of a wrong type or shape, or lengths that are not 0 … T; ValueError for ``forget_bias``
            with ``coupled``, which has no such gate.

    >>> rnn = LSTM(10, 20, 2)
    >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10), (torch.randn(2, 3, 20), torch.randn(2, 3, 20)))
    >>> output.shape
    torch.Size([5, 3, 20])
    >>> output, (h_n, c_n), cells = rnn(torch.randn(5, 3, 10), lengths=torch.tensor([2, 5, 0]), return_cell_states=True)
    >>> torch.equal(cells[1, 0], c_n[-1, 0]), cells[2:, 0].count_nonzero()
    (True, tensor(0))
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        forget_bias: float | None = None,
        recurrent_init: str | None = None,
        coupled: bool = False,
        connections: str | None = None,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, coupled: bool = False, **kwargs: Any) -> None:
        checks.check_coupled(coupled, kwargs.get("forget_bias"))
        super().__init__("LSTM", *args, **kwargs)
        if coupled:
            self.coupled = True
            keep_gates(self, self._flat_weights_names, LSTM_COUPLED)

    @overload
    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        *positional: None,
        lengths: Tensor | None = None,
        reset: Input | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Input, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        *positional: None,
        lengths: Tensor | None = None,
        reset: Input | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[Input, tuple[Tensor, Tensor], Input]: ...

    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        *positional: None,
        lengths: Tensor | None = None,
        reset: Input | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Run the layers; shapes and errors in the class docstring."""
        if positional:
            checks.refuse_positional(self, positional)
        if symbolic.traced():
            keywords = {"lengths": lengths, "reset": reset, "return_cell_states": return_cell_states}
            if (proxy := symbolic.recorded(self, input, hx, **keywords)) is not None:
                return proxy
        if return_cell_states is not False:
            checks.check_flag("return_cell_states", return_cell_states)
        states = calls.pair(hx, "lstm")
        cell = LSTM_COUPLED if self.coupled else LSTM_CELL
        out, after, cells = self._run(cell, input, self._weights(), states, lengths, reset, return_cell_states)
        return (out, after) if cells is None else (out, after, cells)
