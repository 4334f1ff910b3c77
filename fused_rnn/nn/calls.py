"""From the arguments of a call to its layers and back: checks, rows and steps, dropout, layer after layer.

Legend as in ``fused_rnn.functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.data import sequences, torch_private
from fused_rnn.data.cell import Cell, Weights, initial_states
from fused_rnn.data.steps import Steps, dense_steps
from fused_rnn.graph import autograd, operators
from fused_rnn.graph.autograd import Outputs
from fused_rnn.graph.batch_first import transposed
from fused_rnn.graph.derivatives import transformed
from fused_rnn.graph.tracing import quietly
from fused_rnn.kernels.protocol import Backend, States
from fused_rnn.nn import checks, connections
from fused_rnn.nn.connections import Connection
from fused_rnn.nn.heads import run_heads

Input = TypeVar("Input", Tensor, PackedSequence)

# One recurrence, from the first step to the last, and another one back.
_FORWARD = (False,)
_BOTH = (False, True)


def pair(hx: tuple[Tensor, Tensor] | Tensor | None, function: str) -> States | None:
    """A pair of states; raises as torch's ``function`` does where it is none."""
    if hx is None or (type(hx) is tuple and len(hx) == 2):
        return hx
    if isinstance(hx, Tensor):
        raise TypeError(f"{function}(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")
    return tuple(hx)


def step(cell: Cell, input: Tensor, weights: Weights, states: States | None) -> States:
    """Check the arguments of one step of a cell and take it; the states after it, h first."""
    batched = input.dim() == 2
    if not batched:
        checks.check_cell_rank(cell, input, states)
        input = input.unsqueeze(0)
        states = None if states is None else tuple([state.unsqueeze(0) for state in states])
    backend = autograd.eager_backend(cell, input, weights.hh)
    if backend is None or not backend.checks:
        _check_step(cell, input, states, weights, batched)
    try:
        plain = None
        if backend is not None and backend.checks and not torch.is_grad_enabled():
            plain = backend.plain_forward(cell, input, states, weights, True)  # type: ignore[attr-defined]
        if plain is not None:
            h, rest = plain
        elif backend is not None:
            steps = dense_steps(1, input.shape[0])
            h, rest, _ = autograd.eager_layer(backend, cell, input, steps, states, (weights,), _FORWARD, None, False, True)
        else:
            run, steps = autograd.layer, Steps(1, input.shape[0])
            if torch_private.any_autocast():
                run = partial(autograd.layer_in_autocast, False)
                if states is None:
                    states = tuple([state.squeeze(0) for state in initial_states(cell, input, 1, steps.batch, weights)])
            h, rest, _ = run(cell, input, steps, states, (weights,), _FORWARD, None, False, True)
    except Exception:
        # What does not fit each other has the errors of torch.
        _check_step(cell, input, states, weights, batched)
        raise
    after = (h, *rest)
    return after if batched else tuple([state.squeeze(0) for state in after])


def _check_step(cell: Cell, input: Tensor, states: States | None, weights: Weights, batched: bool) -> None:
    """Check a batch, (N, I), and its states against the weights."""
    if batched:
        checks.check_cell_rank(cell, input, states)
    checks.check_cell(cell, input, states or (), weights)


def sequence(
    cell: Cell,
    input: Input,
    weights: Sequence[Weights],
    states: States | None,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    lengths: Tensor | None,
    reset: Any,
    cell_states: bool = False,
    connection: Connection | None = None,
    heads: int = 1,
) -> tuple[Input, States, Input | None]:
    """Check the arguments, run the layers, and bring the results into the shape of the input.

    Args: as of ``gru`` and ``lstm``; ``dropout`` is 0 where it does not apply; ``connection`` is that of the layers. With
        ``heads``, the weights are those of each head of each layer and direction (``fused_rnn.nn.heads``).

    Returns:
        out, the states after the last step, and with ``cell_states`` c of every step.
    """
    reverse: tuple[bool, ...] = _BOTH if bidirectional else _FORWARD
    layers: Callable[..., Outputs] = _layers
    if heads > 1:
        reverse = tuple([back for back in reverse for _ in range(heads)])
        layers = partial(run_heads, _layers, heads)
    directions = len(reverse)
    if not weights or len(weights) % directions:
        checks.check_count(weights, directions)
    if isinstance(input, PackedSequence):
        first = weights[0]
        checks.check_input(input.data, first.ih, 2)
        backend = autograd.eager_backend(cell, input.data, first.hh)
        run = partial(layers, cell, weights, reverse, dropout, cell_states, connection, backend, as_dense=True)
        grows = connection is not None and connection.grows

        def check(rows: Tensor, states: States | None, batch: int) -> None:
            checks.check_layers(cell, rows, weights, directions, states, batch, grows, heads)

        return packed(run, check, input, states, lengths, reset, first.ih)
    batched = input.dim() == 3
    if not batched:
        checks.check_rank(cell, input)
        if states is not None:
            checks.check_state_ranks(states, batched)
            states = tuple([state.unsqueeze(1) for state in states])
        reset = None if reset is None else checks.check_reset(reset, tuple(input.shape[:1]), input).unsqueeze(1)
        input, batch_first = input.unsqueeze(1), False
    elif reset is not None:
        reset = checks.check_reset(reset, tuple(input.shape[:2]), input)
    backend = autograd.eager_backend(cell, input, weights[0].hh)
    if backend is None or not backend.checks:
        _check_dense(cell, input, weights, directions, states, batch_first, connection, heads)
    try:
        plain: Any = None
        one = len(weights) == 1 and connection is None and lengths is None and reset is None and not cell_states
        if one and backend is not None and backend.checks and type(input) is Tensor and not torch.is_grad_enabled():
            # Such a call's tensors say all that there is to say.
            rows = input.transpose(0, 1).contiguous() if batch_first else input
            plain = backend.plain_forward(cell, rows, states, weights[0], False, batch_first)  # type: ignore[attr-defined]
        if plain is not None:
            (out, after), cells = plain, None
        else:
            run = partial(layers, cell, weights, reverse, dropout, cell_states, connection, backend)
            out, after, cells = _dense(run, input, weights[0].hh, states, backend, lengths, reset, batched, batch_first)
    except Exception:
        # What does not fit each other has the errors of torch.
        _check_dense(cell, input, weights, directions, states, batch_first, connection, heads)
        raise
    if not batched:
        out, cells = out.squeeze(1), None if cells is None else cells.squeeze(1)
        after = tuple([state.squeeze(1) for state in after])
    return out, after, cells


@quietly
def _check_dense(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Weights],
    directions: int,
    states: States | None,
    batch_first: bool,
    connection: Connection | None,
    heads: int = 1,
) -> None:
    """Check a batch, (T, N, I) or (N, T, I), against the weights and the states."""
    if states is not None:
        checks.check_state_ranks(states, True)
    checks.check_input(input, weights[0].ih, 3)
    batch, grows = input.shape[0 if batch_first else 1], connection is not None and connection.grows
    checks.check_layers(cell, input, weights, directions, states, batch, grows, heads)
    if input.shape[1 if batch_first else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def _dense(
    run: Callable[..., Outputs],
    input: Tensor,
    weight: Tensor,
    states: States | None,
    backend: Backend | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batched: bool,
    batch_first: bool,
) -> Outputs:
    """Run the layers over a batch, (T, N, I) or (N, T, I)."""
    length, batch, _ = input.shape
    if batch_first:
        length, batch = batch, length
    steps = Steps(length, batch) if backend is None else dense_steps(length, batch)
    if lengths is not None:
        return padded(run, input, steps, states, reset, lengths, batched, batch_first, weight)
    if not batch_first:
        return run(input, steps, states, None if reset is None else reset.reshape(-1), True)
    rows, mask = input.transpose(0, 1).contiguous(), None if reset is None else reset.t().reshape(-1)
    # The kernels can write results with N before T.
    out, after, cells = run(rows, steps, states, mask, True, backend is not None)
    if backend is None:
        out, cells = _batch_first(out, cells, not (operators.traced(input, weight) or transformed()))
    return out, after, cells


def padded(
    run: Callable[..., Outputs],
    input: Tensor,
    steps: Steps,
    states: States | None,
    reset: Tensor | None,
    lengths: Tensor,
    batched: bool,
    batch_first: bool,
    weight: Tensor,
) -> Outputs:
    """Run the layers over the rows that the sequences of a padded batch have."""
    ragged = _ragged(lengths, steps, batched, batch_first, input, weight)
    # What torch alone sees gets results that are no views.
    plain = not (operators.traced(input, weight) or transformed())
    if ragged is None:
        if batch_first:
            input, reset = input.transpose(0, 1).contiguous(), None if reset is None else reset.t()
        out, after, cells = run(input, steps, states, None if reset is None else reset.reshape(-1), False)
        if batch_first:
            out, cells = _batch_first(out, cells, plain)
        return out, after, cells
    leading, count = input.shape[:2], steps.length * steps.batch
    rows = ragged.gather(input.reshape(count, input.shape[2]))
    mask = None if reset is None else ragged.gather(reset.reshape(-1))
    out, after, cells = run(rows, ragged.steps, None if states is None else ragged.sort(states), mask, False)
    # As `view`, but not a view in the eyes of autograd, since nobody else has the matrix.
    shaped: Callable[..., Tensor] = torch.ops.aten._unsafe_view.default if plain else Tensor.view
    out = shaped(ragged.scatter(out, count), (*leading, out.shape[1]))
    cells = None if cells is None else shaped(ragged.scatter(cells, count), (*leading, cells.shape[1]))
    return out, ragged.unsort(after), cells


def _batch_first(out: Tensor, cells: Tensor | None, plain: bool) -> tuple[Tensor, Tensor | None]:
    """The results with N before T; where the call is plain no views, which autograd would not let be detached in place."""
    if plain:
        return transposed(out), None if cells is None else transposed(cells)
    return out.transpose(0, 1), None if cells is None else cells.transpose(0, 1)


def _ragged(
    lengths: Tensor, steps: Steps, batched: bool, batch_first: bool, input: Tensor, weight: Tensor
) -> sequences.Ragged | None:
    """The rows that sequences of these lengths have; None where nothing is left out."""
    lengths = checks.check_lengths(lengths, steps.batch, batched, input)
    if operators.traced(input, weight):
        return None if lengths.is_meta or input.is_meta else operators.ragged(lengths, input, batch_first)
    if lengths.is_meta:
        return None
    values = sequences.check_length_values(lengths, steps.length)
    return None if input.is_meta else sequences.Ragged.of(values, steps.length, batch_first, input.device)


def packed(
    run: Callable[[Tensor, Steps, States | None, Tensor | None], Outputs],
    check: Callable[[Tensor, States | None, int], None],
    input: PackedSequence,
    states: States | None,
    lengths: Tensor | None,
    mask: Any,
    weight: Tensor,
) -> tuple[PackedSequence, States, PackedSequence | None]:
    """Run the layers over a PackedSequence, whose rows are ragged steps as they stand.

    Args:
        run: the layers, of rows, steps, states and resets.
        check: raises unless rows, states and N fit each other and the weights.
        input, states, lengths, mask: of the call.
        weight: one of the weights.
    """
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if lengths is not None:
        raise ValueError("lengths: expected None for a packed input, which has its own, got a tensor")
    reset = None if mask is None else checks.check_packed_reset(mask, input)
    if operators.traced(data, weight):
        steps = operators.packed_steps(batch_sizes, data, states, sorted_indices)
        if isinstance(mask, PackedSequence):
            reset = operators.packed_reset(mask, input)
    else:
        sequences.check_batch_sizes(batch_sizes, data.shape[0])
        steps = Steps.packed(batch_sizes)
        if isinstance(mask, PackedSequence):
            sequences.check_packed_alike(mask.batch_sizes, mask.sorted_indices, batch_sizes, sorted_indices)
    # Sizes first: an index into a batch that is too small has a message that nobody understands.
    check(data, states, steps.batch)
    if states is not None and sorted_indices is not None:
        states = tuple([state.index_select(1, sorted_indices) for state in states])
    out, after, cells = run(data, steps, states, reset)
    if unsorted_indices is not None:
        after = tuple([state.index_select(1, unsorted_indices) for state in after])

    def as_input(values: Tensor) -> PackedSequence:
        return PackedSequence(values, batch_sizes, sorted_indices, unsorted_indices)

    return as_input(out), after, None if cells is None else as_input(cells)


def _layers(
    cell: Cell,
    weights: Sequence[Weights],
    reverse: tuple[bool, ...],
    dropout: float,
    cell_states: bool,
    connection: Connection | None,
    backend: Backend | None,
    rows: Tensor,
    steps: Steps,
    states: States | None,
    reset: Tensor | None,
    as_dense: bool,
    batch_first: bool = False,
) -> Outputs:
    """Run layer after layer.

    Args:
        backend: as ``autograd.eager_backend`` found it.
        rows: (T, N, I), or of ragged steps (R, I).
        states: (L·D, N, ·) each, or None for zero.
        reset: (R,) bool, or None.
        as_dense: as of ``autograd.layer_in_autocast``.
        batch_first: as of ``autograd.eager_layer``, for the last layer.

    Returns:
        out, the states after the walk, (L·D, N, ·) each, and with ``cell_states`` c of the last layer at every step.
    """
    resets, directions = None, len(reverse)
    if reset is not None:
        by_direction = operators if operators.traced(rows, weights[0].hh) else sequences
        ways = 2 if reverse[-1] else 1
        resets = by_direction.resets_by_direction(reset, steps, ways)
        if directions > ways:
            resets = resets.repeat_interleave(directions // ways, 0)
    if backend is not None and len(weights) == directions and connection is None:
        return autograd.eager_layer(
            backend, cell, rows, steps, states, weights, reverse, resets, cell_states, False, batch_first
        )
    run: Callable[..., Outputs] = autograd.layer
    if backend is not None:
        run = partial(autograd.eager_layer, backend)
    elif torch_private.any_autocast():
        run = partial(autograd.layer_in_autocast, as_dense)
        if states is None:
            # They have the dtype of the module's input, whatever its layers compute in.
            states = initial_states(cell, rows, len(weights), steps.batch, weights[0])
    if len(weights) == directions and connection is None:
        return run(cell, rows, steps, states, weights, reverse, resets, cell_states)
    if states is not None:
        _check_state_counts(states, len(weights))

    def one(rows: Tensor, before: States | None, part: slice, last: bool) -> Outputs:
        if last and batch_first:
            return run(cell, rows, steps, before, weights[part], reverse, resets, cell_states, False, True)
        return run(cell, rows, steps, before, weights[part], reverse, resets, cell_states and last)

    return connections.layers(
        connection or connections.PLAIN, one, len(weights), directions, dropout, rows, states, batch_first
    )


@quietly
def _check_state_counts(states: States, count: int) -> None:
    for state in states:
        if state.shape[0] != count:
            raise ValueError(f"states: expected {count}, one for each layer and direction, got {state.shape[0]}")
