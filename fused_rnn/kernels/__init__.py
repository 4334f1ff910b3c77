"""The kernel contract: what every backend's module of a cell exports, with the same names and signatures.

A kernel owns the recurrence only. The input projection is done before it, the weight gradients after it.

Legend: T steps, N sequences, D independent recurrences (directions), H hidden units, G gates, P the size of h (H, or
proj_size), R rows (all steps' active rows). *Blocks* are H columns; ``fused_rnn.cells`` names them.

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
    bias: (D, blocks of ``Cell.bias``·H), or None for zero. RNN and LSTM: bias_ih + bias_hh. GRU: their sums for r and z, then
        b_in, then b_hn. The kernel adds it, because a matrix product that does costs one more pass over its result.
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

A backend's package may export ``project(input, weight, out)``, which writes input · weightᵀ to ``out`` (R, G·H), contiguous in
its columns: its own way to do the input projection where it knows a better one than the library's matrix product.

It may export ``weight_gradient(d_gates, inputs, d_weight, d_bias, add)``, which writes or adds the products of
``weight_gradient`` below in its own way.

It may export ``takes_input(steps, weight)`` → bool: whether its kernels want to do the input's products themselves, as they
walk. Then ``<cell>_pack`` gets ``weight_ih``, D tensors (G·H, I), as a last argument; ``<cell>_forward`` gets ``input`` (R, I)
as a last argument, the tape's contents before it are not read, and the tape is None where nothing of it is kept (without
``keep``, unless it is the output); and, where D is 1, ``<cell>_backward`` gets ``d_input`` as a last argument, (rows of the
walked steps, I), which it writes.

It may export ``multiply(left, right, out, add)``, the product of two matrices: its own way where it knows a better one.

It may export ``whole_forward(cell, steps, reverse, input, states, weights, reset, keep, result)`` → (states after the walk,
tape) and ``whole_backward(cell, steps, reverse, input, states, weights, reset, out, tape, d_out, d_cells, d_states)`` →
(d_gates, gradients of the states): the input's product and the walk of a whole layer, in the dtype that is stored, bfloat16
and float16 too. ``result`` (R, D·P) is written; weights are the D ``Weights``; d_out, d_cells and each of d_states may be
None for zero. Nothing else of it but ``multiply`` and ``weight_gradient`` is then called for layers. This is for a GPU.

It may also export ``step(cell, input, states, weights, batch_first)`` → (out, states) or None: one step of a stack of layers in
one direction without a backward, for streaming, with input (1, N, I), or (N, 1, I) with ``batch_first``, and states (L, N, H);
out is laid out as the input. weights: four for each layer, ih, hh and the two biases or None. None, with nothing done, where it
has no better way for this call; it checks its arguments itself, and raises before anything is written.

And ``layer_forward(cell, input, states, weights, keep)`` → (out, states, tape) or None: a layer in one direction over dense
steps, from input (T, N, I), contiguous, and states (1, N, H) each or None for zero to out (T, N, H), the states after the walk
and, with ``keep``, the tape (R, 1, tape blocks·H), None where it is the output. weights: ih, hh and the two biases or None.
With it ``layer_backward(cell, input, states, weights, out, tape, d_out, d_states, input_wanted, states_wanted,
weights_wanted)`` → the gradients of input, states and weights, each None where it is not wanted, or None for all; d_out and
each of d_states may be None for zero. None, and what is raised, are as for ``step``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.cells import CELLS


def load(package: str) -> None:
    """Import a backend's modules of all cells that it has."""
    for name in dict.fromkeys(f"{package}.{cell.module}" for cell in CELLS.values()):
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def project(input: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write input · weightᵀ to ``out`` with torch's matrix product: what a backend without a ``project`` of its own does."""
    torch.mm(input, weight.t(), out=out)


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """Write left · right to ``out``, or add it, with torch's matrix product."""
    if add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def weight_gradient(
    d_gates: Tensor, inputs: Sequence[Tensor], d_weight: Tensor | None, d_bias: Tensor | None, add: bool
) -> None:
    """Sum a weight's gradient over the rows of many steps, with torch's matrix product.

    Args:
        d_gates: (n, M): gradients of the gates, contiguous in their columns.
        inputs: what the weight multiplied in these rows, one part after another: n rows of K columns in all.
        d_weight: (M, K), d_gatesᵀ · inputs, or None.
        d_bias: (M,), the sums of the columns of d_gates, or None.
        add: whether the results are added to what is there, or written over it.
    """
    if d_weight is not None:
        row = 0
        for part in inputs:
            rows = d_gates[row : row + part.shape[0]]
            if add or row:
                d_weight.addmm_(rows.t(), part)
            else:
                torch.mm(rows.t(), part, out=d_weight)
            row += part.shape[0]
    if d_bias is not None and add:
        d_bias.add_(d_gates.sum(0))
    elif d_bias is not None:
        torch.sum(d_gates, 0, out=d_bias)
