"""Connections between the layers of a stack: residual, highway and dense.

x_l is what layer l reads, before dropout, and y_l its output; x_0 is the input of the module. Around a layer there is

- residual: x_{l+1} = y_l + x_l. Source: He et al. 2016, "Deep residual learning for image recognition";
- highway: x_{l+1} = t ⊙ y_l + (1 − t) ⊙ x_l with the transform gate t = σ(W_t x_l + b_t). Source: Srivastava et al. 2015,
  "Highway networks", equation 3; between recurrent layers Zhang et al. 2016, "Highway long short-term memory RNNs";
- dense: x_{l+1} = [x_l, y_l]. Source: Huang et al. 2017, "Densely connected convolutional networks", equation 2.

The connection goes around the dropout between layers: layer l reads dropout(x_l), and x_l itself is what the residual adds and
the highway's gate reads and carries. What is carried past several layers would be dropped out several times otherwise. Of a
dense connection, each y_l is dropped out once, where it is joined to the others, and all later layers read it under the same
mask, as Huang et al. have it.

States are the layers' own: no connection changes what a layer hands from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_rnn.data.cell import Cell, Weights
from fused_rnn.data.steps import Steps
from fused_rnn.graph.autograd import Outputs
from fused_rnn.kernels.protocol import States

__all__ = ["Connection", "Dense", "Highway", "Residual", "layers"]


class Connection:
    """How the output of a layer is joined with what it read.

    Attributes:
        first: the first layer around which there is a connection.
        grows: whether a layer reads more features than the one before it.
    """

    grows = False

    def __init__(self, first: int) -> None:
        self.first = first

    def read(self, x: Tensor, dropout: float) -> Tensor:
        """What a layer reads of x_l: (T, N, ·) or (R, ·)."""
        return torch.dropout(x, dropout, True) if dropout else x

    def next(self, layer: int, x: Tensor, out: Tensor, dropout: float) -> Tensor:
        """x_{l+1}, where another layer follows."""
        return self.joined(layer, x, out, False)

    def joined(self, layer: int, x: Tensor, out: Tensor, batch_first: bool) -> Tensor:
        """The output of a layer and its connection; with ``batch_first``, ``out`` has N before T, and ``x`` has not."""
        raise NotImplementedError


class Residual(Connection):
    """The output plus what the layer read."""

    def joined(self, layer: int, x: Tensor, out: Tensor, batch_first: bool) -> Tensor:
        """y_l + x_l."""
        if layer < self.first:
            return out
        return out + (x.transpose(0, 1) if batch_first else x)


class Highway(Connection):
    """A gate decides, unit by unit, how much of the output passes and how much of what the layer read.

    Attributes:
        gates: (W_t, b_t) of each layer from ``first`` on.
    """

    def __init__(self, first: int, gates: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(first)
        self.gates = gates

    def joined(self, layer: int, x: Tensor, out: Tensor, batch_first: bool) -> Tensor:
        """Return t ⊙ y_l + (1 − t) ⊙ x_l."""
        if layer < self.first:
            return out
        weight, bias = self.gates[layer - self.first]
        t = torch.sigmoid(torch.nn.functional.linear(x, weight, bias))
        if batch_first:
            x, t = x.transpose(0, 1), t.transpose(0, 1)
        # Under autocast, the module's input may have another dtype than a layer's output.
        dtype = torch.promote_types(x.dtype, out.dtype)
        return torch.lerp(x.to(dtype), out.to(dtype), t.to(dtype))


class Dense(Connection):
    """A layer reads the module's input and the outputs of all layers before it."""

    grows = True

    def __init__(self) -> None:
        super().__init__(1)

    def read(self, x: Tensor, dropout: float) -> Tensor:
        """All of x_l; its dropout has been done."""
        return x

    def next(self, layer: int, x: Tensor, out: Tensor, dropout: float) -> Tensor:
        """[x_l, dropout(y_l)]."""
        return torch.cat((x, torch.dropout(out, dropout, True) if dropout else out), -1)

    def joined(self, layer: int, x: Tensor, out: Tensor, batch_first: bool) -> Tensor:
        """y_l: the output of the last layer is the module's."""
        return out


def layers(
    connection: Connection,
    run: Callable[..., Outputs],
    cell: Cell,
    rows: Tensor,
    steps: Steps,
    states: States | None,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    resets: Tensor | None,
    dropout: float,
    cell_states: bool,
    batch_first: bool,
) -> Outputs:
    """Run layer after layer, each with its connection.

    Args:
        run: runs a layer; as ``fused_rnn.graph.autograd.layer``.
        rows, states: as of ``fused_rnn.nn.calls``.
        resets: of each direction.
        batch_first: as of ``fused_rnn.graph.autograd.eager_layer``, for the last layer.

    Returns:
        out, the states after the walk, (L·D, N, ·) each, and with ``cell_states`` c of the last layer at every step.
    """
    directions = len(reverse)
    last = len(weights) // directions - 1
    ends: list[States] = []
    x, cells = rows, None
    for layer in range(last + 1):
        part = slice(layer * directions, (layer + 1) * directions)
        before = None if states is None else tuple([state[part] for state in states])
        read = connection.read(x, dropout if layer else 0.0)
        if layer < last:
            out, end, _ = run(cell, read, steps, before, weights[part], reverse, resets, False)
            x = connection.next(layer, x, out, dropout)
        elif batch_first:
            out, end, cells = run(cell, read, steps, before, weights[part], reverse, resets, cell_states, False, True)
        else:
            out, end, cells = run(cell, read, steps, before, weights[part], reverse, resets, cell_states)
        ends.append(end)
    after = tuple([torch.cat(parts) for parts in zip(*ends, strict=True)])
    return connection.joined(last, x, out, batch_first), after, cells


def layer_after_layer(
    run: Callable[[Tensor, States | None, slice, bool], Outputs],
    count: int,
    directions: int,
    dropout: float,
    rows: Tensor,
    states: States | None,
) -> Outputs:
    """Run layer after layer, with dropout between them.

    Args:
        run: one of them: of its rows, the states before it, which of the L·D weights are its own, and whether it is the last.
        count: L·D.
        directions: D.
        dropout: between layers.
        rows, states: as of ``fused_rnn.nn.calls``.

    Returns: as ``layers``.
    """
    ends: list[States] = []
    cells = None
    for first in range(0, count, directions):
        if first and dropout:
            rows = torch.dropout(rows, dropout, True)
        part = slice(first, first + directions)
        before = None if states is None else tuple([state[part] for state in states])
        rows, end, cells = run(rows, before, part, part.stop == count)
        ends.append(end)
    if len(ends) == 1:
        return rows, ends[0], cells
    return rows, tuple([torch.cat(parts) for parts in zip(*ends, strict=True)]), cells
