"""Where large tensors come from: blocks that are kept from call to call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

try:
    from fused_rnn._C import Memory as _Memory
    from fused_rnn._C import release_kept as _release_kept
except ImportError:  # without the extension memory comes from torch
    _Memory = _release_kept = None  # type: ignore[assignment, misc]

# From this size on, memory comes from the extension, which keeps it for the next call instead of faulting in fresh pages:
# the weights' gradients of a layer with H = 1024 take longer to fault in than to compute for a short sequence.
_KEPT_BYTES = 256 << 10


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, but large blocks on the CPU are kept from call to call, and cannot be resized in place."""
    size = math.prod(shape) * dtype.itemsize
    if size < _KEPT_BYTES or _Memory is None or device.type != "cpu" or torch.are_deterministic_algorithms_enabled():
        # In deterministic mode torch fills fresh memory with NaN where it is told to.
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = _Memory(size)
    except (MemoryError, TypeError):
        # torch's error for what is not there, or is more than an address can count.
        return torch.empty(shape, dtype=dtype, device=device)
    # Its shape in place, no view of it: what a custom Function returns could not be changed in place then.
    return torch.frombuffer(memory, dtype=dtype).resize_(shape)


_kept_elsewhere: list[Callable[[], None]] = []


def empties(forget: Callable[[], None]) -> None:
    """Have ``empty_cache`` call a function too."""
    _kept_elsewhere.append(forget)


def empty_cache() -> None:
    """Give the memory that fused_rnn keeps for its next call back to the system: up to 256 MiB, as after training.

    On a GPU, what was kept there of ragged batches for the next one with the same lengths.

    Outputs and gradients from 256 KiB on lie in such memory, whose size stays: to resize their storage raises.

    Source: torch.cuda.empty_cache.
    """
    for forget in _kept_elsewhere:
        forget()
    if _release_kept is not None:
        _release_kept()
