"""``fused_rnn.Recurrent``: any cell as torch.nn's layers are; kernels made from equations, against plain torch."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from equations_support import CELLS, OF_TORCH, coupled, gru, lstm, nested
from tolerances import assert_close_to_reference
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import Recurrent, cells
from fused_rnn.cells.definition import Definition
from fused_rnn.kernels import dispatch
from fused_rnn.kernels.numba.derived import source_of

T, N, INPUTS, HIDDEN = 5, 3, 4, 6
every_backend = pytest.mark.parametrize("backend", ["numba", "reference"])


def _product(weight: Tensor, bias: Tensor | None, operand: Tensor) -> Tensor:
    return torch.nn.functional.linear(operand, weight, bias)


class Plain:
    """The same stack as a loop over steps in plain torch, from the body of the cell and a module's parameters."""

    def __init__(self, module: Recurrent) -> None:
        self.module = module

    def layer(
        self, rows: Tensor, states: tuple[Tensor, ...], weights: list[Tensor | None], reverse: bool
    ) -> tuple[Tensor, Any]:
        cell = self.module.cell
        ih, hh, bias_ih, bias_hh = (*weights, None, None)[:4]
        outs: dict[int, Tensor] = {}
        for t in reversed(range(len(rows))) if reverse else range(len(rows)):
            x = torch.nn.functional.linear(rows[t], ih, bias_ih).chunk(cell.row.num_gates, -1)
            shares = type("Shares", (), dict(zip(cell.row.gates, x, strict=True)))
            biases = [None] * cell.row.num_gates if bias_hh is None else bias_hh.chunk(cell.row.num_gates)
            of_gates = zip(cell.row.gates, hh.chunk(cell.row.num_gates), biases, strict=True)
            products = type(
                "Products", (), {gate: staticmethod(partial(_product, weight, bias)) for gate, weight, bias in of_gates}
            )
            after = cell(shares, products, *states)
            states = after if isinstance(after, tuple) else (after,)
            outs[t] = states[0]
        return torch.stack([outs[t] for t in range(len(rows))]), states

    def __call__(self, input: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        directions = 2 if self.module.bidirectional else 1
        rows, ends, number = input, [], 0
        for _ in range(self.module.num_layers):
            outs = []
            for d in range(directions):
                weights = [getattr(self.module, name) for name in self.module._names[number]]
                out, end = self.layer(rows, tuple(state[number] for state in states), weights, d == 1)
                outs.append(out)
                ends.append(end)
                number += 1
            rows = torch.cat(outs, -1)
        return rows, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))


def given(module: Recurrent, states: tuple[Tensor, ...]) -> Any:
    return states[0] if len(module.cell.row.states) == 1 else states


def results(module: Recurrent, run: Any, input: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    """Output, states after it, and all gradients."""
    operands = [input.clone().requires_grad_(), *(state.clone().requires_grad_() for state in states)]
    out, after = run(operands[0], tuple(operands[1:]))
    after = after if isinstance(after, tuple) else (after,)
    loss = out.sin().sum() + sum((each * (i + 2)).cos().sum() for i, each in enumerate(after))
    grads = torch.autograd.grad(loss, (*operands, *module.parameters()))
    return [out.detach(), *(each.detach() for each in after), *grads]


def make(definition: Definition, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Recurrent, Tensor, Any]:
    module = Recurrent(definition, INPUTS, HIDDEN, dtype=dtype, **options)
    many = module.num_layers * (2 if module.bidirectional else 1)
    states = tuple(torch.randn(many, N, HIDDEN, dtype=dtype) for _ in definition.row.states)
    return module, torch.randn(T, N, INPUTS, dtype=dtype), states


# A kernel of each cell takes seconds to compile: float64's are those of a few.
@every_backend
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CELLS] + [(name, torch.float64) for name in ("lstm", "gru", "nested")],
    ids=str,
)
def test_results_and_gradients(name: str, dtype: torch.dtype, backend: str) -> None:
    module, input, states = make(CELLS[name], torch.float64, num_layers=2, bidirectional=True)
    expected = results(module, Plain(module), input, states)
    module = module.to(dtype)
    input, states = input.to(dtype), tuple(state.to(dtype) for state in states)
    in_torch = results(module, Plain(module), input, states)
    with fused_rnn.backend(backend):
        found = results(module, lambda x, s: module(x, given(module, s)), input, states)
    for mine, theirs, right in zip(found, in_torch, expected, strict=True):
        assert_close_to_reference(mine, theirs, right, name)


@pytest.mark.parametrize("name", OF_TORCH)
def test_torchs_cells(name: str) -> None:
    """Parameters, state_dict and results of torch.nn's modules."""
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    module, plain = Recurrent(OF_TORCH[name], INPUTS, HIDDEN, **options), getattr(torch.nn, name)(INPUTS, HIDDEN, **options)
    assert module.state_dict().keys() == plain.state_dict().keys()
    module.load_state_dict(plain.state_dict())
    input = torch.randn(N, T, INPUTS)
    torch.testing.assert_close(module(input), plain(input))


@pytest.mark.parametrize("batch", [1, 2, 17])
@pytest.mark.parametrize("hidden", [1, 15, 33, 64])
def test_sizes(hidden: int, batch: int) -> None:
    module = Recurrent(nested, 3, hidden, dtype=torch.float64)
    input, states = torch.randn(7, batch, 3).double(), tuple(torch.randn(1, batch, hidden).double() for _ in range(2))
    found = results(module, module, input, states)
    torch.testing.assert_close(found, results(module, Plain(module), input, states))


@pytest.mark.parametrize("definition", [gru, coupled], ids=["gru", "coupled"])
def test_lengths_packed_and_resets(definition: Definition) -> None:
    module, input, _ = make(definition, bidirectional=True)
    lengths = torch.tensor([5, 2, 4])
    out, after = module(input, lengths=lengths)
    packed, packed_after = module(pack_padded_sequence(input, lengths, enforce_sorted=False))
    assert isinstance(packed, PackedSequence)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    torch.testing.assert_close(padded, out)
    torch.testing.assert_close(packed_after, after)
    # One direction, cut by hand at the resets.
    module, input, _ = make(definition)
    reset = torch.zeros(T, N, dtype=torch.bool)
    reset[3] = True
    whole, _ = module(input, reset=reset)
    torch.testing.assert_close(whole, torch.cat([module(input[:3])[0], module(input[3:])[0]]))


def test_unbatched_and_no_bias() -> None:
    module, input, _ = make(lstm, bias=False)
    assert [name for name, _ in module.named_parameters()] == ["weight_ih_l0", "weight_hh_l0"]
    out, (h, c) = module(input[:, 0])
    batched, (h_n, c_n) = module(input[:, :1])
    torch.testing.assert_close((out, h, c), (batched[:, 0], h_n[:, 0], c_n[:, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_in_16_bits(dtype: torch.dtype) -> None:
    module, input, _ = make(gru, torch.float32)
    expected = module(input)[0]
    torch.testing.assert_close(module.to(dtype)(input.to(dtype))[0].float(), expected, rtol=0.05, atol=0.05)


def test_compiled() -> None:
    module, input, states = make(nested)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = results(module, lambda x, s: compiled(x, s), input, states)
    torch.testing.assert_close(found, results(module, module, input, states))


def test_second_gradients() -> None:
    module, input, states = make(coupled)
    operands = (input[:2].requires_grad_(), *(state.requires_grad_() for state in states))
    assert torch.autograd.gradgradcheck(lambda x, h, c: module(x, (h, c))[0], operands)


def test_maps_and_per_sample_gradients() -> None:
    module, input, _ = make(gru)
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(parameters: Any, sequence: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, sequence[:, None])[0].sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, input)
    for n in range(N):
        expected = torch.func.grad(loss)(parameters, input[:, n])
        torch.testing.assert_close({name: value[n] for name, value in found.items()}, expected)


def test_copies_and_pickles() -> None:
    module, input, states = make(lstm)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.cell is lstm
        torch.testing.assert_close(other(input, states), module(input, states))
    assert repr(Recurrent(gru, 3, 4, bidirectional=True)) == "Recurrent(gru, 3, 4, bidirectional=True)"


def test_dropout_is_between_layers() -> None:
    module, input, _ = make(gru, num_layers=2, dropout=1.0)
    # All of what the second layer reads is zero.
    out, _ = module(input)
    torch.testing.assert_close(out, module(torch.zeros_like(input) + 5)[0])
    assert not torch.equal(module.eval()(input)[0], out)


def test_the_source_can_be_read() -> None:
    source = source_of(gru.derived)
    assert "v2 = tanh(x_n + (v0 * w_n))\n" in source
    assert compile(source, "gru", "exec")


def test_without_a_folder_that_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are made all the same, for this process alone."""
    from fused_rnn.kernels import written

    @fused_rnn.cell(gates="n")
    def fresh(x: Any, W: Any, h: Any) -> Any:
        return fused_rnn.cells.tanh(x.n + W.n(h)) * 0.625

    monkeypatch.setattr(written, "folder", lambda _: (_ for _ in ()).throw(OSError("no folder")))
    module, input, states = make(fresh)
    torch.testing.assert_close(
        results(module, lambda x, s: module(x, s[0]), input, states), results(module, Plain(module), input, states)
    )


def test_the_choice_of_the_backend() -> None:
    assert dispatch.choose(torch.device("cpu"), gru.row).name == "numba"
    with fused_rnn.backend("reference"):
        assert dispatch.choose(torch.device("cpu"), gru.row).name == "reference"
    module, input, _ = make(gru)
    if fused_rnn.backends()["cpp"].available:
        with fused_rnn.backend("cpp"), pytest.raises(NotImplementedError, match="cpp makes no kernels of the equations of gru"):
            module(input)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((fused_rnn.GRU, 3, 4), {}, TypeError, "cell: expected a cell made by fused_rnn.cell, got type"),
        ((gru, 3.0, 4), {}, TypeError, "input_size: expected an int, got float"),
        ((gru, 3, 0), {}, ValueError, "hidden_size: expected 1 or more, got 0"),
        ((gru, 3, 4, 0), {}, ValueError, "num_layers: expected 1 or more, got 0"),
        ((gru, 3, 4), {"dropout": 1.5}, ValueError, "dropout: expected a probability, 0 to 1, got 1.5"),
    ],
)
def test_wrong_arguments(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recurrent(*arguments, **options)


def test_wrong_inputs() -> None:
    module, input, states = make(lstm)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        module(input[..., :2])
    with pytest.raises(TypeError, match="must be tuple of Tensors, not Tensor"):
        module(input, states[0])
    with pytest.raises(RuntimeError, match="Expected hidden"):
        module(input, (states[0][:, :1], states[1]))


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.gru_reset_before, cells.rnn_tanh, cells.rnn_relu], ids=repr)
def test_cells_of_this_package(cell: Definition) -> None:
    """They run on the kernels of their modules."""
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    module = Recurrent(cell, INPUTS, HIDDEN, **options)
    name = cell.row.name
    if name.startswith("rnn"):
        options["nonlinearity"] = name.removeprefix("rnn_")
    elif name.startswith("gru"):
        options["reset_after"] = name == "gru"
    known = {"rnn": fused_rnn.RNN, "gru": fused_rnn.GRU, "lst": fused_rnn.LSTM}[name[:3]](INPUTS, HIDDEN, **options)
    known.load_state_dict(module.state_dict())
    input = torch.randn(T, N, INPUTS)
    torch.testing.assert_close(module(input), known(input), rtol=0, atol=0)
