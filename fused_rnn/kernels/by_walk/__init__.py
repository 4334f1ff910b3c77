"""A backend out of a recurrence: who can walk time, but no more, is made to compute whole layers here.

The input's product, stretches of time and the gradients of the weights are the same for all of them. What a walk is asked for
says ``fused_rnn.kernels.by_walk.walk``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from fused_rnn.data.cell import Cell, Weights, initial_states
from fused_rnn.kernels.by_walk import backward, forward
from fused_rnn.kernels.by_walk.walk import Walk
from fused_rnn.kernels.protocol import COMPUTE, LayerCall, LayerResult, OutputGradients


class WalkBackend:
    """A backend (``fused_rnn.kernels.protocol.Backend``) made of walks.

    Args:
        name: of the backend.
        cells: the names of the cells that it has a walk of.
        load: gives the walk of a cell.
        derives: whether it makes the walk of any cell that was defined by its equations.
    """

    checks = False
    gives_gates = False

    def __init__(self, name: str, cells: Collection[str], load: Callable[[Cell], Walk], derives: bool) -> None:
        self.name = name
        self.derives = derives
        self._cells = cells
        self._load = load
        self._walks: dict[str, Walk] = {}

    def walk(self, cell: Cell) -> Walk:
        """The walk of a cell, loaded or made when it is first needed."""
        found = self._walks.get(cell.name)
        if found is None:
            found = self._walks[cell.name] = self._load(cell)
        return found

    def supports(self, call: LayerCall) -> str | None:
        """It computes every layer of a cell that it has a walk of."""
        cell = call.layer.cell
        if cell.name not in self._cells and not (cell.derived and self.derives):
            return f"it has no kernels of {cell.name}"
        return None if call.input.dtype in COMPUTE else f"it does not compute in {call.input.dtype}"

    def forward(self, call: LayerCall, keep: bool, batch_first: bool = False) -> LayerResult:
        """Compute a layer."""
        with torch.no_grad():
            plain = _plain(call)
            out, states, cells, tape = forward.forward(self.walk(call.layer.cell), plain, keep, call.input.shape[:-1])
        if call.layer.step:
            # h after the step is the output. In place: see `forward` of views.
            states = tuple(state.squeeze_(0) for state in states[1:])
        if batch_first:
            for each in (out, cells):
                if each is not None:
                    each.transpose_(0, 1)
        return LayerResult(out, states, cells, tape)

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
        with torch.no_grad():
            plain = _plain(call)
            rows = plain.input.shape[0]
            d_out, d_states, d_cells = gradients
            if call.layer.step:
                # h after the step is the output.
                d_states = (None, *d_states)
            # A map over gradients gives one forward to all of its members: of a single row these are views without a stride.
            kept = out.reshape(rows, out.shape[-1]).contiguous(), None if tape is None else tape.contiguous()
            d_rows = [None if each is None else _values(each).reshape(rows, each.shape[-1]) for each in (d_out, d_cells)]
            shape = (len(call.weights), plain.layer.steps.batch)
            d_ends = [None if each is None else _values(each).reshape(*shape, each.shape[-1]) for each in d_states]
            in_rows = OutputGradients(d_rows[0], d_ends, d_rows[1])
            found = backward.backward(self.walk(call.layer.cell), plain, kept[0], kept[1], in_rows, wanted, groups)
        d_input, *rest = found
        count = len(call.layer.cell.states)
        if call.layer.step:
            rest[:count] = [None if each is None else each.squeeze(0) for each in rest[:count]]
        return (None if d_input is None else d_input.view(call.input.shape), *rest)


def _values(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its numbers in order."""
    return tensor.resolve_neg().contiguous()


def _plain(call: LayerCall) -> LayerCall:
    """The same layer with an input (R, I), with states, (D, N, ·) each, and with tensors whose memory holds the numbers."""
    layer, input, states, weights, reset = call
    batch, recurrences = layer.steps.batch, len(weights)
    for each in call.operands():
        # torch reads such memory without a question.
        if each is not None and each.device.type == "cpu" and each.numel() and not each.untyped_storage().nbytes():
            raise RuntimeError(
                f"expected a tensor with memory of its own, got a {type(each).__name__} of shape {tuple(each.shape)} without: "
                "it is freed or sharded. A model under fully_shard has its weights only while it is called as a whole."
            )
    weights = [Weights(*(None if each is None else each.resolve_neg() for each in one)) for one in weights]  # type: ignore[arg-type]
    before = initial_states(layer.cell, input, recurrences, batch, weights[0])
    if states is not None:
        before = tuple(state.resolve_neg().reshape(zero.shape) for state, zero in zip(states, before, strict=True))
    rows = input.resolve_neg().reshape(-1, input.shape[-1])
    return LayerCall(layer._replace(step=False), rows, before, weights, reset)
