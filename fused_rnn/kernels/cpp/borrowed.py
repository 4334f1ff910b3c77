"""Parameters as arrays, without a trace on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TYPES = {torch.float32: np.dtype(np.float32).str, torch.float64: np.dtype(np.float64).str}


class _Owner:
    """What NumPy asks for the memory, and keeps alive with the array."""

    __slots__ = ("__array_interface__", "tensor")
    __array_interface__: dict[str, Any]
    tensor: Tensor


def borrowed(tensor: Tensor) -> NDArray[Any]:
    """As ``tensor.detach().numpy()``, which would forbid for good that the tensor's storage is resized.

    torch.distributed's fully_shard frees a gathered parameter by resizing its storage to nothing, and fills it again later.

    Args:
        tensor: on the CPU, float32 or float64.

    Raises:
        RuntimeError: if the tensor has no memory of its own.
    """
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise RuntimeError(
            f"expected a weight with memory of its own, got a {type(tensor).__name__} without: it is sharded, freed or wraps "
            "other tensors. A model under fully_shard has its weights only while it is called as a whole."
        )
    owner = _Owner()
    owner.tensor = tensor
    owner.__array_interface__ = {
        "version": 3,
        "typestr": _TYPES[tensor.dtype],
        "shape": tuple(tensor.shape),
        "strides": None if tensor.is_contiguous() else tuple(step * tensor.itemsize for step in tensor.stride()),
        "data": (address, False),
    }
    return np.asarray(owner)
