"""The int8 modules: what they compute, how near the float ones it is, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from int8_support import states_of
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from fused_rnn.nn import quantized, quantized_cells
from fused_rnn.nn.quantized import Quantized

pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
torch_quantize: Any = torch.ao.quantization.quantize_dynamic


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
def test_layers_are_near_the_float_ones(name: str, fused: bool) -> None:
    """A stack in both directions, biased or not, in any of the layouts; and exactly its own dequantized weights."""
    for options in ({}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}, {"dropout": 0.0}):
        rnn = getattr(fused_rnn if fused else nn, name)(6, 19, **options)
        made = fused_rnn.quantize_dynamic(copy.deepcopy(rnn))
        assert type(made) is getattr(quantized, f"Quantized{name}")
        x = torch.randn(5, 4, 6)
        with torch.no_grad():
            out, states = made(x)
            expected, expected_states = rnn(x)
            assert out.shape == expected.shape
            torch.testing.assert_close(out, expected, rtol=0, atol=0.03)
            for one, other in zip(states_of(states), states_of(expected_states), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0.05)
            for suffix, _ in made._suffixes():
                for which in ("ih", "hh"):
                    weight = getattr(rnn, f"weight_{which}{suffix}")
                    error = (getattr(made.dequantize(), f"weight_{which}{suffix}") - weight).abs()
                    assert bool((error <= weight.abs().amax(1, keepdim=True) / 253).all())


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("sizes", [(1, 60, 64, 128), (16, 40, 32, 48), (3, 20, 200, 100)])
def test_error_is_within_torchs(name: str, sizes: tuple[int, int, int, int]) -> None:
    """Against float64, the mean and the largest error are no larger than those of torch's dynamically quantized module."""
    batch, length, inputs, hidden = sizes
    for seed in range(3):
        torch.manual_seed(seed)
        rnn = getattr(nn, name)(inputs, hidden)
        x = torch.randn(length, batch, inputs)
        theirs = torch_quantize(nn.Sequential(copy.deepcopy(rnn)))
        ours = fused_rnn.quantize_dynamic(copy.deepcopy(rnn))
        with torch.no_grad():
            reference = copy.deepcopy(rnn).double()(x.double())[0]
            their_error, our_error = (theirs(x)[0] - reference).abs(), (ours(x)[0] - reference).abs()
        assert our_error.mean() <= their_error.mean()
        assert our_error.max() <= their_error.max()


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str) -> None:
    """The same bits as one step of a layer with the same weights; near the float cell."""
    cell, layer = getattr(nn, name)(6, 19), getattr(nn, name.removesuffix("Cell"))(6, 19)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    made, stack = (fused_rnn.quantize_dynamic(copy.deepcopy(each)) for each in (cell, layer))
    assert type(made) is getattr(quantized_cells, f"Quantized{name}")
    x, count = torch.randn(4, 6), 2 if name == "LSTMCell" else 1
    states = tuple(torch.randn(4, 19) for _ in range(count))
    hx = states if count > 1 else states[0]
    with torch.no_grad():
        found, expected = states_of(made(x, hx)), states_of(cell(x, hx))
        ends = stack(x[None], tuple(s[None] for s in states) if count > 1 else states[0][None])[1]
        for one, other, end in zip(found, expected, states_of(ends), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0.03)
            assert torch.equal(one, end[0])
        single = states_of(made(x[0], tuple(s[0] for s in states) if count > 1 else states[0][0]))
        # Each row has its own scale, so that a row alone has the same bits.
        assert all(torch.equal(one, other[0]) for one, other in zip(single, found, strict=True))
        assert torch.equal(states_of(made(x))[0], states_of(made(x, torch.zeros(4, 19) if count == 1 else None))[0])
    assert repr(made) == f"Quantized{name}(6, 19)"


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_of_all_kinds(name: str, batch_first: bool) -> None:
    """A batch, packed, with lengths, unbatched and step by step: the same bits for the same sequence."""
    rnn = fused_rnn.quantize_dynamic(getattr(nn, name)(6, 19, 2, bidirectional=True, batch_first=batch_first))
    sequences = [torch.randn(length, 6) for length in (3, 7, 1, 5)]
    lengths = torch.tensor([len(each) for each in sequences])
    padded = pad_sequence(sequences, batch_first)
    with torch.no_grad():
        packed_out, packed_ends = rnn(pack_padded_sequence(padded, lengths, batch_first, enforce_sorted=False))
        assert isinstance(packed_out, PackedSequence)
        out, ends = rnn(padded, lengths=lengths)
        assert torch.equal(out, pad_packed_sequence(packed_out, batch_first)[0])
        for one, other in zip(states_of(ends), states_of(packed_ends), strict=True):
            assert torch.equal(one, other)
        for i, each in enumerate(sequences):
            alone, end = rnn(each)
            assert torch.equal(alone, (out[i] if batch_first else out[:, i])[: len(each)])
            for one, other in zip(states_of(end), states_of(ends), strict=True):
                assert torch.equal(one, other[:, i])
        full = torch.full((4,), 7)
        assert torch.equal(rnn(padded, lengths=full)[0], rnn(padded)[0])


def test_states_resets_and_cell_states() -> None:
    rnn = fused_rnn.quantize_dynamic(nn.LSTM(6, 19))
    x = torch.randn(6, 3, 6)
    with torch.no_grad():
        out, (h, c), cells = rnn(x, return_cell_states=True)
        first = rnn(x[:4])
        second = rnn(x[4:], first[1])
        assert torch.equal(torch.cat((first[0], second[0])), out)
        assert torch.equal(second[1][1], c)
        assert torch.equal(cells[-1], c[0])
        reset = torch.zeros(6, 3, dtype=torch.bool)
        reset[4, 1] = True
        found = rnn(x, reset=reset)[0]
        assert torch.equal(found[4:, 1], rnn(x[4:])[0][:, 1])
        assert torch.equal(found[:, 0], out[:, 0])
        assert h.shape == (1, 3, 19)
        assert rnn(torch.randn(5, 0, 6))[0].shape == (5, 0, 19)


def example() -> tuple[Quantized, torch.Tensor, torch.Tensor]:
    rnn = fused_rnn.quantize_dynamic(nn.LSTM(6, 19, 2, bidirectional=True))
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        return rnn, x, rnn(x)[0]  # type: ignore[return-value]


def test_gradients_are_refused_where_they_are_asked_for() -> None:
    rnn, x, expected = example()
    x.requires_grad_()
    out = rnn(x)[0]
    assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match=r"int8 modules have no gradients"):
        out.sum().backward()
    cell = fused_rnn.quantize_dynamic(nn.GRUCell(6, 19))
    with pytest.raises(RuntimeError, match=r"int8 modules have no gradients"):
        cell(x[0]).sum().backward()
    assert not rnn(x.detach())[0].requires_grad


def test_dropout_in_training_alone() -> None:
    rnn = fused_rnn.quantize_dynamic(nn.LSTM(6, 19, 2, dropout=0.5))
    x = torch.randn(5, 3, 6)
    assert torch.equal(rnn(x)[0], rnn(x)[0])
    rnn.train()
    assert not torch.equal(rnn(x)[0], rnn(x)[0])


def test_errors_are_those_of_the_float_modules() -> None:
    rnn, x, _ = example()
    cell = fused_rnn.quantize_dynamic(nn.LSTMCell(6, 19))
    h = torch.zeros(4, 3, 19)
    with pytest.raises(ValueError, match=r"input: expected torch.float32, in which int8 modules compute .* got torch.float64"):
        rnn(x.double())
    with pytest.raises(ValueError, match=r"input: expected torch.float32"):
        cell(x[0].double())
    with pytest.raises(ValueError, match=r"LSTM: Expected input to be 2D or 3D, got 4D instead"):
        rnn(x[None])
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 6, got 5"):
        rnn(x[..., :5])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(4, 3, 19\), got \[4, 3, 18\]"):
        rnn(x, (h[..., :18], h))
    with pytest.raises(RuntimeError, match=r"not the same dtype"):
        rnn(x, (h.double(), h.double()))
    with pytest.raises(RuntimeError, match=r"For batched 3-D input, hx and cx should also be 3-D"):
        rnn(x, (h[0], h[0]))
    with pytest.raises(RuntimeError, match=r"Expected sequence length to be larger than 0"):
        rnn(x[:0])
    with pytest.raises(TypeError, match=r"must be tuple of Tensors"):
        rnn(x, h)
    with pytest.raises(TypeError, match=r"return_cell_states: expected a bool"):
        rnn(x, return_cell_states=1)
    with pytest.raises(RuntimeError, match=r"input has inconsistent input_size: got 5 expected 6"):
        cell(x[0, :, :5])
    with pytest.raises(RuntimeError, match=r"hidden1 has inconsistent hidden_size: got 18, expected 19"):
        cell(x[0], (h[0], h[0, :, :18]))
    with pytest.raises(RuntimeError, match=r"Input batch size 3 doesn't match hidden0 batch size 2"):
        cell(x[0], (h[0, :2], h[0]))
    with pytest.raises(ValueError, match=r"lengths: expected None for a packed input"):
        rnn(pack_padded_sequence(x, torch.tensor([5, 5, 5])), lengths=torch.tensor([5, 5, 5]))
    with fused_rnn.backend("reference"), pytest.raises(RuntimeError, match=r"reference backend.*does not compute with int8"):
        rnn(x)
    with pytest.raises(NotImplementedError, match=r"int8 modules have no torch.func transforms"):
        torch.vmap(lambda each: rnn(each)[0])(torch.randn(2, 5, 3, 6))


def test_autocast_computes_in_float32() -> None:
    rnn, x, expected = example()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(rnn(x.bfloat16().float())[0], rnn(x.bfloat16())[0])
        assert torch.equal(rnn(x)[0], expected)


def test_flops_are_those_of_the_float_module() -> None:
    rnn, x, _ = example()
    counts = []
    for module in (rnn, rnn.dequantize()):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x, lengths=torch.tensor([5, 2, 3]))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_compiled_and_exported() -> None:
    rnn, x, expected = example()
    lengths = torch.tensor([5, 2, 3])
    with torch.no_grad():
        compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x)[0], expected)
        assert torch.equal(compiled(x, lengths=lengths)[0], rnn(x, lengths=lengths)[0])
        exported = torch.export.export(rnn, (x,)).module()
        assert torch.equal(exported(x)[0], expected)
        cell = fused_rnn.quantize_dynamic(nn.LSTMCell(6, 19))
        assert torch.equal(torch.compile(cell, fullgraph=True, backend="aot_eager")(x[0])[1], cell(x[0])[1])
    traced = torch.fx.symbolic_trace(nn.Sequential(rnn))
    assert torch.equal(traced(x)[0], expected)
    with pytest.raises(Exception, match=r"int8 modules have no gradients"):
        torch.compile(rnn, fullgraph=True, backend="aot_eager")(x.requires_grad_())


def test_traced_and_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    rnn, x, expected = example()
    with torch.no_grad():
        traced = torch.jit.trace(rnn, (torch.randn(2, 4, 6),))
        assert torch.equal(traced(x)[0], expected)
    with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot compile the kernels of fused_rnn"):
        torch.jit.script(rnn)
    # As torch.onnx.export has it.
    monkeypatch.setattr("fused_rnn.graph.onnx_export.wanted", lambda: True)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"ONNX has no recurrent operator with int8 weights"):
        torch.export.export(rnn, (x,), strict=False)
