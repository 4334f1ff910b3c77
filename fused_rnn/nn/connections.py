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

from fused_rnn.graph.autograd import Outputs
from fused_rnn.kernels.protocol import States

__all__ = ["PLAIN", "Connection", "Dense", "Highway", "Residual", "layers"]


class Connection:
    """How the output of a layer is joined with what it read. This one: not at all, as in torch.nn.

    Attributes:
        first: the first layer around which there is a connection.
        grows: whether a layer reads more features than the one before it.
    """

    grows = False

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def read(self, x: Tensor, dropout: float) -> Tensor:
        """What a layer reads of x_l: (T, N, ·) or (R, ·)."""
        return torch.dropout(x, dropout, True) if dropout else x

    def next(self, layer: int, x: Tensor, out: Tensor, dropout: float) -> Tensor:
        """x_{l+1}, where another layer follows."""
        return self.joined(layer, x, out, False)

    def joined(self, layer: int, x: Tensor, out: Tensor, batch_first: bool) -> Tensor:
        """The output of a layer and its connection; with ``batch_first``, ``out`` has N before T, and ``x`` has not."""
        return out


PLAIN = Connection()


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
    """A layer reads the module's input and the outputs of all layers before it; the last one's output is the module's."""

    grows = True

    def read(self, x: Tensor, dropout: float) -> Tensor:
        """All of x_l; its dropout has been done."""
        return x

    def next(self, layer: int, x: Tensor, out: Tensor, dropout: float) -> Tensor:
        """[x_l, dropout(y_l)]."""
        return torch.cat((x, torch.dropout(out, dropout, True) if dropout else out), -1)


def layers(
    connection: Connection,
    run: Callable[[Tensor, States | None, slice, bool], Outputs],
    count: int,
    directions: int,
    dropout: float,
    rows: Tensor,
    states: States | None,
    batch_first: bool = False,
) -> Outputs:
    """Run layer after layer, each with its connection, with dropout between them.

    Args:
        run: one of them: of its rows, the states before it, which of the L·D weights are its own, and whether it is the last.
        count: L·D.
        directions: D.
        dropout: between layers.
        rows, states: as of ``fused_rnn.nn.calls``.
        batch_first: whether ``run`` gives the last layer's output with N before T.

    Returns:
        out, the states after the walk, (L·D, N, ·) each, and what ``run`` gives of c of the last layer at every step.
    """
    ends: list[States] = []
    x, cells = rows, None
    for first in range(0, count, directions):
        layer, part = first // directions, slice(first, first + directions)
        last = part.stop == count
        before = None if states is None else tuple([state[part] for state in states])
        out, end, cells = run(connection.read(x, dropout if first else 0.0), before, part, last)
        x = connection.joined(layer, x, out, batch_first) if last else connection.next(layer, x, out, dropout)
        ends.append(end)
    if len(ends) == 1:
        return x, ends[0], cells
    return x, tuple([torch.cat(parts) for parts in zip(*ends, strict=True)]), cells
