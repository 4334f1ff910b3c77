"""``return_cell_states=True``: c of every step, its shape in every kind of batch, and its gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from sequences_support import Problem, check, leaves_of, make, with_gradients
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn.kernels.by_walk import backward, forward

LENGTHS = torch.tensor([3, 6, 0, 1, 5])
every_kind = pytest.mark.parametrize("kind", ["LSTM", "projected"])


def run(problem: Problem, **options: object) -> list[Tensor]:
    x, hx, leaves = leaves_of(problem, problem.ours)
    out, states, cells = problem.ours(x, tuple(hx), return_cell_states=True, **options)
    return with_gradients([out, *states, cells], leaves)


@every_kind
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cell_states_are_those_of_a_loop(kind: str, layers: int, bidirectional: bool, dtype: torch.dtype, backend: str) -> None:
    """The last layer's, with H features for each direction; outputs, states and all gradients."""
    problem = make(kind, dtype, num_layers=layers, bidirectional=bidirectional)
    actual = run(problem)
    assert actual[3].shape == (6, 5, 17 * (1 + bidirectional))
    check(problem, None, None, actual, cells=True)


@every_kind
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
def test_with_lengths_and_resets(kind: str, lengths: Tensor | None, backend: str) -> None:
    problem, reset = make(kind), torch.rand(6, 5) < 0.3
    actual = run(problem, lengths=lengths, reset=reset)
    check(problem, None if lengths is None else lengths.tolist(), reset, actual, cells=True)


@every_kind
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_in_chunks_of_time_and_without_a_backward(
    kind: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Where the tape is not kept, and where it is stored in another dtype than it is computed in."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
        monkeypatch.setattr(module, "_CHUNK_ROWS", rows)
    problem = make(kind, dtype, num_layers=1)
    exact = Problem(problem.theirs, problem.ours, problem.x.double(), tuple(state.double() for state in problem.hx))
    actual = run(problem)
    with torch.no_grad():
        out, _, cells = problem.ours(problem.x, problem.hx, return_cell_states=True)
    torch.testing.assert_close(out, actual[0])
    torch.testing.assert_close(cells, actual[3])
    exact.ours = problem.ours.double()
    eps = torch.finfo(dtype).eps
    for a, b in zip(actual, run(exact), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= (4 if eps > 1e-3 else 64) * eps * b.abs().max().clamp(min=1)


@every_kind
def test_every_kind_of_batch(kind: str, backend: str) -> None:
    """Batch-first, unbatched and packed have the shape that the output has."""
    problem = make(kind)
    module = functools.partial(problem.ours, return_cell_states=True)
    _, _, expected = module(problem.x)
    for n in range(5):
        torch.testing.assert_close(module(problem.x[:, n])[2], expected[:, n])
    lengths = torch.tensor([2, 6, 4, 1, 5])
    packed = module(pack_padded_sequence(problem.x, lengths, enforce_sorted=False))[2]
    assert isinstance(packed, PackedSequence)
    torch.testing.assert_close(pad_packed_sequence(packed)[0], module(problem.x, lengths=lengths)[2])
    problem.ours.batch_first = True
    torch.testing.assert_close(module(problem.x.transpose(0, 1))[2].transpose(0, 1), expected)


def test_one_step(backend: str) -> None:
    problem = make("LSTM", num_layers=1, bidirectional=False)
    with torch.no_grad():
        out, (h, c), cells = problem.ours(problem.x[:1], problem.hx, return_cell_states=True)
    assert torch.equal(out, h)
    assert torch.equal(cells, c)


def test_last_cell_states_are_c_n(backend: str) -> None:
    problem = make("LSTM")
    _, (_, c), cells = problem.ours(problem.x, problem.hx, return_cell_states=True)
    assert torch.equal(cells[-1, :, :17], c[-2])
    assert torch.equal(cells[0, :, 17:], c[-1])


@every_kind
def test_gradient_of_cell_states_alone(kind: str, backend: str) -> None:
    """The output and the last states take no part."""
    problem = make(kind)
    x, hx, leaves = leaves_of(problem, problem.ours)
    cells = problem.ours(x, tuple(hx), return_cell_states=True)[2]
    actual = torch.autograd.grad(cells.square().sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(cells.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    with fused_rnn.backend("reference"):
        cells = problem.ours(x, tuple(hx), return_cell_states=True)[2]
        expected = torch.autograd.grad(cells.square().sum(), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_first_and_second_derivatives(backend: str) -> None:
    module = fused_rnn.LSTM(3, 2, bidirectional=True, dtype=torch.float64)
    x, *hx = (torch.randn(3, 2, 3, dtype=torch.float64), *(torch.randn(2, 2, 2, dtype=torch.float64) for _ in "hc"))
    reset = torch.tensor([[False, True], [True, False], [False, False]])

    def function(x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        out, states, cells = module(x, hx, reset=reset, return_cell_states=True)
        return out, *states, cells

    inputs = tuple(tensor.requires_grad_() for tensor in (x, *hx))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("record", [False, True])
def test_cell_states_may_be_changed_in_place(record: bool, backend: str) -> None:
    """They are a copy: neither the backward nor the last state sees what becomes of them."""
    problem = make("LSTM", num_layers=1)
    x, hx, leaves = leaves_of(problem, problem.ours)
    with torch.set_grad_enabled(record):
        out, (_, c), cells = problem.ours(x, tuple(hx), return_cell_states=True)
        kept = c.clone()
        cells.zero_()
    assert torch.equal(c, kept)
    if record:
        actual = torch.autograd.grad(out.sum() + c.sum(), leaves)
        out, (_, c) = problem.ours(x, tuple(hx))
        for a, b in zip(actual, torch.autograd.grad(out.sum() + c.sum(), leaves), strict=True):
            assert torch.equal(a, b)


def test_meta_and_nothing_to_compute() -> None:
    module = fused_rnn.LSTM(3, 17, proj_size=4, device="meta")
    assert module(torch.empty(6, 5, 3, device="meta"), return_cell_states=True)[2].shape == (6, 5, 17)
    module = fused_rnn.LSTM(3, 17, num_layers=2, bidirectional=True)
    assert module(torch.empty(6, 0, 3), return_cell_states=True)[2].shape == (6, 0, 34)
    cells = module(torch.ones(6, 5, 3), lengths=torch.zeros(5, dtype=torch.int64), return_cell_states=True)[2]
    assert cells.shape == (6, 5, 34)
    assert not cells.any()


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_cells_without_c_raise(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_cell_states'"):
        getattr(fused_rnn, name)(3, 4)(torch.ones(6, 5, 3), return_cell_states=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_cell_states'"):
        getattr(fused_rnn.functional, {"RNN": "rnn_tanh", "GRU": "gru"}[name])(torch.ones(6, 5, 3), [], return_cell_states=True)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_no_bool_raises(value: object) -> None:
    with pytest.raises(TypeError, match=f"return_cell_states: expected a bool, got {type(value).__name__}"):
        fused_rnn.LSTM(3, 4)(torch.ones(6, 5, 3), return_cell_states=value)
