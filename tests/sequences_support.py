"""What lengths, resets and c of every step are compared with: a loop over layers, directions, sequences and steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tolerances import assert_close_to_reference
from torch import Tensor

import fused_rnn

# (module, its own options)
KINDS = {
    "RNN": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "GRU": ("GRU", {}),
    "LSTM": ("LSTM", {}),
    "projected": ("LSTM", {"proj_size": 5}),
}


@dataclass
class Problem:
    """A module of torch.nn, ours with the same numbers, and what they are run on."""

    theirs: torch.nn.RNNBase
    ours: torch.nn.RNNBase
    x: Tensor
    hx: tuple[Tensor, ...]


def make(kind: str, dtype: torch.dtype = torch.float64, steps: int = 6, batch: int = 5, **options: object) -> Problem:
    """Two layers and both directions, where the options do not say otherwise; x is (T, N, I)."""
    name, own = KINDS[kind]
    options = {"num_layers": 2, "bidirectional": True, **own, **options}
    theirs = getattr(torch.nn, name)(3, 17, dtype=dtype, **options)
    ours = getattr(fused_rnn, name)(3, 17, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    recurrences = theirs.num_layers * (1 + theirs.bidirectional)
    widths = (theirs.proj_size or 17, 17)[: 2 if name == "LSTM" else 1]
    hx = tuple(torch.randn(recurrences, batch, width, dtype=dtype) for width in widths)
    return Problem(theirs, ours, torch.randn(steps, batch, 3, dtype=dtype), hx)


def given(states: Sequence[Tensor]) -> object:
    """The states as a module takes them."""
    return states[0] if len(states) == 1 else tuple(states)


def listed(states: object) -> tuple[Tensor, ...]:
    return (states,) if isinstance(states, Tensor) else tuple(states)


def reset_before(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """A step of the GRU as Cho et al. 2014 have it: the reset gate multiplies h before the product."""
    linear = torch.nn.functional.linear
    hidden = h.shape[-1]
    x_r, x_z, x_n = linear(x, w_ih, b_ih).split(hidden, -1)
    of_h, of_m = (None, None) if b_hh is None else (b_hh[: 2 * hidden], b_hh[2 * hidden :])
    h_r, h_z = linear(h, w_hh[: 2 * hidden], of_h).split(hidden, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + linear(r * h, w_hh[2 * hidden :], of_m))
    return (1 - z) * n + z * h


def _step(module: torch.nn.RNNBase, suffix: str, x: Tensor, states: list[Tensor]) -> list[Tensor]:
    parameters = [getattr(module, f"{kind}_{suffix}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    if module.mode == "LSTM":
        # torch.lstm_cell knows no projection: its h is o ⊙ tanh(c), whatever the size of the h that comes in.
        gates = torch.nn.functional.linear(x, parameters[0], parameters[2])
        gates = gates + torch.nn.functional.linear(states[0], parameters[1], parameters[3])
        if getattr(module, "coupled", False):
            i, g, o = gates.chunk(3, -1)
            c = (1 - i.sigmoid()) * states[1] + i.sigmoid() * g.tanh()
        else:
            i, f, g, o = gates.chunk(4, -1)
            c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return [h @ getattr(module, f"weight_hr_{suffix}").t() if module.proj_size else h, c]
    if not getattr(module, "reset_after", True):
        return [reset_before(x, states[0], *parameters)]
    cell = {"GRU": torch.gru_cell, "RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell}[module.mode]
    return [cell(x, states[0], *parameters)]


def explicit(
    module: torch.nn.RNNBase,
    x: Tensor,
    hx: Sequence[Tensor],
    lengths: Sequence[int] | None = None,
    reset: Tensor | None = None,
) -> list[Tensor]:
    """Every step of every sequence on its own.

    Args:
        x: (T, N, I).
        lengths: N of them.
        reset: (T, N).

    Returns:
        out (T, N, ·), the last states, and for the LSTM c of the last layer at every step.
    """
    length, batch = x.shape[:2]
    lengths = [length] * batch if lengths is None else lengths
    directions = 2 if module.bidirectional else 1
    ends: list[list[Tensor]] = [[] for _ in hx]
    for layer in range(module.num_layers):
        by_direction = []
        for d in range(directions):
            suffix = f"l{layer}" + "_reverse" * d
            walked = []
            last: list[list[Tensor]] = []
            for n in range(batch):
                states = [state[layer * directions + d, n : n + 1] for state in hx]
                blank = [torch.zeros_like(state[0]) for state in states]
                outs = [blank] * length
                for t in range(lengths[n]) if d == 0 else reversed(range(lengths[n])):
                    # What parts this step from the one before it in the walk.
                    boundary = t if d == 0 else t + 1
                    if reset is not None and boundary < lengths[n] and bool(reset[boundary, n]):
                        states = [torch.zeros_like(state) for state in states]
                    states = _step(module, suffix, x[t, n : n + 1], states)
                    outs[t] = [state[0] for state in states]
                last.append([state[0] for state in states])
                walked.append([torch.stack([out[s] for out in outs]) for s in range(len(hx))])
            by_direction.append([torch.stack([sequence[s] for sequence in walked], 1) for s in range(len(hx))])
            for s, end in enumerate(ends):
                end.append(torch.stack([sequence[s] for sequence in last]))
        x, *cells = (torch.cat([direction[s] for direction in by_direction], -1) for s in range(len(hx)))
    return [x, *(torch.stack(end) for end in ends), *cells]


def with_gradients(values: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The values, and the gradients of a weighted sum of them."""
    loss = sum((value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum() for value in values)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach() for value in values] + list(grads)


def leaves_of(problem: Problem, module: torch.nn.RNNBase, wider: bool = False) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Copies of x and hx that record, and all leaves."""
    x, *hx = (tensor.detach().to(torch.float64 if wider else None).requires_grad_() for tensor in (problem.x, *problem.hx))
    return x, hx, [x, *hx, *module.parameters()]


def names_of(problem: Problem, cells: bool = False) -> list[str]:
    states = ["h", "c"][: len(problem.hx)]
    values = ["out", *(f"{name}_n" for name in states), *(["cells"] if cells else [])]
    return [*values, "d_x", *(f"d_{name}_0" for name in states), *(f"d_{name}" for name, _ in problem.ours.named_parameters())]


def check(problem: Problem, lengths: Sequence[int] | None, reset: Tensor | None, actual: Sequence[Tensor], cells: bool) -> None:
    """Compare values and gradients with the loop's, in float64 and in torch's cells of the same dtype."""
    expected = []
    for wider in (False, True):
        module = copy.deepcopy(problem.theirs).double() if wider else problem.theirs
        x, hx, leaves = leaves_of(problem, module, wider)
        values = explicit(module, x, hx, lengths, reset)
        expected.append(with_gradients(values if cells else values[: 1 + len(hx)], leaves))
    for name, *three in zip(names_of(problem, cells), actual, *expected, strict=True):
        assert_close_to_reference(*three, name)
