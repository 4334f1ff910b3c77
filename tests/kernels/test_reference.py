"""The reference against torch.nn, against itself through the kernel contract, and under differentiation of every kind."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fused_rnn import Weights, reference
from fused_rnn.cells import CELLS, equations_of
from fused_rnn.data.cell import Cell
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.reference import recurrence

DENSE = Steps(5, 4)
RAGGED = Steps.packed(torch.tensor([4, 4, 3, 1, 1]))
# As right-padded lengths: row t * N + j, sorted by length, with rows in between that no step works on, the last among them.
PADDED = Steps(3, 3, torch.tensor([3, 2, 1]), torch.tensor([0, 3, 6]))

CASES = [(name, 0) for name in CELLS] + [(name, 2) for name, cell in CELLS.items() if cell.projected is not None]
all_cells = pytest.mark.parametrize(("name", "projection"), CASES)
all_steps = pytest.mark.parametrize("steps", [DENSE, RAGGED, PADDED], ids=["dense", "ragged", "padded"])


def make(cell: Cell, steps: Steps, directions: int, projection: int = 0, dtype: torch.dtype = torch.float64):
    """Random input, states and weights, all of them leaves."""
    inputs, hidden = 3, 6
    size = projection or hidden
    rows = steps.length * steps.batch if steps is PADDED else steps.rows(0, steps.length).stop

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    gates = cell.num_gates * hidden
    weights = tuple(
        Weights(leaf(gates, inputs), leaf(gates, size), leaf(gates), leaf(gates), leaf(size, hidden) if projection else None)
        for _ in range(directions)
    )
    states = tuple(leaf(directions, steps.batch, size if state == "h" else hidden) for state in cell.states)
    return leaf(rows, inputs), states, weights


def columns_of(cell: Cell, blocks: Sequence[str], hidden: int) -> list[int]:
    """Where these blocks are in a row of d_gates."""
    return [cell.d_gates.index(block) * hidden + unit for block in blocks for unit in range(hidden)]


def leaves(input: Tensor, states: Sequence[Tensor], weights: Sequence[Weights]) -> list[Tensor]:
    return [input, *states, *(tensor for weight in weights for tensor in weight if tensor is not None)]


def torch_layer(cell: Cell, states: Sequence[Tensor], weights: Sequence[Weights]) -> torch.nn.RNNBase:
    """The module of torch.nn with these weights; skips a cell that torch does not know."""
    try:
        torch.nn.RNNBase(cell.mode, 1, 1)
    except ValueError:
        pytest.skip(f"torch.nn has no {cell.mode}")
    hidden = weights[0].hh.shape[0] // cell.num_gates
    kind, _, nonlinearity = cell.mode.partition("_")
    options: dict = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
    if weights[0].hr is not None:
        options["proj_size"] = weights[0].hr.shape[0]
    module = getattr(torch.nn, kind)(weights[0].ih.shape[1], hidden, bidirectional=len(weights) == 2, **options)
    for parameter, value in zip(module.parameters(), leaves(weights[0].ih, (), weights)[1:], strict=True):
        parameter.data = value.detach().clone()
    return module


@all_cells
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("steps", [DENSE, RAGGED], ids=["dense", "ragged"])
def test_layer_is_torch_nn(name: str, projection: int, steps: Steps, directions: int) -> None:
    cell = CELLS[name]
    input, states, weights = make(cell, steps, directions, projection)
    out, ends = reference.layer(cell, input, steps, states, weights, (False, True)[:directions])
    module = torch_layer(cell, states, weights)
    other = input.detach().requires_grad_()
    hx = tuple(state.detach().requires_grad_() for state in states)
    if steps.dense:
        sequence = other.view(steps.length, steps.batch, -1)
    else:
        sequence = torch.nn.utils.rnn.PackedSequence(other, steps.batch_sizes)
    expected, end = module(sequence, hx if len(hx) == 2 else hx[0])
    expected = expected.flatten(0, 1) if steps.dense else expected.data
    end = end if len(hx) == 2 else (end,)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ends, end)
    d_results = [torch.randn_like(result) for result in (out, *ends)]
    ours = torch.autograd.grad((out, *ends), leaves(input, states, weights), d_results)
    theirs = torch.autograd.grad((expected, *end), [other, *hx, *module.parameters()], d_results)
    torch.testing.assert_close(ours, theirs)


@all_cells
@all_steps
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_are_the_layer(name: str, projection: int, steps: Steps, resets: bool, dtype: torch.dtype) -> None:
    """Forward, tape and chunked backward of the kernel contract against autograd through the layer."""
    cell, reverse = CELLS[name], (False, True)
    input, states, weights = make(cell, steps, 2, projection, dtype)
    rows, hidden = input.shape[0], weights[0].hh.shape[0] // cell.num_gates
    size, columns = weights[0].hh.shape[1], cell.num_gates * hidden
    reset = torch.rand(rows) < 0.3 if resets else None
    has_c = cell.cell_state is not None
    masks = None if reset is None else reset.expand(len(reverse), -1)
    out, ends = reference.layer(cell, input, steps, states, weights, reverse, masks, cell_states=has_c)
    d_results = [torch.randn_like(result) for result in (out, *ends)]
    expected = dict(
        zip(
            ("input", *cell.states, *((d, f) for d in range(2) for f in Weights._fields if f != "hr" or projection)),
            torch.autograd.grad((out, *ends), leaves(input, states, weights), d_results),
            strict=True,
        )
    )

    pack, forward, backward = recurrence.walk(equations_of(CELLS[name]))
    detached = [Weights(*(None if tensor is None else tensor.detach() for tensor in weight)) for weight in weights]
    # Rows that no step works on hold NaN: nothing may read them.
    tape = torch.full((rows, 2, len(cell.tape) * hidden), math.nan, dtype=dtype)
    kept = tape if cell.tape_is_out else torch.full((rows, 2, size), math.nan, dtype=dtype)
    for d, weight in enumerate(detached):
        tape[:, d, :columns] = input.detach() @ weight.ih.t()
    apart = (len(cell.bias) - cell.num_gates) * hidden
    bias = torch.stack(
        [
            torch.cat(
                (w.bias_ih[: columns - apart] + w.bias_hh[: columns - apart], *(b[columns - apart :] for b in w[2:4] if apart))
            )
            for w in detached
        ]
    )
    weight_hh = [weight.hh for weight in detached]
    weight_hr = [weight.hr for weight in detached] if projection else None
    walked = tuple(state.detach().clone() for state in states)
    forward(tape, kept, walked, pack(weight_hh, weight_hr, steps, False), bias, steps, reverse, reset, True)
    active = torch.cat([torch.arange(*_span(steps, t)) for t in range(steps.length)])
    torch.testing.assert_close(kept.flatten(1)[active], out[active].detach())
    torch.testing.assert_close(walked, tuple(end.detach() for end in ends[: len(states)]))
    if has_c:
        block = tape[..., cell.tape.index(cell.cell_state) * hidden :][..., :hidden]
        torch.testing.assert_close(block[active], ends[-1].detach().view(rows, 2, hidden)[active])

    d_walk = tuple(d_end.clone() for d_end in d_results[1 : 1 + len(states)])
    d_cells = d_results[-1].view(rows, 2, hidden) if has_c else None
    d_out = d_results[0].view(rows, 2, size)
    d_gates = torch.full((rows, 2, len(cell.d_gates) * hidden + (size if projection else 0)), math.nan, dtype=dtype)
    before = (tape.clone(), kept.clone())
    for d, backwards in enumerate(reverse):
        chunks = [(0, 2), (2, steps.length)]
        one = slice(d, d + 1)
        for t_begin, t_end in chunks if backwards else reversed(chunks):
            backward(
                d_gates[steps.rows(t_begin, t_end), one],
                tuple(d_state[one] for d_state in d_walk),
                d_out[:, one],
                None if d_cells is None else d_cells[:, one],
                tape[:, one],
                kept[:, one],
                tuple(state.detach()[one] for state in states),
                pack(weight_hh[one], weight_hr and weight_hr[one], steps, True),
                steps,
                t_begin,
                t_end,
                reverse[one],
                reset,
            )
    torch.testing.assert_close((tape, kept), before, rtol=0, atol=0, equal_nan=True)
    d_gates = d_gates[active]
    for state, d_state in zip(cell.states, d_walk, strict=True):
        torch.testing.assert_close(d_state, expected[state])
    for d in range(2):
        of_input, of_recurrence = (d_gates[:, d, columns_of(cell, names, hidden)] for names in (cell.d_ih, cell.d_hh))
        torch.testing.assert_close(of_input.t() @ input.detach()[active], expected[d, "ih"])
        torch.testing.assert_close(of_input.sum(0), expected[d, "bias_ih"])
        torch.testing.assert_close(of_recurrence.sum(0), expected[d, "bias_hh"])
    if projection:
        assert d_gates.shape[-1] == len(cell.d_gates) * hidden + projection


def _span(steps: Steps, t: int) -> tuple[int, int]:
    rows = steps.rows(t, t + 1)
    return rows.start, rows.stop


@pytest.mark.parametrize("name", CELLS)
def test_tape_holds_what_the_table_says(name: str) -> None:
    """The states are in it, and the part that stays apart."""
    cell, n, hidden = CELLS[name], 2, 3
    equations = equations_of(CELLS[name])
    gates_x, gates_h = torch.randn(2, n, cell.num_gates * hidden, dtype=torch.float64)
    before = tuple(torch.randn(n, hidden, dtype=torch.float64) for _ in cell.states)
    after, tape = equations.step(gates_x, gates_h, before)
    assert (len(after), len(tape)) == (len(cell.states), len(cell.tape))
    for state, value in zip(cell.states, after, strict=True):
        if state in cell.tape:
            torch.testing.assert_close(tape[cell.tape.index(state)], value)
    if cell.apart is not None:
        torch.testing.assert_close(tape[cell.tape.index(cell.apart)], gates_h[:, -hidden:])
    if cell.projected is not None:
        torch.testing.assert_close(cell.projected(tape), after[0])


@pytest.mark.parametrize("name", CELLS)
def test_the_table_says_what_the_equations_do(name: str) -> None:
    """``direct`` and ``apart``, by the derivatives of one step; in the tests of kernels, a wrong one is a wrong number."""
    cell, n, hidden = CELLS[name], 2, 3
    step = equations_of(CELLS[name]).step
    gates_x, gates_h = torch.randn(2, n, cell.num_gates * hidden, dtype=torch.float64).unbind()
    before = tuple(torch.randn(n, hidden, dtype=torch.float64) for _ in cell.states)
    given = [tensor.clone().requires_grad_() for tensor in (gates_x, gates_h, *before)]
    after, _ = step(given[0], given[1], tuple(given[2:]))
    d_after = [torch.randn_like(state) for state in after]
    d_x, d_h, *d_before = torch.autograd.grad(after, given, d_after, allow_unused=True, materialize_grads=True)
    assert bool(d_before[0].count_nonzero()) == cell.direct
    differ = [bool((x != h).any()) for x, h in zip(d_x.chunk(cell.num_gates, -1), d_h.chunk(cell.num_gates, -1), strict=True)]
    assert differ == [x != h for x, h in zip(cell.d_ih, cell.d_hh, strict=True)]


@pytest.mark.parametrize("name", CELLS)
def test_backward_of_saturated_gates_is_finite(name: str) -> None:
    cell, hidden = CELLS[name], 2
    pack, forward, backward = recurrence.walk(equations_of(CELLS[name]))
    steps, gates = Steps(2, 1), cell.num_gates * hidden
    tape = torch.zeros(2, 1, len(cell.tape) * hidden)
    tape[..., :gates] = 200.0
    out = tape if cell.tape_is_out else torch.zeros(2, 1, hidden)
    states = tuple(torch.zeros(1, 1, hidden) for _ in cell.states)
    weight_hh = [torch.zeros(gates, hidden)]
    forward(tape, out, states, pack(weight_hh, None, steps, False), None, steps, (False,), None, True)
    d_gates = torch.full((2, 1, len(cell.d_gates) * hidden), math.nan)
    d_states = tuple(torch.ones(1, 1, hidden) for _ in cell.states)
    states_0 = tuple(torch.zeros(1, 1, hidden) for _ in cell.states)
    backward(
        d_gates, d_states, None, None, tape, out, states_0, pack(weight_hh, None, steps, True), steps, 0, 2, (False,), None
    )
    assert all(result.isfinite().all() for result in (d_gates, *d_states))
    # The same by differentiating the layer, whose input goes straight into the gates.
    input = torch.full((2, gates), 200.0, requires_grad=True)
    weights = (Weights(torch.eye(gates), weight_hh[0]),)
    _, ends = reference.layer(cell, input, steps, states_0, weights, (False,))
    (expected,) = torch.autograd.grad(ends, input, tuple(torch.ones_like(end) for end in ends))
    torch.testing.assert_close(d_gates[:, 0, -gates:], expected)


@all_cells
def test_second_derivatives(name: str, projection: int) -> None:
    cell, steps = CELLS[name], Steps.packed(torch.tensor([2, 1]))
    input, states, weights = make(cell, steps, 1, projection)
    reset = torch.tensor([[False, False, True]])

    def function(*flat: Tensor) -> tuple[Tensor, ...]:
        count = 1 + len(states)
        out, ends = reference.layer(
            cell, flat[0], steps, flat[1:count], (Weights(*flat[count:]),), (True,), reset, cell.cell_state is not None
        )
        return out, *ends

    assert torch.autograd.gradcheck(function, leaves(input, states, weights))
    assert torch.autograd.gradgradcheck(function, leaves(input, states, weights))


@pytest.mark.parametrize("name", CELLS)
def test_function_transforms(name: str) -> None:
    cell, steps = CELLS[name], Steps(3, 2)
    input, states, weights = make(cell, steps, 2)

    def total(rows: Tensor) -> Tensor:
        return reference.layer(cell, rows, steps, states, weights, (False, True))[0].sin().sum()

    expected = torch.autograd.grad(total(input), input)[0]
    torch.testing.assert_close(torch.func.grad(total)(input.detach()), expected)
    batch = torch.stack((input.detach(), -input.detach()))
    per_sample = torch.func.vmap(torch.func.grad(total))(batch)
    torch.testing.assert_close(per_sample[0], expected)
    tangent = torch.randn_like(input)
    _, pushed = torch.func.jvp(total, (input.detach(),), (tangent,))
    torch.testing.assert_close(pushed, (expected * tangent).sum())


def test_padding_rows_are_zero_and_sequences_without_a_step_keep_their_state() -> None:
    cell = CELLS["gru"]
    steps = Steps(2, 3, torch.tensor([2, 1]), torch.tensor([0, 3]))
    weights = (Weights(torch.randn(6, 4), torch.randn(6, 2)),)
    states = (torch.randn(1, 3, 2),)
    input = torch.randn(6, 4)
    out, (end,) = reference.layer(cell, input, steps, states, weights, (False,))
    assert out[[2, 4, 5]].count_nonzero() == 0
    assert out[[0, 1, 3]].count_nonzero() == 6
    torch.testing.assert_close(end[0, 2], states[0][0, 2], rtol=0, atol=0)
    torch.testing.assert_close(end[0, 0], out[3])
    torch.testing.assert_close(end[0, 1], out[1])
