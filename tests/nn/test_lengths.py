"""``lengths=``: as packing, running and padding again, without sorting; zero-length sequences; gradients; wrong values."""

from __future__ import annotations

import pytest
import torch
from sequences_support import KINDS, Problem, check, given, leaves_of, listed, make, with_gradients
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn.graph import autograd

DTYPES = [torch.float32, torch.float64]
LENGTHS = {
    "mixed": [3, 6, 0, 1, 5],
    "one": [0, 0, 0, 6, 0],
    "short": [2, 2, 2, 2, 2],
    "full": [6, 6, 6, 6, 6],
    "none": [0, 0, 0, 0, 0],
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_case = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def run(problem: Problem, lengths: list[int], **options: object) -> list[Tensor]:
    x, hx, leaves = leaves_of(problem, problem.ours)
    out, states = problem.ours(x, given(hx), lengths=torch.tensor(lengths), **options)
    return with_gradients([out, *listed(states)], leaves)


@every_case
@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_are_a_loop(kind: str, lengths: list[int], dtype: torch.dtype, backend: str) -> None:
    """Two layers, two directions: outputs, last states and all gradients."""
    problem = make(kind, dtype)
    check(problem, lengths, None, run(problem, lengths), cells=False)


@every_case
@every_kind
@pytest.mark.parametrize(("batch_first", "bidirectional"), [(False, True), (True, False)])
def test_lengths_are_pack_run_pad(kind: str, lengths: list[int], batch_first: bool, bidirectional: bool, backend: str) -> None:
    problem = make(kind, batch_first=batch_first, bidirectional=bidirectional)
    if batch_first:
        problem.x = problem.x.transpose(0, 1).contiguous()
    actual = run(problem, lengths)
    x, hx, leaves = leaves_of(problem, problem.theirs)
    n = 0 if batch_first else 1
    active = torch.tensor([index for index, length in enumerate(lengths) if length], dtype=torch.int64)
    out = x.new_zeros(*x.shape[:2], (1 + bidirectional) * hx[0].shape[2])
    ends = [state.clone() for state in hx]
    if len(active):
        some = torch.tensor(lengths)[active]
        packed = pack_padded_sequence(x.index_select(n, active), some, batch_first, enforce_sorted=False)
        values, states = problem.theirs(packed, given([state[:, active] for state in hx]))
        padded, _ = pad_packed_sequence(values, batch_first, total_length=6)
        out = out.index_copy(n, active, padded)
        ends = [end.index_copy(1, active, state) for end, state in zip(ends, listed(states), strict=True)]
    expected = with_gradients([out, *ends], leaves)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@every_kind
def test_what_the_padding_holds_does_not_matter(kind: str, backend: str) -> None:
    """Not a number there: nothing reads it, and its gradient is exactly zero."""
    problem, lengths = make(kind), LENGTHS["mixed"]
    clean = run(problem, lengths)
    beyond = torch.arange(6)[:, None] >= torch.tensor(lengths)
    problem.x[beyond] = float("nan")
    for a, b in zip(run(problem, lengths), clean, strict=True):
        assert torch.equal(a, b)
    assert not clean[0][beyond].any()
    d_x = clean[1 + len(problem.hx)]
    assert not d_x[beyond].any()
    assert d_x[~beyond].all()


@every_kind
def test_full_lengths_are_no_lengths(kind: str, backend: str) -> None:
    problem = make(kind, torch.float32)
    with torch.no_grad():
        out, states = problem.ours(problem.x, given(problem.hx), lengths=torch.full((5,), 6))
        expected, ends = problem.ours(problem.x, given(problem.hx))
    assert all(torch.equal(a, b) for a, b in zip((out, *listed(states)), (expected, *listed(ends)), strict=True))


def test_no_work_for_finished_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer gets as many rows as there are steps in all, and no more steps than the longest sequence has."""
    seen = []

    def layer(backend: object, cell: object, input: Tensor, steps: fused_rnn.data.steps.Steps, *rest: object) -> object:
        seen.append((input.shape[0], steps.length, steps.batch))
        return whole(backend, cell, input, steps, *rest)

    whole = autograd.eager_layer
    monkeypatch.setattr(autograd, "eager_layer", layer)
    problem = make("LSTM")
    problem.ours(problem.x, lengths=torch.tensor([1, 0, 4, 2, 0]))
    assert seen == [(7, 4, 5)] * 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_integers_and_strides(dtype: torch.dtype) -> None:
    problem, lengths = make("GRU"), torch.tensor(LENGTHS["mixed"])
    expected = problem.ours(problem.x, lengths=lengths)[0]
    strided = torch.stack([lengths, lengths], 1).to(dtype)[:, 1]
    x = problem.x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(problem.ours(x, lengths=strided)[0], expected)


@every_kind
def test_unbatched(kind: str, backend: str) -> None:
    problem = make(kind)
    x, hx = problem.x[:, 0], [state[:, 0] for state in problem.hx]
    for length in (0, 1, 4, 6):
        out, states = problem.ours(x, given(hx), lengths=torch.tensor(length))
        wanted, ends = problem.ours(
            problem.x[:, :1], given([s[:, :1].contiguous() for s in problem.hx]), lengths=torch.tensor([length])
        )
        assert torch.equal(out, wanted[:, 0])
        for state, end in zip(listed(states), listed(ends), strict=True):
            assert torch.equal(state, end[:, 0])
        assert not out[length:].any()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Against float64 from the same rounded numbers, as near as one rounding per stored value allows."""
    problem, lengths = make(kind, dtype, num_layers=1), LENGTHS["mixed"]
    exact = Problem(problem.theirs.double(), problem.ours, problem.x.double(), tuple(state.double() for state in problem.hx))
    actual = run(problem, lengths)
    exact.ours = problem.ours.double()
    for a, b in zip(actual, run(exact, lengths), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max().clamp(min=1)


def test_dropout_between_layers(backend: str) -> None:
    """The same rows in the same order as a packed sequence: the same seed drops the same."""
    problem, lengths = make("LSTM", dropout=0.5, bidirectional=False), torch.tensor([4, 6, 1, 2, 5])
    torch.manual_seed(1)
    out, _ = problem.ours(problem.x, lengths=lengths)
    torch.manual_seed(1)
    packed, _ = problem.ours(pack_padded_sequence(problem.x, lengths, enforce_sorted=False))
    torch.testing.assert_close(out, pad_packed_sequence(packed)[0])
    problem.ours.eval()
    assert not torch.allclose(problem.ours(problem.x, lengths=lengths)[0], out)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_first_and_second_derivatives(kind: str, backend: str) -> None:
    problem = make(kind, num_layers=1, steps=3, batch=3)
    module = getattr(fused_rnn, kind)(3, 2, bidirectional=True, dtype=torch.float64)
    hx = [torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in problem.hx]

    def function(x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        out, states = module(x, given(hx), lengths=torch.tensor([2, 0, 3]))
        return out, *listed(states)

    inputs = (problem.x.requires_grad_(), *hx)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_all_empty_gives_zero_gradients_not_none(backend: str) -> None:
    problem = make("LSTM")
    out, _ = problem.ours(problem.x, lengths=torch.zeros(5, dtype=torch.int64))
    out.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in problem.ours.parameters())


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_inference_and_batch_of_none(kind: str, backend: str) -> None:
    problem, lengths = make(kind), torch.tensor(LENGTHS["mixed"])
    with torch.inference_mode():
        inferred = problem.ours(problem.x, given(problem.hx), lengths=lengths)[0]
    torch.testing.assert_close(inferred, problem.ours(problem.x, given(problem.hx), lengths=lengths)[0].detach())
    out, _ = problem.ours(problem.x[:, :0], lengths=lengths[:0])
    assert out.shape == (6, 0, 34)


def test_results_may_be_changed_in_place(backend: str) -> None:
    problem = make("LSTM")
    out, (h, _) = problem.ours(problem.x, lengths=torch.tensor(LENGTHS["mixed"]))
    out.mul_(2)
    h.zero_()
    out.sum().backward()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_another_default_device(bidirectional: bool) -> None:
    """Lengths and resets of a batch on the CPU, whatever torch.set_default_device says."""
    problem, reset = make("LSTM", bidirectional=bidirectional), torch.rand(6, 5) < 0.3
    lengths, whole = torch.tensor(LENGTHS["mixed"]), torch.full((5,), 6)
    lengths_of_all = torch.tensor([6, 5, 3, 2, 1])
    packed, packed_reset = (pack_padded_sequence(tensor, lengths_of_all) for tensor in (problem.x, reset))
    calls = [(problem.x, lengths, reset), (problem.x, whole, reset), (packed, None, packed_reset)]
    expected = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            for input, some, where in calls:
                out, (h, _) = problem.ours(input, given(problem.hx), lengths=some, reset=where)
                grads = torch.autograd.grad(h.sum(), list(problem.ours.parameters()))
                expected.append([out if isinstance(out, Tensor) else out.data, *grads])
    for before, after in zip(expected[:3], expected[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_meta() -> None:
    module = fused_rnn.LSTM(3, 17, batch_first=True, device="meta")
    x = torch.empty(5, 6, 3, device="meta")
    for device in ("meta", "cpu"):
        out, (h, _) = module(x, lengths=torch.zeros(5, dtype=torch.int64, device=device))
        assert out.shape == (5, 6, 17)
        assert h.shape == (1, 5, 17)
        assert out.is_meta


WRONG = {
    "a list": ([1, 2, 3, 4, 5], TypeError, "lengths: expected an integer tensor, got list"),
    "floats": (torch.ones(5), TypeError, r"lengths: expected an integer tensor, got one of torch\.float32"),
    "booleans": (torch.ones(5, dtype=torch.bool), TypeError, r"lengths: expected an integer tensor, got one of torch\.bool"),
    "too few": (
        torch.ones(4, dtype=torch.int64),
        ValueError,
        r"lengths: expected shape \(5,\), one length for each sequence, got \(4,\)",
    ),
    "a column": (torch.ones(5, 1, dtype=torch.int64), ValueError, r"got \(5, 1\)"),
    "a number": (torch.tensor(3), ValueError, r"got \(\)"),
    "too long": (
        torch.tensor([1, 2, 7, 3, 6]),
        ValueError,
        "lengths: expected values from 0 to 6, the steps of the input, got 7",
    ),
    "negative": (torch.tensor([1, 2, -1, 3, 6]), ValueError, "expected values from 0 to 6, the steps of the input, got -1"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_wrong_lengths_raise(kind: str, case: str, batch_first: bool) -> None:
    lengths, error, message = WRONG[case]
    problem = make(kind, batch_first=batch_first)
    with pytest.raises(error, match=message):
        problem.ours(problem.x.transpose(0, 1) if batch_first else problem.x, lengths=lengths)


def test_lengths_of_other_inputs_raise() -> None:
    problem = make("GRU")
    with pytest.raises(ValueError, match=r"lengths: expected shape \(\), as the input is unbatched, got \(1,\)"):
        problem.ours(problem.x[:, 0], lengths=torch.tensor([3]))
    packed = pack_padded_sequence(problem.x, torch.tensor([6, 5, 4, 3, 2]))
    with pytest.raises(ValueError, match="lengths: expected None for a packed input"):
        problem.ours(packed, lengths=torch.tensor([6, 5, 4, 3, 2]))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        problem.ours(problem.x[:0], lengths=torch.zeros(5, dtype=torch.int64))


def test_lengths_without_values_raise() -> None:
    with pytest.raises(ValueError, match="lengths: expected a tensor with values"):
        fused_rnn.GRU(3, 4)(torch.randn(5, 2, 3), lengths=torch.empty(2, dtype=torch.int64, device="meta"))


def test_mapped_lengths_raise() -> None:
    rnn, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match="lengths: expected the same for all members"):
        torch.func.vmap(lambda lengths: rnn(x, lengths=lengths)[0])(torch.tensor([[5, 2], [1, 3]]))
