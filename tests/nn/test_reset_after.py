"""``reset_after=False``: the GRU of Cho et al. 2014, against a loop written from the paper; and the option itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sequences_support import Problem, check, given, leaves_of, listed, make, reset_before, with_gradients
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import Weights, functional
from fused_rnn.graph import loops

LENGTHS = [3, 6, 0, 1, 5]
SIZES = [(1, 4, False), (1, 1, True), (40, 1, False), (9, 60, False), (100, 3, True)]


def problem_of(dtype: torch.dtype = torch.float64, steps: int = 6, batch: int = 5, **options: Any) -> Problem:
    """Ours with ``reset_after=False``; torch's holds the same numbers, and the loop reads them from there."""
    found = make("GRU", dtype, steps, batch, **options)
    ours = fused_rnn.GRU(3, 17, **{"num_layers": 2, "bidirectional": True, **options}, dtype=dtype, reset_after=False)
    ours.load_state_dict(found.theirs.state_dict())
    found.theirs.reset_after = False
    found.ours = ours
    return found


def run(problem: Problem, **options: Any) -> list[Tensor]:
    x, hx, leaves = leaves_of(problem, problem.ours)
    out, states = problem.ours(x, given(hx), **options)
    return with_gradients([out, *listed(states)], leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_are_a_loop(dtype: torch.dtype, bidirectional: bool, backend: str) -> None:
    """Two layers: outputs, last states and all gradients."""
    problem = problem_of(dtype, bidirectional=bidirectional)
    check(problem, None, None, run(problem), cells=False)


def test_lengths_and_resets(backend: str) -> None:
    problem = problem_of()
    reset = torch.rand(6, 5) < 0.4
    check(problem, LENGTHS, reset, run(problem, lengths=torch.tensor(LENGTHS), reset=reset), cells=False)


def test_packed(backend: str) -> None:
    problem = problem_of()
    lengths = torch.tensor([6, 5, 5, 2, 1])
    expected = run(problem, lengths=lengths)
    x, hx, leaves = leaves_of(problem, problem.ours)
    out, states = problem.ours(pack_padded_sequence(x, lengths), given(hx))
    actual = with_gradients([pad_packed_sequence(out)[0], states], leaves)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("steps", "batch", "bidirectional"), SIZES)
def test_one_step_one_sequence_and_many(steps: int, batch: int, bidirectional: bool, backend: str) -> None:
    problem = problem_of(steps=steps, batch=batch, num_layers=1, bidirectional=bidirectional)
    check(problem, None, None, run(problem), cells=False)


@pytest.mark.parametrize("hidden", [1, 8, 16, 70, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_in_a_loop(hidden: int, bias: bool, backend: str) -> None:
    """Steps of a cell, whose weights' gradients the C++ backend sums up over the loop; a layer of one step in a loop too."""
    cell = fused_rnn.GRUCell(3, hidden, bias=bias, dtype=torch.float64, reset_after=False)
    layer = fused_rnn.GRU(3, hidden, bias=bias, dtype=torch.float64, reset_after=False)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    steps = torch.randn(5, 4, 3, dtype=torch.float64)
    parameters = list(cell.parameters())
    h = state = torch.zeros(4, hidden, dtype=torch.float64)
    of_layer = h[None]
    for x in steps:
        h = reset_before(x, h, *(parameters if bias else [*parameters, None, None]))
        state = cell(x, state)
        _, of_layer = layer(x[None], of_layer)
    expected = [h, *torch.autograd.grad(h.sin().sum(), parameters)]
    torch.testing.assert_close([state, *torch.autograd.grad(state.sin().sum(), parameters)], expected)
    by_layer = torch.autograd.grad(of_layer[0].sin().sum(), list(layer.parameters()))
    torch.testing.assert_close([of_layer[0], *by_layer], expected)


def test_loops_do_not_take_one_cell_for_the_other() -> None:
    """Two functions of the same weights, in turns."""
    weights = Weights(
        *(torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((12, 3), (12, 4), (12,), (12,)))
    )
    steps = torch.randn(4, 2, 3, dtype=torch.float64)
    elsewhere, grads = set(loops._loops), []
    for name in ("cpp", "reference") if fused_rnn.backends()["cpp"].available else ("reference",):
        with fused_rnn.backend(name):
            h = torch.zeros(2, 4, dtype=torch.float64)
            for t, x in enumerate(steps):
                h = functional.gru_cell(x, weights, h, reset_after=t % 2 == 0)
            grads.append(torch.autograd.grad(h.sum(), list(weights[:4])))
    torch.testing.assert_close(grads[0], grads[-1])
    assert loops._loops.keys() <= elsewhere


def test_threads_give_the_same_bits(backend: str) -> None:
    module = fused_rnn.GRU(20, 130, reset_after=False)
    x = torch.randn(7, 9, 20)
    given_threads, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            out, h = module(x)
            found.append((out, *torch.autograd.grad(out.square().sum() + h.sum(), list(module.parameters()))))
    finally:
        torch.set_num_threads(given_threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-4)


def test_second_derivatives(backend: str) -> None:
    module = fused_rnn.GRU(2, 3, dtype=torch.float64, reset_after=False)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)
    cell = fused_rnn.GRUCell(2, 3, dtype=torch.float64, reset_after=False)
    assert torch.autograd.gradgradcheck(lambda x, h: cell(x, h), (x[0].detach().requires_grad_(), torch.randn(2, 3).double()))


def test_function_transforms() -> None:
    """A mapped batch, gradients of each sample, and a tangent."""
    module = fused_rnn.GRU(3, 5, dtype=torch.float64, reset_after=False)
    parameters = dict(module.named_parameters())
    x = torch.randn(4, 6, 2, 3, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, x)[0].sin().sum()

    torch.testing.assert_close(torch.func.vmap(lambda x: module(x)[0])(x), torch.stack([module(each)[0] for each in x]))
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, each in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, each), list(parameters.values()))
        torch.testing.assert_close([grad[i] for grad in per_sample.values()], list(expected))
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x[0],), (torch.ones_like(x[0]),))
    point = x[0].clone().requires_grad_()
    torch.testing.assert_close(tangent, torch.autograd.grad(loss(parameters, point), point)[0].sum())


def test_compiled_in_one_graph() -> None:
    module = fused_rnn.GRU(3, 5, num_layers=2, bidirectional=True, reset_after=False)
    x = torch.randn(6, 2, 3)
    torch._dynamo.reset()
    out, h = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    expected = module(x)
    torch.testing.assert_close((out, h), expected)
    grads = [torch.autograd.grad(result[0].sin().sum(), list(module.parameters())) for result in ((out, h), expected)]
    torch.testing.assert_close(*grads)
    cell = fused_rnn.GRUCell(3, 5, reset_after=False)
    torch.testing.assert_close(torch.compile(cell, fullgraph=True, backend="aot_eager")(x[0]), cell(x[0]))


def test_autocast() -> None:
    """The dtypes that torch.nn.GRU has there."""
    module, theirs = fused_rnn.GRU(3, 5, reset_after=False), torch.nn.GRU(3, 5)
    x = torch.randn(6, 2, 3)
    exact = module(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, h = module(x)
        expected, end = theirs(x)
    assert (out.dtype, h.dtype) == (expected.dtype, end.dtype)
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


def test_it_is_another_function_of_the_same_parameters() -> None:
    after, before = fused_rnn.GRU(3, 5), fused_rnn.GRU(3, 5, reset_after=False)
    before.load_state_dict(after.state_dict())
    x = torch.randn(6, 2, 3)
    assert not torch.allclose(after(x)[0], before(x)[0])
    weights = [Weights(*after.parameters())]
    torch.testing.assert_close(functional.gru(x, weights, reset_after=False), before(x))
    torch.testing.assert_close(functional.gru(x, weights), after(x))
    cell = fused_rnn.GRUCell(3, 5, reset_after=False)
    torch.testing.assert_close(functional.gru_cell(x[0], Weights(*cell.parameters()), reset_after=False), cell(x[0]))


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_what_a_module_keeps(name: str) -> None:
    """A pickle, a copy and the text of a module; torch's arguments beside it, by position too."""
    module = getattr(fused_rnn, name)(3, 5, reset_after=False)
    x = torch.randn(2, 3)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        torch.testing.assert_close(other(x), module(x))
        assert not other.reset_after
    assert repr(module) == f"{name}(3, 5, reset_after=False)"
    assert repr(getattr(fused_rnn, name)(3, 5, reset_after=True)) == repr(getattr(torch.nn, name)(3, 5))
    assert "reset_after" not in vars(getattr(fused_rnn, name)(3, 5))


@pytest.mark.parametrize("value", [0, 1, None, "no", torch.tensor(True)], ids=str)
def test_other_types_are_refused(value: Any) -> None:
    message = f"reset_after: expected a bool, got {type(value).__name__}"
    weights = Weights(torch.zeros(6, 3), torch.zeros(6, 2))
    for call in (
        lambda: fused_rnn.GRU(3, 2, reset_after=value),
        lambda: fused_rnn.GRUCell(3, 2, reset_after=value),
        lambda: functional.gru(torch.zeros(1, 1, 3), [weights], reset_after=value),
        lambda: functional.gru_cell(torch.zeros(1, 3), weights, reset_after=value),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_conversions() -> None:
    """What torch.nn makes has its reset after the product; what has it before is left alone by ``revert``."""
    model = torch.nn.ModuleList([torch.nn.GRU(3, 2), torch.nn.GRUCell(3, 2)])
    for module in fused_rnn.convert(model):
        assert module.reset_after
    ours = torch.nn.ModuleList([fused_rnn.GRU(3, 2, reset_after=False), fused_rnn.GRUCell(3, 2, reset_after=False)])
    report: list[fused_rnn.Conversion] = []
    fused_rnn.revert(ours, report)
    assert [type(module) for module in ours] == [fused_rnn.GRU, fused_rnn.GRUCell]
    assert [each.reason for each in report] == ["torch.nn has no GRU with reset_after=False"] * 2
