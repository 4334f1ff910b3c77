"""``reset=``: as a loop that zeroes the state between steps; in both directions, with lengths and packed; wrong values."""

from __future__ import annotations

import pytest
import torch
from sequences_support import KINDS, Problem, check, given, leaves_of, listed, make, with_gradients
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn

every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTHS = [3, 6, 0, 1, 5]


def mask(kind: str = "some") -> Tensor:
    """(T, N) of 6 and 5: nowhere, everywhere, or in all places that matter, the first and the last step among them."""
    if kind != "some":
        return torch.full((6, 5), kind == "all")
    reset = torch.zeros(6, 5, dtype=torch.bool)
    for t, n in ((0, 0), (2, 0), (5, 0), (3, 1), (4, 1), (0, 2), (1, 4), (3, 4)):
        reset[t, n] = True
    return reset


def run(problem: Problem, reset: Tensor, **options: object) -> list[Tensor]:
    x, hx, leaves = leaves_of(problem, problem.ours)
    out, states = problem.ours(x, given(hx), reset=reset, **options)
    return with_gradients([out, *listed(states)], leaves)


@every_kind
@pytest.mark.parametrize("where", ["some", "all", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_resets_are_a_loop(kind: str, where: str, dtype: torch.dtype, backend: str) -> None:
    """Two layers, two directions: outputs, last states and all gradients."""
    problem = make(kind, dtype)
    check(problem, None, mask(where), run(problem, mask(where)), cells=False)


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
def test_resets_and_lengths(kind: str, bidirectional: bool, backend: str) -> None:
    """A reset beyond a length, or just there, is none."""
    problem = make(kind, bidirectional=bidirectional)
    check(problem, LENGTHS, mask(), run(problem, mask(), lengths=torch.tensor(LENGTHS)), cells=False)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_loop_of_recurrent_ppo(kind: str, bidirectional: bool, backend: str) -> None:
    """The loop as such code writes it: one step of torch.nn's module at a time, the state times (1 - done) before."""
    problem = make(kind, bidirectional=False, num_layers=2)
    done = torch.rand(6, 5) < 0.3
    actual = run(problem, done)
    x, hx, leaves = leaves_of(problem, problem.theirs)
    states, outs = hx, []
    for t in range(6):
        kept = (1.0 - done[t].double()).view(1, -1, 1)
        out, after = problem.theirs(x[t : t + 1], given([kept * state for state in states]))
        states = listed(after)
        outs.append(out)
    expected = with_gradients([torch.cat(outs), *states], leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_kind
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed(kind: str, enforce_sorted: bool, backend: str) -> None:
    """A mask that is packed like the input."""
    problem = make(kind)
    lengths = torch.tensor([6, 5, 5, 2, 1] if enforce_sorted else [3, 6, 2, 1, 5])
    expected = run(problem, mask(), lengths=lengths)
    x, hx, leaves = leaves_of(problem, problem.ours)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    reset = pack_padded_sequence(mask(), lengths, enforce_sorted=enforce_sorted)
    out, states = problem.ours(packed, given(hx), reset=reset)
    actual = with_gradients([pad_packed_sequence(out)[0], *listed(states)], leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_kind
@pytest.mark.parametrize("lengths", [None, torch.tensor(LENGTHS)], ids=["whole", "lengths"])
def test_batch_first_and_unbatched(kind: str, lengths: Tensor | None, backend: str) -> None:
    problem, reset = make(kind), mask()
    expected, ends = problem.ours(problem.x, given(problem.hx), reset=reset, lengths=lengths)
    problem.ours.batch_first = True
    out, states = problem.ours(problem.x.transpose(0, 1), given(problem.hx), reset=reset.t(), lengths=lengths)
    torch.testing.assert_close(out.transpose(0, 1), expected)
    torch.testing.assert_close(listed(states), listed(ends))
    for n in range(5):
        one = None if lengths is None else lengths[n]
        out, states = problem.ours(problem.x[:, n], given([s[:, n] for s in problem.hx]), reset=reset[:, n], lengths=one)
        torch.testing.assert_close(out, expected[:, n])
        torch.testing.assert_close(listed(states), tuple(end[:, n] for end in listed(ends)))


@every_kind
def test_nothing_crosses(kind: str, backend: str) -> None:
    """Neither values nor gradients, in either direction; not even what is not a number."""
    problem = make(kind)
    reset = torch.zeros(6, 5, dtype=torch.bool)
    reset[3] = True
    x = problem.x.clone().requires_grad_()
    out, _ = problem.ours(x, given(problem.hx), reset=reset)
    for part, other in ((slice(0, 3), slice(3, 6)), (slice(3, 6), slice(0, 3))):
        (d_x,) = torch.autograd.grad(out[part].square().sum(), x, retain_graph=True)
        assert not d_x[other].any()
        assert d_x[part].all()
        broken = problem.x.clone()
        broken[other] = float("nan")
        again, _ = problem.ours(broken, given(problem.hx), reset=reset)
        assert torch.equal(again[part], out[part])
        assert again[other].isnan().all()


@every_kind
def test_first_step(kind: str, backend: str) -> None:
    """A reset there discards the forward direction's initial state, and that alone."""
    problem, reset = make(kind, num_layers=1), torch.zeros(6, 5, dtype=torch.bool)
    reset[0] = True
    zeroed = [torch.stack([torch.zeros_like(state[0]), state[1]]) for state in problem.hx]
    out, states = problem.ours(problem.x, given(problem.hx), reset=reset)
    expected, ends = problem.ours(problem.x, given(zeroed))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(listed(states), listed(ends))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Against float64 from the same rounded numbers, as near as one rounding per stored value allows."""
    problem = make(kind, dtype, num_layers=1)
    exact = Problem(problem.theirs, problem.ours, problem.x.double(), tuple(state.double() for state in problem.hx))
    actual = run(problem, mask())
    exact.ours = problem.ours.double()
    for a, b in zip(actual, run(exact, mask()), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_one_step_and_inference(kind: str, backend: str) -> None:
    problem, reset = make(kind, bidirectional=False), mask()
    with torch.no_grad():
        expected, _ = problem.ours(problem.x, given(problem.hx), reset=reset)
        states = given(problem.hx)
        for t in range(6):
            out, states = problem.ours(problem.x[t : t + 1], states, reset=reset[t : t + 1])
            torch.testing.assert_close(out[0], expected[t])


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 0, 3])], ids=["whole", "lengths"])
def test_first_and_second_derivatives(kind: str, lengths: Tensor | None, backend: str) -> None:
    problem = make(kind, num_layers=1, steps=3, batch=3)
    module = getattr(fused_rnn, kind)(3, 2, bidirectional=True, dtype=torch.float64)
    hx = [torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in problem.hx]
    reset = torch.tensor([[False, True, False], [True, False, False], [False, False, True]])

    def function(x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        out, states = module(x, given(hx), reset=reset, lengths=lengths)
        return out, *listed(states)

    inputs = (problem.x.requires_grad_(), *hx)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_meta_and_batch_of_none() -> None:
    module = fused_rnn.GRU(3, 17, bidirectional=True, device="meta")
    x, reset = torch.empty(6, 5, 3, device="meta"), torch.empty(6, 5, dtype=torch.bool, device="meta")
    assert module(x, reset=reset)[0].shape == (6, 5, 34)
    out, _ = fused_rnn.GRU(3, 17, bidirectional=True)(torch.randn(6, 0, 3), reset=torch.zeros(6, 0, dtype=torch.bool))
    assert out.shape == (6, 0, 34)


def other_packing(sizes: list[int], order: list[int] | None = None) -> PackedSequence:
    indices = None if order is None else torch.tensor(order)
    return PackedSequence(torch.zeros(sum(sizes), dtype=torch.bool), torch.tensor(sizes), indices)


WRONG = {
    "a list": (lambda x: [True] * 6, TypeError, "reset: expected a boolean tensor, got list"),
    "floats": (lambda x: torch.ones(6, 5), TypeError, r"reset: expected a boolean tensor, got one of torch\.float32"),
    "bytes": (lambda x: torch.ones(6, 5, dtype=torch.uint8), TypeError, r"got one of torch\.uint8"),
    "transposed": (lambda x: mask().t(), ValueError, r"reset: expected shape \(6, 5\), a flag for each step.*got \(5, 6\)"),
    "for each step alone": (lambda x: mask()[:, 0], ValueError, r"expected shape \(6, 5\).*got \(6,\)"),
    "with features": (lambda x: mask()[..., None], ValueError, r"expected shape \(6, 5\).*got \(6, 5, 1\)"),
    "on another device": (lambda x: mask().to("meta"), RuntimeError, "found input tensor at cpu and reset tensor at meta"),
    "packed": (lambda x: other_packing([5]), TypeError, "reset: expected a boolean tensor, got PackedSequence"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_wrong_resets_raise(kind: str, case: str) -> None:
    reset, error, message = WRONG[case]
    problem = make(kind)
    with pytest.raises(error, match=message):
        problem.ours(problem.x, reset=reset(problem.x))


def test_wrong_packed_resets_raise() -> None:
    problem = make("GRU")
    lengths = torch.tensor([2, 1, 1, 1, 2])
    packed = pack_padded_sequence(problem.x[:2], lengths, enforce_sorted=False)
    with pytest.raises(TypeError, match=r"reset: expected a PackedSequence of booleans, .* got Tensor"):
        problem.ours(packed, reset=mask())
    with pytest.raises(ValueError, match=r"reset: expected the batch_sizes of the input, \[5, 2\], got \[5, 1, 1\]"):
        problem.ours(packed, reset=other_packing([5, 1, 1]))
    with pytest.raises(ValueError, match="reset: expected the sorted_indices of the input"):
        problem.ours(packed, reset=other_packing([5, 2]))
    floats = pack_padded_sequence(torch.zeros(2, 5), lengths, enforce_sorted=False)
    with pytest.raises(TypeError, match=r"got one of torch\.float32"):
        problem.ours(packed, reset=floats)
    right = pack_padded_sequence(mask()[:2], lengths, enforce_sorted=False)
    assert problem.ours(packed, reset=right)[0].data.shape == (7, 34)
