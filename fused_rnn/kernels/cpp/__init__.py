"""The C++ backend: ``fused_rnn._C``, one source compiled for several instruction sets, the best one picked at import.

``FUSED_RNN_ISA`` (``avx512``, ``avx2`` or ``baseline``) forces one. A call of a layer is one call of the extension each way.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.data.cell import Cell, Weights
from fused_rnn.kernels.protocol import COMPUTE, Int8Call, LayerCall, LayerResult, OutputGradients, States, StepOperands
from fused_rnn.kernels.weight_gradients import grouped

_missing: str | None = None
try:
    from fused_rnn import _C
except ImportError as error:
    _missing = (
        f"the extension fused_rnn._C is not built or does not load ({error}); "
        "install a C++17 compiler and run: pip install --force-reinstall --no-deps fused_rnn"
    )

_ENVIRONMENT = "FUSED_RNN_ISA"
_NO_WEIGHTS = (False,) * len(Weights._fields)


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here.

    Raises:
        ValueError: if ``FUSED_RNN_ISA`` asks for an instruction set that cannot be had.
    """
    if _missing is not None:
        return _missing
    wanted = os.environ.get(_ENVIRONMENT)
    if wanted:
        if wanted not in _C.isas():
            raise ValueError(
                f"{_ENVIRONMENT}={wanted}: expected one that this build and this machine have: {', '.join(_C.isas())}"
            )
        _C.set_isa(wanted)
    return None


def describe() -> str:
    """The instruction set in use and the others that could be."""
    others = [name for name in _C.isas() if name != _C.isa()]
    return f"{_C.isa()}" + (f" (also built: {', '.join(others)})" if others else "")


class _Cpp:
    """The backend (``fused_rnn.kernels.protocol.Backend``)."""

    name = "cpp"
    checks = True
    derives = False
    gives_gates = True

    def supports(self, call: LayerCall) -> str | None:
        """It computes every layer whose dtype is one of ``COMPUTE``."""
        return None if call.input.dtype in COMPUTE else f"it does not compute in {call.input.dtype}"

    def forward(self, call: LayerCall, keep: bool, batch_first: bool = False) -> LayerResult:
        """Compute a layer."""
        (cell, _, steps, reverse, cell_states, step), input, states, weights, reset = call
        return _C.layer_forward(
            cell.name,
            input,
            states,
            weights,
            steps.length,
            steps.batch,
            steps.batch_sizes,
            reverse,
            reset,
            keep,
            cell_states,
            step,
            torch.get_num_threads(),
            batch_first,
        )

    def plain_forward(
        self, cell: Cell, input: Tensor, states: States | None, weights: Weights, step: bool, batch_first: bool = False
    ) -> tuple[Tensor, States] | None:
        """Compute a layer of one recurrence over dense steps without a graph."""
        return _C.plain_forward(cell.name, input, states, weights, step, torch.get_num_threads(), batch_first)

    def int8_forward(self, call: Int8Call, batch_first: bool = False) -> LayerResult:
        """Compute a layer with int8 weights."""
        cell, _, steps, reverse, cell_states, step = call.layer
        out, states, cells = _C.int8_forward(
            cell.name,
            call.input,
            call.states,
            call.hidden,
            call.weights,
            steps.length,
            steps.batch,
            steps.batch_sizes,
            reverse,
            call.reset,
            cell_states,
            step,
            torch.get_num_threads(),
            batch_first,
        )
        return LayerResult(out, states, cells, None)

    def backward(
        self,
        call: LayerCall,
        out: Tensor,
        tape: Tensor | None,
        gradients: OutputGradients,
        wanted: Sequence[bool],
        groups: int | None = None,
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of a layer."""
        (cell, _, steps, reverse, _, step), input, states, weights, reset = call
        d_out, d_states, d_cells = gradients
        first = 1 + len(cell.states)
        by_group = groups is not None and any(wanted[first:])
        found = _C.layer_backward(
            cell.name,
            input,
            states,
            weights,
            steps.length,
            steps.batch,
            steps.batch_sizes,
            reverse,
            reset,
            out,
            tape,
            d_out,
            d_cells,
            d_states,
            (*wanted[:first], *(False,) * (len(wanted) - first)) if by_group else wanted,
            by_group,
            step,
            torch.get_num_threads(),
        )
        if groups is None or not by_group:
            return found
        d_gates = found[-1]
        assert d_gates is not None
        return (*found[:first], *grouped(call, out, tape, d_gates, wanted, groups))

    def step_backward(
        self, call: LayerCall, out: Tensor, tape: Tensor | None, d_outputs: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """Compute the gradients of a single step without those of the weights."""
        (cell, _, steps, reverse, _, step), input, states, weights, _ = call
        d_out, *d_states = d_outputs
        *grads, _, _, _, _, _, d_gates = _C.layer_backward(
            cell.name,
            input,
            states,
            weights,
            1,
            steps.batch,
            None,
            reverse,
            None,
            out,
            tape,
            d_out,
            None,
            d_states,
            (*wanted, *_NO_WEIGHTS),
            True,
            step,
            torch.get_num_threads(),
        )
        assert d_gates is not None
        return grads, d_gates

    def loop_gradients(self, cell: Cell, steps: Sequence[StepOperands], wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """Sum the gradients of the weights over single steps."""
        return _C.loop_gradients(cell.name, steps, wanted, torch.get_num_threads())


def load() -> _Cpp:
    """The backend."""
    return _Cpp()
