"""From the arguments of a call of an int8 module to its layers and back, as ``fused_rnn.nn.calls`` does for the others.

Legend as in ``fused_rnn.functional``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.data import sequences, torch_private
from fused_rnn.data.cell import Cell
from fused_rnn.data.steps import Steps
from fused_rnn.graph import int8, operators
from fused_rnn.graph.autograd import Outputs
from fused_rnn.kernels.protocol import Int8Weights, States
from fused_rnn.nn import calls, checks, connections


class Stack(NamedTuple):
    """What a module is.

    Attributes:
        cell: which cell.
        input_size, hidden_size: I and H.
        directions: D.
        weights: of each layer and direction.
        dropout: between layers; 0 where it does not apply.
    """

    cell: Cell
    input_size: int
    hidden_size: int
    directions: int
    weights: Sequence[Int8Weights]
    dropout: float = 0.0


def sequence(
    stack: Stack, batch_first: bool, input: Any, states: States | None, lengths: Any, reset: Any, cell_states: bool = False
) -> tuple[Any, States, Any]:
    """Check the arguments, run the layers, and bring the results into the shape of the input.

    Returns:
        out, the states after the last step, and with ``cell_states`` c of every step.

    Raises: as the float modules; ValueError or RuntimeError for a dtype other than float32.
    """
    if isinstance(input, PackedSequence):
        input = PackedSequence(_computed(input.data), *input[1:])
        run, check = partial(_layers, stack, cell_states), partial(_check, stack, 2)
        return calls.packed(run, check, input, states, lengths, reset, input.data)
    batched = input.dim() == 3
    if not batched:
        checks.check_rank(stack.cell, input)
    if states is not None:
        checks.check_state_ranks(states, batched)
    if reset is not None:
        reset = checks.check_reset(reset, tuple(input.shape[: 2 if batched else 1]), input)
    if not batched:
        states = None if states is None else tuple([state.unsqueeze(1) for state in states])
        reset = None if reset is None else reset.unsqueeze(1)
        input, batch_first = input.unsqueeze(1), False
    input = _computed(input)
    length, batch, _ = input.shape
    if batch_first:
        length, batch = batch, length
    _check(stack, 3, input, states, batch)
    if length == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    steps = Steps(length, batch)
    run = partial(_layers, stack, cell_states)
    if lengths is not None:
        out, after, cells = calls.padded(run, input, steps, states, reset, lengths, batched, batch_first, input)
    else:
        rows = input.transpose(0, 1).contiguous() if batch_first else input
        mask = None if reset is None else (reset.t() if batch_first else reset).reshape(-1)
        traced = operators.traced(input, input) or input.is_meta
        out, after, cells = run(rows, steps, states, mask, batch_first and not traced)
        if batch_first and traced:
            out, cells = out.transpose(0, 1), None if cells is None else cells.transpose(0, 1)
    if not batched:
        out, cells = out.squeeze(1), None if cells is None else cells.squeeze(1)
        after = tuple([state.squeeze(1) for state in after])
    return out, after, cells


def step(stack: Stack, input: Tensor, states: States | None) -> States:
    """Check the arguments of one step of a cell and take it; the states after it, h first."""
    checks.check_cell_rank(stack.cell, input, states)
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
        states = None if states is None else tuple([state.unsqueeze(0) for state in states])
    input = _computed(input)
    _check_dtype(input)
    if input.shape[1] != stack.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {stack.input_size}")
    for index, state in enumerate(states or ()):
        if input.shape[0] != state.shape[0]:
            raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden{index} batch size {state.shape[0]}")
        if state.shape[1] != stack.hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {stack.hidden_size}"
            )
    checks.check_same(input, "hidden", states or ())
    h, rest, _ = int8.layer(
        stack.cell,
        stack.hidden_size,
        stack.weights,
        (False,),
        input,
        Steps(1, input.shape[0]),
        states,
        step=True,
    )
    after = (h, *rest)
    return after if batched else tuple([state.squeeze(0) for state in after])


def _layers(
    stack: Stack,
    cell_states: bool,
    rows: Tensor,
    steps: Steps,
    states: States | None,
    reset: Tensor | None,
    batch_first: bool = False,
) -> Outputs:
    """Run layer after layer; arguments and results as of ``calls``."""
    resets = None
    if reset is not None:
        by_direction = operators if operators.traced(rows, rows) else sequences
        resets = by_direction.resets_by_direction(reset, steps, stack.directions)
    reverse = (False, True)[: stack.directions]

    def one(rows: Tensor, before: States | None, part: slice, last: bool) -> Outputs:
        wanted, turned = cell_states and last, batch_first and last
        weights = stack.weights[part]
        return int8.layer(
            stack.cell, stack.hidden_size, weights, reverse, rows, steps, before, resets, wanted, batch_first=turned
        )

    count, plain = len(stack.weights), connections.PLAIN
    return connections.layers(plain, one, count, stack.directions, stack.dropout, rows, states, batch_first)


def _computed(input: Tensor) -> Tensor:
    """The input in float32, where autocast may have made it narrower."""
    return input.float() if input.is_floating_point() and torch_private.any_autocast() else input


def _check_dtype(input: Tensor) -> None:
    if input.dtype != torch.float32:
        raise ValueError(
            f"input: expected torch.float32, in which int8 modules compute beside their weights, got {input.dtype}"
        )


def _check(stack: Stack, rank: int, input: Tensor, states: States | None, batch: int) -> None:
    """Check a sequence and its states, (L·D, N, H) each; raises as ``checks.check_input`` and ``checks.check_layers``."""
    _check_dtype(input)
    if input.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {input.dim()}")
    if input.shape[-1] != stack.input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {stack.input_size}, got {input.shape[-1]}")
    if states is not None:
        shape = (len(stack.weights), batch, stack.hidden_size)
        checks.check_state_sizes(states, [shape] * len(states))
        checks.check_same(input, "hidden", states)
    checks.check_same(input, "parameter", stack.weights[0][1:3:2])
