"""The reference as users call it: a layer of any cell in plain torch, differentiable any number of times.

>>> import torch
>>> from fused_rnn import reference
"""

from __future__ import annotations

from fused_rnn.kernels.reference import layer

__all__ = ["layer"]
