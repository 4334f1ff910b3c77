"""Where large tensors come from: blocks kept from call to call, and fresh ones on huge pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from fused_rnn._C import Memory as _Memory
    from fused_rnn._C import advise_huge_pages as _advise_huge_pages
    from fused_rnn._C import release_kept as _release_kept
except ImportError:  # without the extension memory comes from torch
    _Memory = _advise_huge_pages = _release_kept = None  # type: ignore[assignment, misc]

# From this size on, memory comes from the extension, which keeps it for the next call instead of faulting in fresh pages.
_KEPT_BYTES = 256 << 10

# From this size on, fresh memory is worth asking for huge pages (2 MiB each).
_HUGE_BYTES = 4 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, for what no caller of the package will see: large blocks are kept from call to call."""
    size = math.prod(shape) * dtype.itemsize
    if size < _KEPT_BYTES or _Memory is None or device.type != "cpu" or torch.are_deterministic_algorithms_enabled():
        # In deterministic mode torch fills fresh memory with NaN where it is told to.
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_Memory(size), dtype=dtype).view(shape)


def visible(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, for what the caller of the package gets; large blocks ask for huge pages."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.nbytes >= _HUGE_BYTES and _advise_huge_pages is not None and device.type == "cpu":
        _advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def empty_cache() -> None:
    """Give the memory that fused_rnn keeps for its next call back to the system: up to 256 MiB, as after training.

    Source: torch.cuda.empty_cache.
    """
    if _release_kept is not None:
        _release_kept()
