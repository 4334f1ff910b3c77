"""One launch of a kernel, by the shortest way that Triton offers once it has compiled it.

``kernel[grid](...)`` binds and inspects all arguments, some 60 of ours, at each call: that takes longer than a short walk's
first steps. What it decides by, types, alignments and constants, is asked here in less time, and the compiled kernel launched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_rnn.kernels.triton.plan import Plan
from fused_rnn.kernels.triton.version import INTERPRETED

# Numbers to which a pointer or a size is a multiple, or not: what Triton compiles for.
_ALIGNMENT = 16

_compiled: dict[tuple[Any, ...], Any] = {}


@functools.cache
def _names(kernel: Any) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Of a kernel: all arguments, pointers, numbers that it is compiled for, and constants but the step and the layouts."""
    parameters = kernel.params
    pointers = tuple(each.name for each in parameters if each.name.startswith("p_"))
    constants = tuple(each.name for each in parameters if each.is_constexpr)
    numbers = tuple(
        each.name
        for each in parameters
        if not each.is_constexpr and not each.do_not_specialize and not each.name.startswith("p_")
    )
    implied = ("STEP", "MMA", "LEFT", "RIGHT", "POINT", "TURN", "SUMS", "NOTHING", "ROWS", "TAIL")
    return tuple(each.name for each in parameters), pointers, numbers, tuple(name for name in constants if name not in implied)


def compiled_as(number: int) -> str:
    """What a compiled kernel knows of a number: one itself, whether it is a multiple, and whether it needs 64 bits."""
    if number == 1:
        return "one"
    return f"{'long' if number >= 1 << 31 else 'int'}{' multiple' if number % _ALIGNMENT == 0 else ''}"


def launch(kernel: Any, plan: Plan, grid: tuple[int, int, int], arguments: Mapping[str, Any], device: torch.device) -> None:
    """Launch ``kernel`` on the current stream of a device. arguments: the kernel's, and the options of a compilation."""
    if INTERPRETED or device.type != "cuda":
        kernel[grid](**arguments)
        return
    names, pointers, numbers, constants = _names(kernel)
    # Kernels and steps live as long as their modules do.
    alike: list[Any] = [id(kernel), id(arguments["STEP"]), plan.kernel, device.index]
    for name in pointers:
        tensor: Tensor = arguments[name]
        alike.append(tensor.dtype)
        alike.append(tensor.data_ptr() % _ALIGNMENT == 0)
    for name in numbers:
        number = arguments[name]
        alike.append(compiled_as(number))
    for name in constants:
        alike.append(arguments[name])
    key = tuple(alike)
    with contextlib.nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device):
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = kernel[grid](**arguments)
        else:
            compiled[grid](*[arguments[name] for name in names])
