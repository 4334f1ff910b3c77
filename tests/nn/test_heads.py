"""``num_heads``: against torch.nn's modules with the same recurrent weights as blocks on a diagonal; and the option itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sequences_support import explicit
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 3, "bidirectional": True},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True, "bidirectional": True},
}
H, HEADS = 12, 3


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """A module with heads, and torch.nn's of the same sizes."""
    ours = getattr(fused_rnn, name)(5, H, **options, num_heads=HEADS, dtype=torch.float64)
    return ours, getattr(torch.nn, name)(5, H, **options, dtype=torch.float64)


def of_torch(module: Any) -> dict[str, Tensor]:
    """Torch's parameters from those with heads, as functions of them: gates first, and zeros beside the blocks."""
    found, units = {}, H // HEADS
    for name, value in module.named_parameters():
        gates = value.shape[0] // H
        blocks = value.reshape(HEADS, gates, units, *value.shape[1:])
        if name.startswith("weight_hh"):
            zero = torch.zeros_like(blocks[0])
            rows = [torch.cat([blocks[j] if i == j else zero for i in range(HEADS)], -1) for j in range(HEADS)]
            blocks = torch.stack(rows)
        found[name] = blocks.transpose(0, 1).flatten(0, 2)
    return found


def results(module: Any, parameters: dict[str, Tensor], leaves: list[Tensor], *args: Any, **keywords: Any) -> list[Tensor]:
    """Outputs, last states, and gradients of all leaves."""
    out, states = torch.func.functional_call(module, parameters, args, keywords)
    out = pad_packed_sequence(out)[0] if isinstance(out, tuple) else out
    states = states if isinstance(states, tuple) else (states,)
    loss = out.sin().sum() + sum(state.cos().sum() for state in states)
    return [out, *states, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", GATES)
def test_layers(name: str, options: dict[str, Any], backend: str) -> None:
    ours, theirs = pair(name, **options)
    x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *ours.parameters()]
    expected = results(theirs, of_torch(ours), leaves, x)
    torch.testing.assert_close(results(ours, dict(ours.named_parameters()), leaves, x), expected)


@pytest.mark.parametrize("name", GATES)
def test_packed_states_and_unbatched(name: str, backend: str) -> None:
    ours, theirs = pair(name, num_layers=2, bidirectional=True)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(4, 4, H, dtype=torch.float64, requires_grad=True) for _ in range(2 if name == "LSTM" else 1)]
    leaves, lengths = [x, *states, *ours.parameters()], torch.tensor([3, 6, 1, 5])

    def inputs() -> tuple[Any, Any]:
        return pack_padded_sequence(x, lengths, enforce_sorted=False), tuple(states) if len(states) > 1 else states[0]

    expected = results(theirs, of_torch(ours), leaves, *inputs())
    torch.testing.assert_close(results(ours, dict(ours.named_parameters()), leaves, *inputs()), expected)
    hx = inputs()[1]
    torch.testing.assert_close(results(ours, dict(ours.named_parameters()), leaves, x, hx, lengths=lengths), expected)
    one = tuple(state[:, 1] for state in states) if len(states) > 1 else states[0][:, 1]
    alone = torch.func.functional_call(theirs, of_torch(ours), (x[:, 1], one))
    torch.testing.assert_close(ours(x[:, 1], one), alone)


def test_resets_and_cell_states(backend: str) -> None:
    ours, theirs = pair("LSTM", num_layers=2, bidirectional=True)
    for name, value in of_torch(ours).items():
        getattr(theirs, name).data = value.detach()
    x, reset = torch.randn(6, 3, 5, dtype=torch.float64), torch.rand(6, 3) < 0.4
    hx = [torch.zeros(4, 3, H, dtype=torch.float64) for _ in range(2)]
    expected = explicit(theirs, x, hx, [6, 4, 2], reset)
    out, states, cells = ours(x, lengths=torch.tensor([6, 4, 2]), reset=reset, return_cell_states=True)
    torch.testing.assert_close([out, *states, cells], expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {"coupled": True}), ("GRU", {"reset_after": False}), ("RNN", {"nonlinearity": "relu"})],
    ids=str,
)
def test_heads_are_modules_of_their_own(name: str, options: dict[str, Any], backend: str) -> None:
    """Other cells: each head is a module of so many units, with the head's rows."""
    ours = getattr(fused_rnn, name)(5, H, num_heads=HEADS, dtype=torch.float64, **options)
    x, outs = torch.randn(6, 2, 5, dtype=torch.float64), []
    for head in range(HEADS):
        one = getattr(fused_rnn, name)(5, H // HEADS, dtype=torch.float64, **options)
        one.load_state_dict({key: value.chunk(HEADS)[head] for key, value in ours.state_dict().items()})
        outs.append(one(x)[0])
    torch.testing.assert_close(ours(x)[0], torch.cat(outs, -1))


def test_recurrent_and_the_other_options(backend: str) -> None:
    """A cell of its own, connections around the layers, and a mask over the blocks."""
    torch.manual_seed(1)
    module = fused_rnn.Recurrent(
        fused_rnn.cells.mgu, H, H, 2, dtype=torch.float64, num_heads=HEADS, connections="residual", weight_dropout=0.5
    )
    x = torch.randn(6, 2, H, dtype=torch.float64)
    module.eval()
    inner = x
    for layer in range(2):
        outs = []
        for head in range(HEADS):
            one = fused_rnn.Recurrent(fused_rnn.cells.mgu, H, H // HEADS, dtype=torch.float64)
            names = [key for key in module.state_dict() if f"_l{layer}" in key]
            one.load_state_dict(
                {key.replace(f"_l{layer}", "_l0"): module.state_dict()[key].chunk(HEADS)[head] for key in names}
            )
            outs.append(one(inner)[0])
        inner = inner + torch.cat(outs, -1)
    torch.testing.assert_close(module(x)[0], inner)
    module.train()
    assert not torch.allclose(module(x)[0], inner)


def test_second_derivatives_transforms_and_compiling() -> None:
    module = fused_rnn.GRU(2, 4, dtype=torch.float64, num_heads=2, bidirectional=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)
    many = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(lambda x: module(x)[0])(many), torch.stack([module(each)[0] for each in many]))
    torch._dynamo.reset()
    reset = torch.tensor([[False, True], [True, False], [False, False]])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x, reset=reset)
    expected = module(x, reset=reset)
    torch.testing.assert_close(compiled, expected)
    grads = [torch.autograd.grad(result[0].sin().sum(), list(module.parameters())) for result in (compiled, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("lengths", [None, torch.zeros(0, dtype=torch.long)], ids=["all", "lengths"])
@pytest.mark.parametrize("name", GATES)
def test_a_batch_of_no_sequence(name: str, lengths: Tensor | None, backend: str) -> None:
    for given in (False, True):
        ours = getattr(fused_rnn, name)(5, H, 2, bidirectional=True, num_heads=HEADS)
        x, state = torch.randn(4, 0, 5, requires_grad=True), torch.randn(4, 0, H, requires_grad=True)
        hx = (state, state) if name == "LSTM" else state
        out, states = ours(x, hx if given else None, lengths=lengths)
        assert out.shape == (4, 0, 2 * H)
        assert all(each.shape == state.shape for each in (states if isinstance(states, tuple) else (states,)))
        out.sum().backward()
        assert x.grad is not None
        assert all(parameter.grad.count_nonzero() == 0 for parameter in ours.parameters())
        with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(4, 0, 12\), got \[4, 0, 9\]"):
            ours(x, (state[..., 3:],) * 2 if name == "LSTM" else state[..., 3:])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", GATES)
def test_states_of_wrong_shapes(name: str, batched: bool, backend: str) -> None:
    """The messages are torch's, with the shapes that a caller knows of, and not those of the heads."""
    ours, theirs = pair(name, num_layers=2)
    ours, theirs = ours.float(), theirs.float()
    x = torch.randn(4, 3, 5) if batched else torch.randn(4, 5)
    for shape in ((2, 3, H), (2, 2, H), (3, 3, H), (2, 3, H - 1), (2, H), (1, H), (2, H - 2), (H,), (), (1, 2, 3, H)):
        state = torch.randn(shape)
        hx = (state, state) if name == "LSTM" else state
        outcomes = []
        for module in (theirs, ours):
            try:
                outcomes.append(tuple(module(x, hx)[0].shape))
            except RuntimeError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


def test_states_of_wrong_shapes_of_a_packed_input() -> None:
    module = fused_rnn.LSTM(5, H, 2, num_heads=HEADS)
    packed = pack_padded_sequence(torch.randn(4, 3, 5), torch.tensor([2, 4, 1]), enforce_sorted=False)
    for shape in ((2, 2, H), (1, 3, H), (2, 3, H + HEADS), (2, H)):
        with pytest.raises(RuntimeError, match=rf"Expected hidden\[0\] size \(2, 3, {H}\), got \{list(shape)}"):
            module(packed, (torch.randn(shape), torch.randn(2, 3, H)))


def test_what_a_module_keeps() -> None:
    module = fused_rnn.LSTM(3, 6, num_heads=2, recurrent_init="orthogonal", forget_bias=2.0)
    x = torch.randn(4, 2, 3)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        torch.testing.assert_close(other(x), module(x))
        assert other.num_heads == 2
    assert repr(module) == "LSTM(3, 6, num_heads=2, forget_bias=2.0, recurrent_init='orthogonal')"
    assert {name: tuple(value.shape) for name, value in module.named_parameters()} == {
        "weight_ih_l0": (24, 3),
        "weight_hh_l0": (24, 3),
        "bias_ih_l0": (24,),
        "bias_hh_l0": (24,),
    }
    # Of each head and gate.
    for block in module.weight_hh_l0.chunk(8):
        torch.testing.assert_close(block @ block.t(), torch.eye(3))
    both = (module.bias_ih_l0 + module.bias_hh_l0).view(2, 4, 3)
    assert (both[:, 1] == 2).all()
    assert not (both[:, (0, 2, 3)] == 2).any()
    with pytest.raises(AttributeError):
        module.num_heads = 3  # type: ignore[misc]
    assert "num_heads" not in repr(fused_rnn.LSTM(3, 6, num_heads=1))


def test_what_is_refused() -> None:
    for value in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match="num_heads: expected an int, got"):
            fused_rnn.GRU(3, 6, num_heads=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads: expected 1 or more, got 0"):
        fused_rnn.GRU(3, 6, num_heads=0)
    for make in (fused_rnn.RNN, lambda *sizes, **options: fused_rnn.Recurrent(fused_rnn.cells.gru, *sizes, **options)):
        with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size=6, got 4"):
            make(3, 6, num_heads=4)
    with pytest.raises(ValueError, match="num_heads: expected 1 with proj_size, as a projection mixes the units of all heads"):
        fused_rnn.LSTM(3, 6, proj_size=2, num_heads=2)
    module = fused_rnn.LSTM(3, 6, num_heads=2)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 6\), got \[1, 2, 5\]"):
        module(torch.randn(4, 2, 3), (torch.randn(1, 2, 6), torch.randn(1, 2, 5)))
    with pytest.raises(RuntimeError):
        module(torch.randn(4, 2, 3), (torch.randn(1, 3, 6), torch.randn(1, 3, 6)))
    wrong = fused_rnn.LSTM(3, 6, num_heads=3)
    wrong.weight_hh_l0 = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="weight_hh with num_heads=3: expected as many rows for each head, got 2 rows"):
        wrong(torch.randn(4, 2, 3))
    report: list[fused_rnn.Conversion] = []
    ours = torch.nn.ModuleList([module])
    fused_rnn.revert(ours, report)
    fused_rnn.quantize_dynamic(ours, report=report)
    assert [each.reason for each in report] == [
        "torch.nn has no num_heads",
        "no int8 module has several heads (num_heads=2)",
    ]
