"""What a cell is, as data: its gates, its states, what the forward keeps and what the backward emits.

One row per cell, in ``fused_rnn.cells``. The graph, the modules, the kernels and the tests read these rows; none of them asks
for a cell, or for one of its blocks, by name.

Blocks are ``H`` columns wide. A kernel's row buffers are rows of blocks, in the order given here:

================ =================== ========================== =========================== ======================
cell             ``gates``           ``tape`` (kept)            ``d_gates`` (emitted)       ``d_hh`` (of weight_hh)
================ =================== ========================== =========================== ======================
rnn_*            h                   h (the output itself)      h                           h
lstm             i, f, g, o          i, f, g, o, c              i, f, g, o                  i, f, g, o
gru              r, z, n             r, z, n, hn                hn, r, z, n                 r, z, hn
gru_reset_before r, z, n             r, z, n, m                 r, z, n                     r, z, n
================ =================== ========================== =========================== ======================

``hn`` is the GRU's recurrent part of the candidate gate, ``W_hn h + b_hn``, before the reset gate multiplies it: it stays
``apart``. Its gradient differs from that of ``n``, so ``d_gates`` carries both: the first three blocks belong to ``weight_hh``,
the last three to ``weight_ih``, and both groups are contiguous columns, which makes each weight gradient one matrix product.

A step has one *stage*, a product with h and a pointwise part, or two. In the second, the ``later`` gates have a product with an
``operand`` that the first one made: ``m``, the r ⊙ h₋ of the GRU whose reset gate comes before the product. All units of m must
be there before the second stage reads any. It is kept on the tape, because the gradient of the later gates' rows of
``weight_hh`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """One recurrent cell.

    Attributes:
        name: key of the dispatch table and prefix of the kernel functions.
        mode: torch's name of the same cell (``torch.nn.RNNBase.mode``), or a name for messages where torch has none.
        gates: gate blocks in the order of torch's weights; ``len(gates)`` is G.
        states: names of the states: ``h`` first, and for some cells another one, which no product reads.
        tape: blocks kept for the backward; the first G are where the caller puts ``gates_x``.
        d_gates: blocks that the backward emits: the part that is ``apart``, then the gates.
        reads_before: the state before the step that the backward's pointwise part reads, or None.
        direct: whether h passes from step to step beside the product too: the pointwise part of the forward reads it.
        apart: the block with the last gate's recurrent part, bias_hh in it, where that does not simply add up with the gate's
            other sums; else None.
        later: the last gates, if their recurrent product is with ``operand`` and not with h; else none.
        operand: the block of the tape that the product of the later gates reads; None without such gates.
        tape_is_out: the tape is the output: nothing else is kept.
        forget: the gate that decides how much of the state is kept, whose bias may start with a value of its own; or None.
        projected: what a projection (``weight_hr``) multiplies, from the blocks of the tape. None: h cannot be projected.
        in_one_piece: torch.nn runs a dense layer of it on a CPU in one piece (oneDNN), which decides dtypes under autocast.
        derived: whether its kernels are made from its equations (``fused_rnn.cells.derivation``), where a backend makes them.
    """

    name: str
    mode: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    tape: tuple[str, ...]
    d_gates: tuple[str, ...]
    # No defaults for these two: from a wrong guess, kernels would compute wrong numbers and raise nothing.
    reads_before: str | None = field(kw_only=True)
    direct: bool = field(kw_only=True)
    apart: str | None = field(default=None, kw_only=True)
    later: tuple[str, ...] = field(default=(), kw_only=True)
    operand: str | None = field(default=None, kw_only=True)
    tape_is_out: bool = field(default=False, kw_only=True)
    forget: str | None = field(default=None, kw_only=True)
    projected: Callable[[Sequence[Tensor]], Tensor] | None = field(default=None, kw_only=True)
    in_one_piece: bool = field(default=False, kw_only=True)
    derived: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("gates", "states", "tape", "d_gates"):
            blocks = getattr(self, name)
            if not blocks or len(set(blocks)) < len(blocks):
                self._refuse(name, "one or more names, each once", blocks)
        gates, states, tape = self.gates, self.states, self.tape
        if states[0] != "h" or len(states) > 2:
            self._refuse("states", "'h' and at most one other", states)
        if tape[: len(gates)] != gates:
            self._refuse("tape", f"the gates {gates} first, where gates_x arrive", tape)
        if self.later and (len(self.later) >= len(gates) or gates[-len(self.later) :] != self.later):
            self._refuse("later", f"the last of {gates}, but not all", self.later)
        if (self.operand is not None) != bool(self.later):
            self._refuse("operand", "a block if there are later gates, else None", self.operand)
        if self.later and self.apart is not None:
            self._refuse("apart", "None, as the last gate is one of the later ones", self.apart)
        for block in (self.cell_state, self.apart, self.operand):
            if block is not None and block not in tape[len(gates) :]:
                self._refuse("tape", f"{block!r} behind the gates", tape)
        expected = gates if self.apart is None else (self.apart, *gates)
        if self.d_gates != expected:
            self._refuse("d_gates", str(expected), self.d_gates)
        if self.tape_is_out and (tape != ("h",) or len(states) > 1):
            self._refuse("tape_is_out", "False, as the tape or the state is not h alone", True)
        if self.reads_before not in (None, *states):
            self._refuse("reads_before", f"None or one of the states {states}", self.reads_before)
        if self.reads_before == "h" and not self.direct:
            self._refuse("direct", "True, as the backward reads h before the step, so the forward did", False)
        if self.forget not in (None, *gates):
            self._refuse("forget", f"None or one of the gates {gates}", self.forget)
        if self.projected is not None and (self.direct or self.tape_is_out or self.later):
            self._refuse("projected", "None: a projected h has no unit for each of the pointwise part's", self.projected)

    def _refuse(self, field: str, expected: str, got: object) -> NoReturn:
        raise ValueError(f"cell {self.name}: {field}: expected {expected}, got {got!r}")

    @property
    def num_gates(self) -> int:
        """G, the number of gates."""
        return len(self.gates)

    @property
    def first(self) -> tuple[str, ...]:
        """The gates of the first stage, whose recurrent product is with h: all of them, where there are no later ones."""
        return self.gates[: len(self.gates) - len(self.later)]

    @property
    def cell_state(self) -> str | None:
        """The state beside h, which is a block of the tape too, or None: the LSTM's c."""
        return self.states[1] if len(self.states) > 1 else None

    @property
    def bias(self) -> tuple[str, ...]:
        """Blocks of the bias that a kernel adds: the gates, and what of ``bias_hh`` stays apart from the last one."""
        return self.gates if self.apart is None else (*self.gates, self.apart)

    @property
    def d_ih(self) -> tuple[str, ...]:
        """The blocks of d_gates that belong to weight_ih, in the order of its rows: the last ones."""
        return self.gates

    @property
    def d_hh(self) -> tuple[str, ...]:
        """The blocks of d_gates that belong to weight_hh, in the order of its rows."""
        return self.gates if self.apart is None else (*self.gates[:-1], self.apart)

    @property
    def d_hh_groups(self) -> tuple[tuple[str, ...], ...]:
        """The same in groups of neighbours: each is one product with rows of weight_hh that follow one another.

        The last group is that of the later gates, where there are some: its other factor is the operand, and not h.
        """
        if self.later:
            return (self.first, self.later)
        if self.apart is None:
            return (self.gates,)
        # Of a single gate, what stays apart is all.
        return tuple(group for group in (self.gates[:-1], (self.apart,)) if group)

    @property
    def weight_blocks(self) -> tuple[int, ...]:
        """For each block of d_gates that carries the gradient back to h, the first ones, its block of weight_hh's rows."""
        return tuple(self.d_hh.index(block) for block in self.d_gates[: len(self.first)])


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


def initial_states(cell: Cell, like: Tensor, recurrences: int, batch: int, weights: Weights) -> tuple[Tensor, ...]:
    """Zero states of so many recurrences, (·, N, P) and (·, N, H), in the dtype and on the device of ``like``."""
    hidden, output = weights.hh.shape[0] // cell.num_gates, weights.hh.shape[1]
    return tuple([like.new_zeros((recurrences, batch, hidden if i else output)) for i in range(len(cell.states))])
