"""What a cell is, as data: its gates, its states, what the forward keeps and what the backward emits.

One row per cell. The autograd function, the dispatch table, the modules and the tests read this table; none of them names
a cell in an ``if``.

Blocks are ``H`` columns wide. A kernel's row buffers are rows of blocks, in the order given here:

======== =================== ========================== ===========================
cell     ``gates``           ``tape`` (kept)            ``d_gates`` (emitted)
======== =================== ========================== ===========================
rnn_*    h                   h (the output itself)      h
lstm     i, f, g, o          i, f, g, o, c              i, f, g, o
gru      r, z, n             r, z, n, hn                hn, r, z, n
======== =================== ========================== ===========================

``hn`` is the GRU's recurrent part of the candidate gate, ``W_hn h + b_hn``, before the reset gate multiplies it. Its
gradient differs from that of ``n``, so ``d_gates`` carries both: the first three blocks belong to ``weight_hh``, the last
three to ``weight_ih``, and both groups are contiguous columns, which makes each weight gradient one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """One recurrent cell.

    Attributes:
        name: key of the dispatch table and prefix of the kernel functions.
        mode: torch's name of the same cell (``torch.nn.RNNBase.mode``).
        gates: gate blocks in the order of torch's weights; ``len(gates)`` is G.
        states: names of the states, ``h`` first.
        tape: blocks kept for the backward; the first G are where the caller puts ``gates_x``.
        d_gates: blocks that the backward emits.
        tape_is_out: the tape is the output: nothing else is kept.
    """

    name: str
    mode: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    tape: tuple[str, ...]
    d_gates: tuple[str, ...]
    tape_is_out: bool = False

    def __post_init__(self) -> None:
        if len(self.tape) < len(self.gates):
            raise ValueError(f"cell {self.name}: the tape must have room for the {len(self.gates)} gates")
        if not set(self.gates) <= set(self.d_gates):
            raise ValueError(f"cell {self.name}: d_gates must hold every gate, got {self.d_gates}")
        if self.d_gates[-len(self.gates) :] != self.gates:
            raise ValueError(f"cell {self.name}: the last blocks of d_gates must be the gates in weight order")

    @property
    def num_gates(self) -> int:
        """G, the number of gates."""
        return len(self.gates)

    @property
    def bias(self) -> tuple[str, ...]:
        """Blocks of the bias that a kernel adds: the gates, and ``hn`` where a part of ``bias_hh`` stays apart."""
        return (*self.gates, "hn") if "hn" in self.tape else self.gates


RNN_TANH = Cell("rnn_tanh", "RNN_TANH", ("h",), ("h",), ("h",), ("h",), tape_is_out=True)
RNN_RELU = Cell("rnn_relu", "RNN_RELU", ("h",), ("h",), ("h",), ("h",), tape_is_out=True)
LSTM = Cell("lstm", "LSTM", ("i", "f", "g", "o"), ("h", "c"), ("i", "f", "g", "o", "c"), ("i", "f", "g", "o"))
GRU = Cell("gru", "GRU", ("r", "z", "n"), ("h",), ("r", "z", "n", "hn"), ("hn", "r", "z", "n"))

CELLS: dict[str, Cell] = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, LSTM, GRU)}


class Weights(NamedTuple):
    """The parameters of one direction of one layer, under torch's names and in torch's shapes.

    Attributes:
        ih: ``weight_ih``, (G·H, I).
        hh: ``weight_hh``, (G·H, P).
        bias_ih: (G·H,), or None.
        bias_hh: (G·H,), or None.
        hr: ``weight_hr``, (P, H), or None where h is not projected (P = H).
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


def split(cell: Cell, tensors: Sequence[Any]) -> tuple[Any, tuple[Any, ...], tuple[Weights, ...]]:
    """Split what a layer is a function of, or one value for each of these tensors, into input, states and weights."""
    first, each = 1 + len(cell.states), len(Weights._fields)
    weights = [Weights(*tensors[i : i + each]) for i in range(first, len(tensors), each)]
    return tensors[0], tuple(tensors[1:first]), tuple(weights)


def summed_biases(cell: Cell, weights: Sequence[Weights], dtype: torch.dtype) -> Tensor | None:
    """The bias that the kernel adds, (D, blocks of ``Cell.bias``·H), or None where no direction has one."""
    apart = (len(cell.bias) - cell.num_gates) * (weights[0].hh.shape[0] // cell.num_gates)
    blocks: list[Tensor] = []
    for weight in weights:
        ih, hh = weight.bias_ih, weight.bias_hh
        if ih is None or hh is None:
            if all(weight.bias_ih is None and weight.bias_hh is None for weight in weights):
                return None
            zero = weight.hh.new_zeros(weight.hh.shape[0])
            ih, hh = zero if ih is None else ih, zero if hh is None else hh
        # In float32 from the start: the sum of two biases is not rounded to a narrower dtype.
        if ih.dtype != dtype:
            ih, hh = ih.to(dtype), hh.to(dtype)
        if apart:
            both = torch.cat((ih, hh[-apart:]))
            both[: -2 * apart].add_(hh[:-apart])
            blocks.append(both)
        else:
            blocks.append(ih + hh)
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).view(len(weights), -1)
