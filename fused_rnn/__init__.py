"""Fused RNN, LSTM and GRU kernels, forward and backward, behind the modules of torch.nn.

>>> import torch, fused_rnn
>>> rnn = fused_rnn.LSTM(256, 512, num_layers=2, batch_first=True)  # torch.nn.LSTM's arguments, state_dict and results
>>> model = fused_rnn.convert(torch.nn.Sequential(torch.nn.GRU(8, 16)))  # swaps torch.nn's modules, same parameters

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

# The operators' gradients are registered by importing them.
from fused_rnn import functional, onnx, operators_autograd, reference  # noqa: F401
from fused_rnn.cell_modules import GRUCell, LSTMCell, RNNCell
from fused_rnn.cells import Weights
from fused_rnn.convert import Conversion, convert, revert
from fused_rnn.dispatch import backend, backends
from fused_rnn.initialisation import init_
from fused_rnn.memory import empty_cache
from fused_rnn.modules import GRU, LSTM, RNN

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
    "Weights",
    "__version__",
    "backend",
    "backends",
    "convert",
    "empty_cache",
    "functional",
    "init_",
    "onnx",
    "reference",
    "revert",
]
