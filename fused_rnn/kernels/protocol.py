"""The seam: what a backend is given and gives back. A backend takes a whole layer, forward and backward.

Legend: T steps, N sequences, D independent recurrences (the directions of a layer), I input features, H hidden units, P the
size of h (H, or ``proj_size``), R rows (the active sequences of all steps, one step after another). ``fused_rnn.cells`` says
what a cell keeps for its backward, its tape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps

States = tuple[Tensor, ...]

# What a layer is computed in, by the dtype that its tensors are stored in.
COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


class Layer(NamedTuple):
    """What a call of one layer has besides tensors.

    Attributes:
        cell: which cell.
        backend: who computes it, forward and backward.
        steps: which rows a step works on.
        reverse: for each of the D recurrences, whether it walks from the last step to the first.
        cell_states: whether c of every step is a result.
        step: whether this is a single step of a cell: the input is (N, I), a state is (N, ·), and h after the step is the
            output and not among the states.
    """

    cell: Cell
    backend: Backend
    steps: Steps
    reverse: tuple[bool, ...]
    cell_states: bool = False
    step: bool = False


class LayerCall(NamedTuple):
    """A layer and its tensors, which have one dtype and one device.

    Attributes:
        layer: what is to be computed.
        input: (R, I), or (T, N, I) where the steps are dense; for a single step of a cell (N, I).
        states: the states before the walk, h (D, N, P) and for the LSTM c (D, N, H); for a single step of a cell without the
            D. None for zero.
        weights: the parameters of each of the D recurrences.
        reset: for each recurrence, the rows before whose step on its walk the states are zero, (D, R) bool, contiguous. No
            gradient crosses there. None for nowhere.
    """

    layer: Layer
    input: Tensor
    states: States | None
    weights: Sequence[Weights]
    reset: Tensor | None = None

    def operands(self) -> list[Tensor | None]:
        """What the layer is a function of: the input, the states, and five weights of each recurrence."""
        flat: list[Tensor | None] = [self.input]
        flat += self.states or (None,) * len(self.layer.cell.states)
        for weights in self.weights:
            flat += weights
        return flat

    @staticmethod
    def of(layer: Layer, operands: Sequence[Tensor | None], reset: Tensor | None) -> LayerCall:
        """The call with these ``operands()``."""
        first = 1 + len(layer.cell.states)
        # As the classes do it, in half the time.
        if len(operands) == first + 5:
            weights = [tuple.__new__(Weights, operands[first:])]
        else:
            weights = [tuple.__new__(Weights, operands[i : i + 5]) for i in range(first, len(operands), 5)]
        # All of the states are given, or none.
        states = None if operands[1] is None else tuple(operands[1:first])
        return tuple.__new__(LayerCall, (layer, operands[0], states, weights, reset))


class Int8Weights(NamedTuple):
    """The parameters of one direction of one layer with int8 weights: ``fused_rnn.data.int8.Packed`` twice, and the biases."""

    ih: Tensor
    scale_ih: Tensor
    sums_ih: Tensor
    hh: Tensor
    scale_hh: Tensor
    sums_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None


class Int8Call(NamedTuple):
    """A layer with int8 weights, as ``LayerCall``.

    Attributes:
        layer: what it computes; the backend is an ``Int8Backend``.
        input, states: in float32.
        hidden: H.
        weights: of each recurrence.
        reset: as of ``LayerCall``.
    """

    layer: Layer
    input: Tensor
    states: States | None
    hidden: int
    weights: Sequence[Int8Weights]
    reset: Tensor | None = None


class LayerResult(NamedTuple):
    """What a forward returns.

    Attributes:
        out: (R, D·P) or (T, N, D·P), as the input; for a single step of a cell h, (N, H).
        states: the states after the walk, in the shapes of those before it. A sequence without a step keeps its state. For a
            single step of a cell, all but h.
        cell_states: c of every step, with rows as ``out`` and D·H columns, or None where it is not asked for.
        tape: what the backward reads, (R, D, tape blocks·H); None where it is not kept, or is ``out``.
    """

    out: Tensor
    states: States
    cell_states: Tensor | None
    tape: Tensor | None


class OutputGradients(NamedTuple):
    """The gradients of what a forward returned, each None for zero, in any layout of memory."""

    out: Tensor | None
    states: Sequence[Tensor | None]
    cell_states: Tensor | None


class Backend(Protocol):
    """The kernels of one backend.

    Attributes:
        name: of the backend, as ``fused_rnn.backend`` takes it.
        derives: whether it makes kernels of a cell that was defined by its equations (``fused_rnn.cell``).
        gives_gates: whether it is a ``GateBackend`` too.
        checks: whether it is a ``CheckingBackend`` too. Otherwise its callers have checked that operands fit each other.
    """

    @property
    def name(self) -> str:
        """The name of the backend."""

    @property
    def checks(self) -> bool:
        """Whether it is a ``CheckingBackend`` too."""

    @property
    def derives(self) -> bool:
        """Whether it makes kernels of equations."""

    @property
    def gives_gates(self) -> bool:
        """Whether it is a ``GateBackend`` too."""

    def supports(self, call: LayerCall) -> str | None:
        """Why the backend cannot compute a layer on this machine, or None where it can."""

    def forward(self, call: LayerCall, keep: bool, batch_first: bool = False) -> LayerResult:
        """Compute a layer without recording a graph.

        Args:
            call: the layer.
            keep: whether a backward will follow.
            batch_first: whether out and cell_states, of an input (T, N, I), are (N, T, ·) over the same memory; no views.
        """

    def backward(
        self,
        call: LayerCall,
        out: Tensor,
        tape: Tensor | None,
        gradients: OutputGradients,
        wanted: Sequence[bool],
        groups: int | None = None,
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of a layer.

        Nothing that the forward returned is written, so that a second backward sees the same.

        Args:
            call: as the forward had it.
            out: as the forward returned it, in any layout of memory.
            tape: as the forward returned it, in any layout of memory.
            gradients: of the results.
            wanted: for each of ``call.operands()``, whether its gradient is wanted.
            groups: how many groups the batch consists of, if the gradients of the weights are wanted for each: sequence j is of
                group j modulo ``groups``, which come first in these gradients' shapes. None for one sum over all.

        Returns:
            the gradients of ``call.operands()``, None where they are not wanted.
        """


class CheckingBackend(Backend, Protocol):
    """A backend whose forward raises before it computes anything if operands do not fit each other."""

    def plain_forward(
        self, cell: Cell, input: Tensor, states: States | None, weights: Weights, step: bool, batch_first: bool = False
    ) -> tuple[Tensor, States] | None:
        """Compute a layer of one recurrence over dense steps, of which nothing is kept: what is left of small layers' calls.

        Args:
            cell, step: as of ``Layer``.
            input, states: as of ``LayerCall``; all dense, (T, N, I) or of a step (N, I).
            weights: of the recurrence.
            batch_first: as of ``forward``.

        Returns:
            out and the states after the walk, as in ``LayerResult``; None, with nothing done, where a tensor is of a class of
            its own, which may want to see the call.
        """


class Int8Backend(Backend, Protocol):
    """A backend that computes with int8 weights too."""

    def int8_forward(self, call: Int8Call, batch_first: bool = False) -> LayerResult:
        """Compute a layer; there is no tape, and no backward.

        The rows that the weights are multiplied with, of the input and of h, are rounded to whole numbers on the way: each row
        has a scale of its own, its largest magnitude divided by 127.

        Args: as of ``forward``.
        """


class StepOperands(NamedTuple):
    """What the gradients of the weights need of a single step.

    Attributes:
        d_gates: the gradients of its gates, (n, 1, ·).
        input: (n, I).
        h: before the step, (n, P).
        operand: what the product of later gates read, (n, H); None for a cell without such gates.
    """

    d_gates: Tensor
    input: Tensor
    h: Tensor
    operand: Tensor | None


class GateBackend(Backend, Protocol):
    """A backend that gives the gradients of the gates away, so that its caller sums up those of the weights over many steps."""

    def step_backward(
        self, call: LayerCall, out: Tensor, tape: Tensor | None, d_outputs: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """Compute the gradients of a single step, those of its gates in place of the weights'.

        Args:
            call: a dense layer with one recurrence and one step, without resets and projection; the biases need not be there.
            out, tape: as of ``backward``.
            d_outputs: the gradients of out and of the states after it, each None for zero, in any layout of memory.
            wanted: for the input and each state, whether its gradient is wanted.

        Returns:
            the gradients of the input and of each state, None where they are not wanted, and those of the gates, from which the
            weights' follow: (N, 1, blocks of ``Cell.d_gates``·H), in the dtype that the kernels compute in.
        """

    def loop_gradients(self, cell: Cell, steps: Sequence[StepOperands], wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """Sum the gradients of the weights over single steps.

        Args:
            cell: which cell.
            steps: what each has left.
            wanted: for each of the weights, whether its gradient is.

        Returns:
            the gradients in the places of ``Weights``, None where they are not wanted.
        """
