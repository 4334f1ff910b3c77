"""The CUDA backend: Triton compiles the kernels when they are first used, for the chip that is there.

Products of float32 follow the switch that cuDNN's RNNs follow, ``torch.backends.cudnn.rnn.fp32_precision``. Those of bfloat16
and float16 are summed in float32, in which the states are kept too.

With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, its interpreter runs the same kernels on the CPU,
for tests: slowly.

Names in the kernels begin with what they are: ``p_`` a pointer; ``o_`` an offset in elements, or the numbers of units, rows or
columns that offsets are made of; ``m_`` a mask; ``i_`` the place of a program, or of something in a list (``i_u`` among the
slices of units, ``i_b`` among the batch tiles, ``i_d`` among the recurrences); ``d_`` a gradient; ``s_`` and ``t_`` a step, in
the order of the walk and of the rows. At the end, ``_u`` is along units and ``_b`` along sequences, and ``_d`` and ``_row`` are
the strides of recurrences and of rows. Upper case is known when a kernel compiles, but for the sizes T, N, D, H and K.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import torch

from fused_rnn.cells import CELLS, named
from fused_rnn.cells.definition import DEFINED
from fused_rnn.kernels.protocol import Backend

if TYPE_CHECKING:
    from fused_rnn.kernels.triton.plan import Device


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None where it can."""
    if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        # Asked first: importing Triton takes long, and a machine without a GPU has no use for it.
        return "torch sees no CUDA device"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton, or a torch built for CUDA, which brings it"
    try:
        from fused_rnn.kernels.triton import layer, version  # noqa: F401
    except Exception as error:  # A Triton too old or too new fails in ways of its own; the caller is told which.
        return f"its kernels do not load with triton {triton.__version__} ({type(error).__name__}: {error})"
    if version.INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    from fused_rnn.kernels.triton.launch import too_old

    # With several chips, a tensor on one that is too old is an error of its own.
    reasons = [too_old(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in _indices()]
    return reasons[0] if all(reasons) else None


def _indices() -> range:
    return range(torch.cuda.device_count())


def devices() -> tuple[str, ...]:
    """The torch device types that it serves: the CPU too while Triton's interpreter runs the kernels."""
    if unavailable() is None:
        from fused_rnn.kernels.triton.version import INTERPRETED

        if INTERPRETED:
            return ("cuda", "cpu")
    return ("cuda",)


def explain(
    cell: str,
    hidden_size: int,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    bidirectional: bool = False,
    projected: bool = False,
    device: torch.device | Device | None = None,
) -> str:
    """Say which regime and tiles the forward and the backward of a layer would take, and why.

    Args:
        cell: the name of a cell's row: ``"lstm"``, ``"gru"``, ``"rnn_tanh"``, …, or ``mine.row.name`` of one of your own.
        hidden_size: H.
        batch: N, the number of sequences.
        dtype: of the layer.
        bidirectional: whether two recurrences share a launch.
        projected: whether h is projected (``proj_size``).
        device: where; None for the current CUDA device. A ``fused_rnn.kernels.triton.plan.Device`` need not be there.

    Returns:
        two lines.

    Raises:
        ValueError: if there is no such cell, the kernels cannot take it, or a size is below 1.
        RuntimeError: if no device was given and there is none, or its chip is too old.

    >>> from fused_rnn.kernels.triton.plan import Device
    >>> chip = Device("a chip", capability=(9, 0), processors=132, shared_bytes=227 << 10)
    >>> print(explain("lstm", 1024, 16, dtype=torch.bfloat16, device=chip).split(":")[1])
     cooperative (16 units × 8 sequences per program, 8 warps)
    """
    from fused_rnn.kernels.triton import heuristic, plan

    if cell not in DEFINED:
        raise ValueError(f"explain(): cell: expected one of {', '.join(CELLS)} or the name of a defined row, got {cell!r}")
    row = named(cell)
    reason = plan.refusal(row)
    if reason is not None:
        raise ValueError(f"explain(): cell: {cell}: {reason}")
    for name, size in (("hidden_size", hidden_size), ("batch", batch)):
        if size < 1:
            raise ValueError(f"explain(): {name}: expected 1 or more, got {size}")
    if not isinstance(device, plan.Device):
        reason = unavailable()
        if reason is not None:
            raise RuntimeError(f"explain(): triton cannot run here: {reason}; give a plan.Device")
        from fused_rnn.kernels.triton.launch import device_of

        device = device_of(torch.device("cuda") if device is None else device)
    lines = []
    for backward in (False, True):
        call = plan.Call(row, backward, hidden_size, batch, 2 if bidirectional else 1, dtype, projected)
        lines.append(plan.explain(call, heuristic.choose(call, device)))
    return "\n".join(lines)


def load() -> Backend:
    """The backend."""
    from fused_rnn.kernels.triton.layer import Triton

    return Triton()


def describe() -> str:
    """Triton's version and the chip."""
    import triton

    from fused_rnn.kernels.triton.version import INTERPRETED

    if INTERPRETED:
        return f"triton {triton.__version__}, interpreted on the CPU"
    chips = dict.fromkeys(torch.cuda.get_device_name(i) for i in _indices())
    return f"triton {triton.__version__}, {', '.join(chips)}"
