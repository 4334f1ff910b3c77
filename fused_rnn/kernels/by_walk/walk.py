"""What a walk is: the recurrence of a cell over time, as Numba, Triton and the reference write it.

A walk owns the recurrence only. The input projection is done before it, the weight gradients after it.

Legend: as in ``fused_rnn.kernels.protocol``; G gates. *Blocks* are H columns; ``fused_rnn.cells`` names them.

``<cell>_pack(weight_hh, weight_hr, steps, backward)`` → packed
    weight_hh: D tensors (G·H, P). weight_hr: D tensors (P, H), or None (only the LSTM has projections).
    steps: whose sizes decide the layout. backward: for ``<cell>_backward`` (True) or ``<cell>_forward``.
    packed: whatever the backend's kernels want, opaque to the caller; valid for every call with the same N and D as long
    as the weights keep their values. A caller that walks time in chunks packs once.

``<cell>_forward(tape, out, states, packed, bias, steps, reverse, reset, keep)`` → None
    tape: (R, D, tape blocks·H). In: gates_x, the input projection without biases, in the first G blocks.
        Out, with keep: what the backward needs. For cells with ``tape_is_out``, tape and out are the same memory.
    out: (R, D, P), written.
    states: tuple of (D, N, ·), one per state of the cell. In: the states before the walk. Out, in place: after it.
        A row without a step in ``steps`` keeps its state.
    bias: (D, blocks of ``Cell.bias``·H), or None for zero: bias_ih + bias_hh. GRU, whose hn stays apart: their sums for r and
        z, then b_in, then b_hn. The kernel adds it, because a matrix product that does costs one more pass over its result.
    reverse: D booleans: walk the steps from the last to the first.
    keep: whether a backward follows. Without it the tape's contents are undefined afterwards.
    reset: (R,) bool, contiguous, or None. Where set, that row's states before that step of the walk are zero, and no gradient
        crosses. One mask for all recurrences: a caller whose recurrences differ in it makes a call for each.

``<cell>_backward(d_gates, d_states, d_out, d_cells, tape, out, states_0, packed, steps, t_begin, t_end, reverse, reset)``
    → None
    Walks steps t_begin .. t_end - 1 in the opposite order of the forward. All row buffers but d_gates cover all of
    ``steps``; d_gates covers only the rows of the walked steps, from row 0 on.
    d_gates: (rows of the walked steps, D, d_gates blocks·H [+ P with weight_hr]), written: gradients of the gates before their
        nonlinearity. With weight_hr, the last P columns are the gradient of h.
    d_states: tuple of (D, N, ·). In: gradients of the states after the walked steps. Out, in place: of those before.
    d_out: (R, D, P), or None for zero.
    d_cells: (R, D, H), the gradient of c of every step where a caller was given those, or None for zero. None for cells
        without c.
    tape, out: as the forward left them; not written, so that a second backward sees the same.
    states_0: the states before the whole of ``steps``.

All row buffers may have any row stride; inside a row (all D and all columns) they are contiguous, except that a caller who
runs one of several recurrences passes the view ``buffer[:, d : d + 1]``. States are contiguous. Buffers have one dtype,
float32 or float64 on the CPU backends: who stores bfloat16 or float16 converts around the call.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fused_rnn.data.steps import Steps
from fused_rnn.kernels.protocol import States


class Pack(Protocol):
    """``<cell>_pack``."""

    def __call__(self, weight_hh: list[Tensor], weight_hr: list[Tensor] | None, steps: Steps, backward: bool) -> Any:
        """Lay weights out."""


class WalkForward(Protocol):
    """``<cell>_forward``."""

    def __call__(
        self,
        tape: Tensor,
        out: Tensor,
        states: States,
        packed: Any,
        bias: Tensor | None,
        steps: Steps,
        reverse: tuple[bool, ...],
        reset: Tensor | None,
        keep: bool,
    ) -> None:
        """Walk all steps."""


class WalkBackward(Protocol):
    """``<cell>_backward``."""

    def __call__(
        self,
        d_gates: Tensor,
        d_states: States,
        d_out: Tensor | None,
        d_cells: Tensor | None,
        tape: Tensor,
        out: Tensor,
        states_0: States,
        packed: Any,
        steps: Steps,
        t_begin: int,
        t_end: int,
        reverse: tuple[bool, ...],
        reset: Tensor | None,
    ) -> None:
        """Walk some steps back."""


class Walk(NamedTuple):
    """The functions of one cell."""

    pack: Pack
    forward: WalkForward
    backward: WalkBackward
