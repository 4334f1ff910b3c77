"""torch.nn on a layer with resets: every sequence is cut at its resets, and the pieces are a packed batch.

This is what one can do with cuDNN. It is given more than a user has: where to cut is known before the call, and rows go
straight into the order of a PackedSequence, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from benchmarks.gpu.problem import Problem, Results, Run, results_of, torch_module


@dataclass(frozen=True)
class Pieces:
    """Where the pieces are, longest first.

    Attributes:
        rows: (R,) of the problem, in the order of the packed batch; back: (R,) its inverse.
        batch_sizes: (steps of the longest piece,), on the CPU.
        first, last: (N,) of every sequence, its first and its last piece.
        kept: (N,) whether a sequence's first piece starts with the given state: where there is no reset at its first step.
    """

    rows: Tensor
    back: Tensor
    batch_sizes: Tensor
    first: Tensor
    last: Tensor
    kept: Tensor


def cut(reset: Tensor, length: int, batch: int) -> Pieces:
    """The pieces of a dense batch. reset: (T·N,), rows of all steps one after another."""
    at = reset.view(length, batch).cpu()
    kept = ~at[0]
    starts = at.clone()
    starts[0] = True
    # By sequence, then by time: the order in which pieces are numbered.
    sequence, begin = starts.T.nonzero(as_tuple=True)
    count = len(begin)
    same = sequence[1:] == sequence[:-1]
    end = torch.full((count,), length)
    end[:-1][same] = begin[1:][same]
    order = torch.argsort(end - begin, descending=True, stable=True)
    sequence, begin, lengths = sequence[order], begin[order], (end - begin)[order]
    steps = torch.arange(int(lengths[0]))
    present = steps[:, None] < lengths[None, :]
    rows = ((begin[None, :] + steps[:, None]) * batch + sequence[None, :])[present]
    first, last = torch.empty(batch, dtype=torch.long), torch.empty(batch, dtype=torch.long)
    places = torch.arange(count)
    is_first, is_last = begin == 0, begin + lengths == length
    first[sequence[is_first]], last[sequence[is_last]] = places[is_first], places[is_last]
    moved = (tensor.to(reset.device) for tensor in (rows, torch.argsort(rows)))
    ends = (tensor.to(reset.device) for tensor in (first, last, kept))
    return Pieces(*moved, present.sum(1), *ends)


def cudnn_pieces(problem: Problem) -> Run:
    """torch.nn on the pieces, with the results of the whole problem."""
    case = problem.case
    if problem.reset is None or problem.steps.batch_sizes is not None:
        raise ValueError(f"expected a dense batch with resets, got {case.name}")
    module, leaves = torch_module(problem)
    pieces = cut(problem.reset, problem.steps.length, case.batch)
    count = int(pieces.batch_sizes[0])
    # Where each direction comes in: the first direction at a sequence's first piece, the second at its last.
    comes_in, goes_out = (pieces.first, pieces.last), (pieces.last, pieces.first)
    directions = range(case.directions)

    def given(state: Tensor) -> Tensor:
        parts = []
        for d in directions:
            value = state[d] if d else state[d] * pieces.kept[:, None]
            parts.append(value.new_zeros(count, case.hidden).index_copy(0, comes_in[d], value))
        return torch.stack(parts)

    def run(training: bool) -> Results:
        with torch.set_grad_enabled(training):
            hx = tuple(given(state) for state in problem.states)
            packed = PackedSequence(problem.input.index_select(0, pieces.rows), pieces.batch_sizes)
            packed, ends = module(packed, hx if len(hx) > 1 else hx[0])
            out = packed.data.index_select(0, pieces.back)
            ends = ends if isinstance(ends, tuple) else (ends,)
            ends = tuple(torch.stack([end[d].index_select(0, goes_out[d]) for d in directions]) for end in ends)
            return results_of(problem, out, ends, training, leaves)

    return run
