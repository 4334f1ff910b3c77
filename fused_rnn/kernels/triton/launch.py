"""What a call runs on and how: the device, the switch of float32's precision, and its plan, made once for each kind of call."""

from __future__ import annotations

import functools
import os

import torch
import triton
from torch import Tensor

from fused_rnn.data.cell import Cell
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.triton import tuned
from fused_rnn.kernels.triton.heuristic import choose
from fused_rnn.kernels.triton.plan import Call, Device, Plan, forced
from fused_rnn.kernels.triton.version import INTERPRETED

LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        driver = triton.runtime.driver.active
        shared = driver.utils.get_device_properties(index)["max_shared_mem"]
    return Device(properties.name, (properties.major, properties.minor), properties.multi_processor_count, shared)


def device_of(device: torch.device) -> Device:
    """What the plan needs to know of a device.

    Raises:
        RuntimeError: if its chip is too old, or it is a CPU and nothing interprets the kernels.
    """
    if device.type != "cuda":
        if not INTERPRETED:
            raise RuntimeError(
                f"triton runs on cuda, got a tensor on {device.type}; set TRITON_INTERPRET=1 to try it on the cpu"
            )
        return Device("interpreter", (9, 0), 1, 227 << 10, interpreted=True)
    found = _cuda_device(torch.cuda.current_device() if device.index is None else device.index)
    reason = too_old(found.name, found.capability)
    if reason is not None:
        raise RuntimeError(f"triton: {reason}; the reference backend serves it: fused_rnn.backend('reference')")
    return found


def too_old(name: str, capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot run on a chip, or None."""
    if capability >= LEAST_CAPABILITY:
        return None
    least, given = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
    return f"expected a chip of compute capability {least} or newer, {name} has {given}"


def allows_tf32() -> bool:
    """Whether the user's torch lets cuDNN round the factors of an RNN's float32 products: the switch that nn.LSTM follows.

    Source: ``torch.backends.cudnn.rnn.fp32_precision``, and before torch 2.9 ``torch.backends.cudnn.allow_tf32``.
    """
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    precision = getattr(rnn, "fp32_precision", None)
    if precision is None:
        return bool(torch.backends.cudnn.allow_tf32)
    return bool(precision == "tf32")


def make_call(cell: Cell, weight_hh: Tensor, steps: Steps, directions: int, backward: bool, projected: bool) -> Call:
    """What is to be planned, of the tensors of a call."""
    if weight_hh.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"triton: expected weights of {names}, got {weight_hh.dtype}, which no backend computes in")
    hidden = weight_hh.shape[0] // cell.num_gates
    tf32 = weight_hh.dtype == torch.float32 and allows_tf32()
    return Call(cell, backward, hidden, steps.batch, directions, weight_hh.dtype, projected, tf32)


_plans: dict[tuple[object, ...], Plan] = {}


def planned(cell: Cell, weight_hh: Tensor, steps: Steps, directions: int, backward: bool, projected: bool) -> Plan:
    """The plan of a call; as ``make_call`` and ``heuristic.choose``, but without making it again for every call of its kind."""
    device = device_of(weight_hh.device)
    if forced():
        return choose(make_call(cell, weight_hh, steps, directions, backward, projected), device)
    sizes = (cell.name, weight_hh.shape[0], steps.batch, directions)
    key = (*sizes, backward, projected, weight_hh.dtype, device, allows_tf32(), os.environ.get(tuned.ENVIRONMENT))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = choose(make_call(cell, weight_hh, steps, directions, backward, projected), device)
    return plan
