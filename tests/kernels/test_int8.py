"""Int8 weights: the C++ kernels against float64, for every instruction set of this machine, with VNNI and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from int8_support import step
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.data.int8 import packed, quantized, unpacked

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
VNNI = pytest.mark.parametrize("vnni", [True, False], ids=["vnni", "plain"])


def make_call(
    mode: str,
    length: int = 4,
    batch: int = 5,
    inputs: int = 9,
    hidden: int = 21,
    reverse: tuple[bool, ...] = (False,),
    bias: bool = True,
    states: bool = True,
    batch_sizes: Tensor | None = None,
    reset: bool = False,
) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Arguments of ``int8_forward``, and the weights of which it has the packed ones."""
    gates, d = CELLS[mode].num_gates, len(reverse)
    rows = length * batch if batch_sizes is None else int(batch_sizes.sum())
    # Of a relu, h would grow from step to step.
    gain = 1.0 if mode == "rnn_relu" else 2.0
    plain, given = [], []
    for _ in reverse:
        ih, hh = (torch.randn(gates * hidden, k) * gain * k**-0.5 for k in (inputs, hidden))
        biases = (torch.randn(gates * hidden), torch.randn(gates * hidden)) if bias else (None, None)
        plain.append((ih, hh, *biases))
        given.append((*packed(*quantized(ih), gates), *packed(*quantized(hh), gates), *biases))
    call = {
        "cell": mode,
        "input": torch.randn(length, batch, inputs) if batch_sizes is None else torch.randn(rows, inputs),
        "states": tuple(torch.randn(d, batch, hidden) for _ in CELLS[mode].states) if states else None,
        "hidden": hidden,
        "weights": given,
        "length": length,
        "batch": batch,
        "batch_sizes": batch_sizes,
        "reverse": list(reverse),
        "reset": torch.rand(d, rows) < 0.3 if reset else None,
        "cell_states": mode == "lstm",
        "step": False,
        "threads": 2,
    }
    return call, plain


def check(call: dict[str, Any], plain: list[tuple[Any, ...]], vnni: bool = True) -> None:
    """Every step against float64, from the states that the kernels had before it; and the states at the end."""
    out, after, cells = _C.int8_forward(**call, vnni=vnni)
    d, hidden, batch, sizes = len(plain), call["hidden"], call["batch"], call["batch_sizes"]
    counts = [batch] * call["length"] if sizes is None else sizes.tolist()
    rows = call["input"].reshape(-1, call["input"].shape[-1])
    out = out.reshape(len(rows), d, hidden)
    cells = None if cells is None else cells.reshape(len(rows), d, hidden)
    offsets = [sum(counts[:t]) for t in range(len(counts))]
    for i in range(d):
        zeros = torch.zeros(batch, hidden)
        h = zeros.clone() if call["states"] is None else call["states"][0][i].clone()
        c = None
        if cells is not None:
            c = zeros.clone() if call["states"] is None else call["states"][1][i].clone()
        order = range(len(counts))
        for t in reversed(order) if call["reverse"][i] else order:
            n, mine = counts[t], slice(offsets[t], offsets[t] + counts[t])
            if call["reset"] is not None:
                gone = call["reset"][i, mine]
                h[:n][gone] = 0
                if c is not None:
                    c[:n][gone] = 0
            expected = step(call["cell"], plain[i], rows[mine], h[:n], None if c is None else c[:n])
            h[:n] = out[mine, i]
            assert bool(((h[:n] - expected.h).abs() <= expected.bound_h).all()), f"h of step {t}, direction {i}"
            if c is not None and cells is not None:
                c[:n] = cells[mine, i]
                assert bool(((c[:n] - expected.c).abs() <= expected.bound_c).all()), f"c of step {t}, direction {i}"
        assert torch.equal(after[0][i], h)
        if c is not None:
            assert torch.equal(after[1][i], c)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 50, 130])
@pytest.mark.parametrize("batch", [1, 2, 5, 6, 7, 13])
@VNNI
def test_sizes(isa: str, mode: str, hidden: int, batch: int, vnni: bool) -> None:
    """Units at, below and above a block, rows at, below and above the tiles."""
    check(*make_call(mode, batch=batch, hidden=hidden), vnni=vnni)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inputs", [1, 3, 4, 5, 64, 257])
@VNNI
def test_inputs(isa: str, mode: str, inputs: int, vnni: bool) -> None:
    check(*make_call(mode, inputs=inputs), vnni=vnni)


@pytest.mark.parametrize("mode", MODES)
@VNNI
def test_everything_at_once(isa: str, mode: str, vnni: bool) -> None:
    """Two directions, ragged, resets; then dense without biases and initial states, over more steps than wait together."""
    sizes = torch.tensor([7, 7, 5, 2, 1, 0])
    check(*make_call(mode, 6, 7, reverse=(False, True), batch_sizes=sizes, reset=True), vnni=vnni)
    check(*make_call(mode, 40, 3, reverse=(True,), bias=False, states=False), vnni=vnni)
    check(*make_call(mode, 2, 60, reverse=(False, True)), vnni=vnni)


@pytest.mark.parametrize("mode", MODES)
@VNNI
def test_sharing_changes_no_bit(isa: str, mode: str, vnni: bool) -> None:
    call, _ = make_call(mode, 5, 7, 33, 70, reverse=(False, True))
    expected = _C.int8_forward(**(call | {"threads": 1}), vnni=vnni)
    for threads in (2, 3, 5):
        for sharing in ("auto", "batch", "units"):
            found = _C.int8_forward(**(call | {"threads": threads}), sharing=sharing, vnni=vnni)
            assert torch.equal(found[0], expected[0])
            for one, other in zip(found[1], expected[1], strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_vnni_changes_no_bit(isa: str, mode: str) -> None:
    """Whole numbers add up to the same in both forms, at the largest magnitudes too, where 16 bits would not hold a sum."""
    call, _ = make_call(mode, 5, 7, 130, 70)
    assert torch.equal(_C.int8_forward(**call)[0], _C.int8_forward(**call, vnni=False)[0])
    extreme = torch.full((70 * CELLS[mode].num_gates, 130), 1e-3)
    extreme[::2] *= -1
    weights = packed(*quantized(extreme), CELLS[mode].num_gates)
    call["weights"] = [(*weights, *call["weights"][0][3:])]
    for sign in (1, -1):
        call["input"] = torch.full((5, 7, 130), 3.0 * sign)
        assert torch.equal(_C.int8_forward(**call)[0], _C.int8_forward(**call, vnni=False)[0])


@VNNI
def test_largest_sums(isa: str, vnni: bool) -> None:
    """All products of one sign, as large as they get, over as many columns as there may be."""
    inner = 65536
    weight = torch.full((16, inner), 0.25)
    weight[1::2] *= -1
    for sign in (1.0, -1.0):
        out, _, _ = _C.int8_forward(
            "rnn_relu",
            torch.full((1, 1, inner), 2.0 * sign),
            None,
            16,
            [(*packed(*quantized(weight), 1), *packed(*quantized(torch.zeros(16, 16)), 1), None, None)],
            1,
            1,
            None,
            [False],
            None,
            False,
            False,
            1,
            vnni=vnni,
        )
        expected = (weight.double() @ torch.full((inner,), 2.0 * sign).double()).relu()
        torch.testing.assert_close(out[0, 0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", MODES)
@VNNI
def test_what_is_not_finite_shows(isa: str, mode: str, bad: float, vnni: bool) -> None:
    """A row with it has no scale: its sequence is NaN from there on, and no other sequence is."""
    call, _ = make_call(mode, 4, 3)
    call["input"][1, 1, 2] = bad
    out = _C.int8_forward(**call, vnni=vnni)[0]
    wrong = torch.zeros(4, 3, dtype=torch.bool)
    wrong[1:, 1] = True
    assert torch.equal(out.isnan().all(-1), wrong)
    assert bool(out[~wrong].isfinite().all())


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-30, 1e30])
@VNNI
def test_scales_from_nothing_to_huge(isa: str, scale: float, vnni: bool) -> None:
    call, plain = make_call("lstm", 3, 4)
    call["input"] *= scale
    out = _C.int8_forward(**call, vnni=vnni)[0]
    assert bool(out.isfinite().all())
    if scale < 1:
        # The input is as good as zero.
        torch.testing.assert_close(out, _C.int8_forward(**(call | {"input": torch.zeros_like(call["input"])}))[0])
    else:
        check(call, plain, vnni)


@pytest.mark.parametrize("mode", MODES)
@VNNI
def test_step_of_a_cell(isa: str, mode: str, vnni: bool) -> None:
    """The same bits as a layer of one step; the states given are left as they are."""
    call, _ = make_call(mode, 1, 5)
    out, after, _ = _C.int8_forward(**call, vnni=vnni)
    states = tuple(state[0].clone() for state in call["states"])
    one = call | {"input": call["input"][0], "states": states, "step": True, "cell_states": False}
    h, rest, _ = _C.int8_forward(**one, vnni=vnni)
    assert torch.equal(h, out[0])
    assert [state.shape for state in rest] == [(5, 21)] * (len(states) - 1)
    for state, expected in zip(rest, after[1:], strict=True):
        assert torch.equal(state, expected[0])
    for state, before in zip(states, call["states"], strict=True):
        assert torch.equal(state, before[0])
    zero = _C.int8_forward(**(one | {"states": None}), vnni=vnni)[0]
    assert torch.equal(zero, _C.int8_forward(**(call | {"states": None}), vnni=vnni)[0][0])


@pytest.mark.parametrize("hidden", [1, 16, 37])
@pytest.mark.parametrize("inner", [1, 4, 18])
@pytest.mark.parametrize("gates", [1, 3, 4])
def test_packing_has_a_way_back(gates: int, hidden: int, inner: int) -> None:
    weight = torch.randn(gates * hidden, inner)
    whole, scale = quantized(weight)
    made = packed(whole, scale, gates)
    assert torch.equal(unpacked(made, gates, hidden, inner)[0], whole)
    assert torch.equal(unpacked(made, gates, hidden, inner)[1], scale)
    assert int(made.data.abs().sum()) == int(whole.abs().sum(dtype=torch.int64))


def test_rounding_of_weights() -> None:
    """No number is off by more than half its row's scale, and the largest is exact to a rounding; zeros stay zero."""
    weight = torch.cat([torch.randn(5, 40) * torch.tensor([[1e-3], [1.0], [1e3], [1e-42], [1e-30]]), torch.zeros(1, 40)])
    whole, scale = quantized(weight)
    assert whole.dtype == torch.int8
    assert int(whole.min()) >= -127
    found = whole.double() * scale[:, None].double()
    normal = torch.tensor([True, True, True, False, True, True])
    error = (found - weight.double()).abs()[normal]
    assert bool((error <= scale[normal, None].double() * (0.5 + 1e-5)).all())
    assert whole[:3].abs().amax(1).tolist() == [127] * 3
    assert not whole[5].any()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"weight: expected finite numbers, got a NaN or an infinity"):
            quantized(torch.tensor([[1.0, bad]]))


def test_refusals() -> None:
    call, _ = make_call("lstm")

    def refused(match: str, **other: Any) -> None:
        with pytest.raises(ValueError, match=match):
            _C.int8_forward(**(call | other))

    refused(
        "cell: expected one with one stage, got gru_reset_before",
        cell="gru_reset_before",
        cell_states=False,
        weights=[make_call("gru")[0]["weights"][0]],
        states=call["states"][:1],
    )
    refused("weights: expected 1, one for each recurrence, got 2", weights=call["weights"] * 2)
    refused("weights: expected 8 tensors for each recurrence, got 3", weights=[call["weights"][0][:3]])
    refused("weight_ih: expected torch.int8 of shape", input=torch.randn(4, 5, 13))
    refused(
        "weight_ih: expected torch.int8 of shape .* got torch.float32",
        weights=[(call["weights"][0][0].float(), *call["weights"][0][1:])],
    )
    refused("hidden: expected 1 or more, got 0", hidden=0)
    refused("bias_ih: expected", hidden=20)
    refused("input: expected torch.float32", input=call["input"].double())
    refused("input: expected .R, I. or .T, N, I.", input=torch.randn(4))
    refused("states: expected 2, got 1", states=call["states"][:1])
    refused("threads: expected 1 or more", threads=0)
    refused("step: expected one step", step=True, states=None)
    wide, _ = make_call("lstm", inputs=65537, hidden=1, length=1, batch=1)
    with pytest.raises(ValueError, match=r"weight_ih: expected at most 65536 columns, got 65537"):
        _C.int8_forward(**wide)
