"""Fused RNN, LSTM and GRU kernels, forward and backward, behind the modules of torch.nn.

>>> import torch, fused_rnn
>>> rnn = fused_rnn.LSTM(256, 512, num_layers=2, batch_first=True)  # torch.nn.LSTM's arguments, state_dict and results
>>> model = fused_rnn.convert(torch.nn.Sequential(torch.nn.GRU(8, 16)))  # swaps torch.nn's modules, same parameters

Inside ``torch.func``, ``vmap`` over input or states is one fused call with a larger batch, and so are per-sample gradients,
``vmap(grad(...))``. ``vmap`` over stacked parameters, an ensemble, is one fused call for each member. Mapped members share one
set of lengths. Forward mode (``jvp``, ``torch.autograd.forward_ad``) and second gradients are right, and as slow as a loop over
the steps in plain torch, because they are those of ``reference``.

>>> from torch.func import functional_call, grad, vmap
>>> parameters = {name: value.detach() for name, value in rnn.named_parameters()}
>>> loss = lambda parameters, sequence: functional_call(rnn, parameters, sequence)[0].square().sum()
>>> per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, torch.randn(8, 5, 256))  # 8 sequences of 5 steps
>>> per_sample["weight_hh_l0"].shape
torch.Size([8, 2048, 512])

Dimensions, upper case for a size and lower case for an index:

======= =======================================================================================
T, t    steps of a sequence (torch's L in the shapes of a batch)
N, B    sequences in a batch
R       rows: the active sequences of all steps, T·N for a dense batch
I       features of the input
H       hidden units
P       features of h: H, or the size of the projection
G       gates: 1 (RNN), 4 (LSTM: i, f, g, o), 3 (GRU: r, z, n)
D       directions, 2 when bidirectional: recurrences that do not talk to each other
L, l    layers
======= =======================================================================================
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

# The operators' gradients, and what they cost, are registered by importing them.
from fused_rnn import functional, onnx, reference
from fused_rnn.cells import cell
from fused_rnn.data.cell import Weights
from fused_rnn.graph import flops, operators_autograd  # noqa: F401
from fused_rnn.kernels.dispatch import backend, backends
from fused_rnn.kernels.memory import empty_cache
from fused_rnn.nn.cells import GRUCell, LSTMCell, RNNCell
from fused_rnn.nn.convert import Conversion, convert, revert
from fused_rnn.nn.initialisation import init_
from fused_rnn.nn.layers import GRU, LSTM, RNN
from fused_rnn.nn.quantize import quantize_dynamic
from fused_rnn.nn.recurrent import Recurrent

try:
    __version__ = version("fused_rnn")
except PackageNotFoundError:
    # Imported from a source tree that was never installed.
    __version__ = "0+unknown"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conversion",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "Weights",
    "__version__",
    "backend",
    "backends",
    "cell",
    "convert",
    "empty_cache",
    "functional",
    "init_",
    "onnx",
    "quantize_dynamic",
    "reference",
    "revert",
]
