"""How the benchmark measures, on tiny shapes. Nothing here depends on how long anything takes."""

import dataclasses
import itertools
import json
import math
import mmap
import sys

import pytest
import torch
from benchmarks_support import ONE_ROUND, OURS, TINY, no_pause, rendered, run, tiny_cases  # noqa: F401, a fixture for every test

from benchmarks import goals, memory, timing
from benchmarks.cases import CELLS, MODES, Case, Shape
from benchmarks.gate import Gate
from benchmarks.peers import onnx_runtime, peers, torch_nn
from benchmarks.peers.base import Provider
from benchmarks.problem import Problem
from benchmarks.sets import select
from benchmarks.suite import Listener


def wrong_at(result_name):
    """A peer whose result of this name is off by a thousandth."""

    def prepare(problem, case, threads):
        provider = torch_nn.PEER.prepare(problem, case, threads)

        def step():
            named = problem.named(provider.step())
            if result_name in named:
                named[result_name] = named[result_name] + 1e-3 * named[result_name].abs().max()
            return tuple(named.values())

        return Provider(step)

    return dataclasses.replace(OURS, prepare=prepare)


# Cases


def test_default_run_has_every_cell_at_every_shape_once():
    cases = select()
    plain = [case for case in cases if case.plain]
    assert len(plain) == 3 * (10 * 2 + 1)
    both = [(case.cell, case.shape.name, case.mode) for case in cases if case.bidirectional]
    assert both == [(cell, "32x100x256", mode) for cell in ("lstm", "gru") for mode in ("training", "inference")]
    assert len(cases) == len(plain) + len(both)
    assert len({case.key for case in cases}) == len(cases)
    # A problem is shared by neighbours only.
    assert [(c.cell, c.shape.name) for c in cases[:2]] == [("lstm", "1x100x128")] * 2


def test_filters_keep_what_they_name():
    assert {(c.cell, c.shape.name, c.mode) for c in select(["gru"], ["1x1x512", "16x64x128"], ["streaming", "training"])} == {
        ("gru", "1x1x512", "streaming"),
        ("gru", "16x64x128", "training"),
    }
    quick = select(quick=True)
    assert {c.mode for c in quick} == set(MODES)
    assert len(quick) < len(select())
    assert select(shapes=["64x100x512"], quick=True), "a shape that is named is measured, quick or not"


def test_flops_are_those_of_the_products():
    T, B, I, H = 3, 2, 4, 5  # noqa: E741
    assert Case("gru", TINY, "inference").flops == 2 * T * B * 3 * H * (I + H)
    assert Case("gru", TINY, "training").flops == 6 * T * B * 3 * H * (I + H)
    # The second layer sees both directions of the first.
    deep = Case("rnn", TINY, "inference", num_layers=2, bidirectional=True)
    assert deep.flops == 2 * (2 * T * B * H * (I + H) + 2 * T * B * H * (2 * H + H))


# Gate


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_gate_lets_torch_pass_and_sees_every_result(cell, mode):
    case = Case(cell, TINY, mode)
    problem = Problem(case)
    gate = Gate(problem, case.training)
    with torch.set_grad_enabled(case.training):
        named = problem.named(torch_nn.PEER.prepare(problem, case, 1).step())
    assert gate.judge(named).passed
    expected = {"out", "h_n"} | ({"c_n"} if cell == "lstm" else set())
    if case.training:
        expected |= {"d_input", "d_h_0", "d_weight_ih_l0", "d_weight_hh_l0", "d_bias_ih_l0", "d_bias_hh_l0"}
        expected |= {"d_c_0"} if cell == "lstm" else set()
    assert set(named) == expected
    for name in named:
        for bad in (named[name] * 1.001 + 1e-4, named[name] * math.nan, named[name][None], None):
            verdict = gate.judge(named | {name: bad})
            assert not verdict.passed
            assert verdict.worst == name


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_onnx_runtime_computes_the_same(cell):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    case = Case(cell, TINY, "inference")
    problem = Problem(case)
    provider = onnx_runtime.PEER.prepare(problem, case, 1)
    verdict = Gate(problem, False).judge(problem.named(provider.tensors(provider.step())))
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("cell", CELLS)
def test_fused_rnn_passes_the_gate(cell):
    case = Case(cell, TINY, "training")
    problem = Problem(case)
    peer = peers()["ours"]
    assert peer.reason(case) is None
    verdict = Gate(problem, True).judge(problem.named(peer.prepare(problem, case, 1).step()))
    assert verdict.passed, str(verdict)


# Suite


def test_rows_hold_a_figure_or_a_reason():
    pytest.importorskip("onnxruntime")
    found = run(tiny_cases())
    assert found["run"]["complete"]
    assert len(found["rows"]) == 3 * 2 * 3
    for row in found["rows"]:
        if row["provider"] == "onnxruntime" and (row["mode"] == "training" or row["cell"] == "rnn"):
            assert row["status"] == "missing"
            assert "ms" not in row
        else:
            assert row["status"] == "ok"
            assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
            assert row["rounds"] == 1
            assert row["x_floor"] == pytest.approx(row["ms"]["median"] / row["floor_ms"])
            assert ("ratio" in row) == (row["provider"] != "ours")
    json.dumps(found, allow_nan=False)


def test_a_missing_peer_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    row = run([Case("lstm", TINY, "inference")])["rows"][-1]
    assert (row["provider"], row["status"]) == ("onnxruntime", "missing")
    assert row["reason"] == "not installed: onnxruntime (pip install onnxruntime)"


@pytest.mark.parametrize("name", ["out", "d_input", "d_h_0", "d_weight_hh_l0"])
def test_a_wrong_result_is_not_timed_and_shows_no_speed_up(monkeypatch, name):
    monkeypatch.setattr(goals, "SHAPES", (TINY,))
    table = {"ours": wrong_at(name), "torch": torch_nn.PEER}
    found = run([Case("gru", TINY, "training")], table)
    ours, torch_row = found["rows"]
    assert (ours["status"], torch_row["status"]) == ("wrong", "ok")
    assert name in ours["reason"]
    assert "ms" not in ours
    assert goals.ratio(torch_row, ours) is None
    text = rendered(found)
    assert "WRONG" in text
    failed = [g for g in goals.evaluate(found) if g["cell"] == "gru" and g["mode"] == "training" and "torch.nn" in g["goal"]]
    assert failed
    assert {g["verdict"] for g in failed} == {"fail"}


def test_a_peer_that_raises_is_a_row():
    def prepare(problem, case, threads):
        raise NotImplementedError("no such cell")

    found = run([Case("rnn", TINY, "training")], {"ours": OURS, "bad": dataclasses.replace(OURS, name="bad", prepare=prepare)})
    assert found["rows"][1]["status"] == "wrong"
    assert found["rows"][1]["reason"] == "raised NotImplementedError: no such cell"
    assert found["rows"][0]["status"] == "ok"


def interrupted_in_case(number, call):
    """Our peer, but Ctrl-C comes at this call of this case. Call 1 is the gate's."""
    prepared = 0

    def prepare(problem, case, threads):
        nonlocal prepared
        prepared += 1
        this_case, calls = prepared, 0
        provider = torch_nn.PEER.prepare(problem, case, threads)

        def step():
            nonlocal calls
            calls += 1
            if (this_case, calls) == (number, call):
                raise KeyboardInterrupt
            return provider.step()

        return Provider(step)

    return dataclasses.replace(OURS, prepare=prepare)


@pytest.mark.parametrize(("call", "cases_kept"), [(1, 1), (2, 1), (6, 2)])
def test_ctrl_c_keeps_what_was_measured(call, cases_kept):
    # Two calls a round after the gate's: call 6 is in the third round, whose forerunners stay.
    table = {"ours": interrupted_in_case(2, call), "torch": torch_nn.PEER}
    plan = dataclasses.replace(ONE_ROUND, seconds=1e6, min_rounds=4, max_rounds=4)
    found = run(tiny_cases(), table, plan)
    assert not found["run"]["complete"]
    assert len(found["rows"]) == 2 * cases_kept
    assert {row["rounds"] for row in found["rows"][2:]} <= {2}
    assert "Stopped early" in rendered(found)


def test_progress_only_rises_to_one():
    seen = []
    run(tiny_cases(), listener=Listener(progress=seen.append))
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(seen))
    assert seen[-1] == 1.0


def test_without_time_left_every_case_gets_one_round():
    found = run(
        tiny_cases(), {"ours": OURS, "torch": torch_nn.PEER}, dataclasses.replace(ONE_ROUND, min_rounds=3, max_rounds=9)
    )
    assert {row["rounds"] for row in found["rows"]} == {1}
    assert {row["noisy"] for row in found["rows"] if row["provider"] == "torch"} == {True}


# Timing


def test_providers_take_turns_and_one_call_in_each_is_not_timed():
    log = []
    table = {name: Provider(lambda name=name: log.append(name)) for name in "abc"}
    samples = timing.interleave(table, False, seconds=1e-9, min_rounds=3, max_rounds=5)
    assert samples.num_rounds == 3
    assert samples.calls == {"a": 3, "b": 3, "c": 3}
    assert "".join(log) == "aabbcc" + "bbccaa" + "ccaabb"


def test_gradients_are_recorded_in_training_only():
    seen = []
    for training in (True, False):
        timing.turn(Provider(lambda: seen.append(torch.is_grad_enabled())), training)
    assert seen == [True, True, False, False]


def test_quantiles():
    assert timing.quantiles([5, 1, 3, 2, 4, 6]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert timing.quantiles([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0}


# Memory

needs_malloc = pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
MIB = 1 << 20


class Keeps(torch.autograd.Function):
    """Keeps 2 MiB the proper way and 4 MiB where no hook sees them; the result is 1 MiB."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.ones(2 * MIB, dtype=torch.uint8))
        ctx.hidden = torch.ones(4 * MIB, dtype=torch.uint8)
        return x.expand(MIB // 4).clone()

    @staticmethod
    def backward(ctx, d_out):
        return d_out.sum()


@needs_malloc
def test_held_bytes_match_a_case_counted_by_hand():
    x = torch.zeros((), requires_grad=True)
    provider = Provider(step=lambda: torch.autograd.grad(Keeps.apply(x).sum(), x), forward=lambda: Keeps.apply(x))
    assert memory.held(provider) == pytest.approx(7 * MIB, abs=memory.HELD_NOISE)


@needs_malloc
def test_held_bytes_count_what_a_pool_keeps_between_calls():
    pool = [torch.empty(2 * MIB, dtype=torch.uint8)]

    class Pooled:
        def __init__(self):
            self.buffer = pool.pop() if pool else torch.empty(2 * MIB, dtype=torch.uint8)

        def __del__(self):
            pool.append(self.buffer)

    assert memory.held(Provider(step=Pooled, forward=Pooled)) == pytest.approx(2 * MIB, abs=memory.HELD_NOISE)


@needs_malloc
def test_held_bytes_count_onednn_workspace():
    """Torch's own hooks on saved tensors must not see more than we do."""
    case = Case("lstm", Shape(4, 32, 64, 64, "test"), "training")
    provider = torch_nn.PEER.prepare(Problem(case), case, 1)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = provider.forward()
    before = {t.untyped_storage().data_ptr() for t in Problem(case).module.parameters()}
    workspace = max(t.untyped_storage().nbytes() for p, t in saved.items() if p not in before)
    assert result[0].requires_grad
    assert workspace > 4 * 4 * 32 * 64 * 4, "four gates of every step"
    assert memory.held(provider) >= workspace


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_growth_of_inference_memory_sees_the_input_projection():
    rows = memory.growth(["torch", "nobody"], ["rnn"], None, 1)
    row, unknown = rows
    assert row["status"] == "ok", row
    # torch.nn projects the input of all steps at once, and stacks the states of all steps in the end: for each of the 3 T
    # more steps two times B rows of H floats, and a page for the header of the block that holds the state.
    shape = memory.GROWTH_SHAPE
    expected = 3 * shape.T * (2 * shape.B * shape.H * 4 + mmap.PAGESIZE)
    assert row["growth_bytes"] == pytest.approx(expected, abs=memory.PEAK_NOISE)
    assert unknown["status"] == "missing"
    assert unknown["reason"].startswith("not measured: ")


def test_memory_rows_of_a_run(monkeypatch):
    monkeypatch.setattr(memory, "growth", lambda names, cells, backend, threads: [(tuple(names), tuple(cells))])
    key = tiny_cases()[0].key
    monkeypatch.setattr(memory, "peaks", lambda names, cases, *rest: {(key, "torch"): {"peak_bytes": 5}})
    plan = dataclasses.replace(ONE_ROUND, measure_memory=True)
    found = run(tiny_cases(), {"ours": OURS, "torch": torch_nn.PEER}, plan)
    assert found["growth"] == [(("ours", "torch"), tuple(CELLS))]
    for row in found["rows"]:
        assert ("held_bytes" in row) == (row["mode"] == "training")
        assert row.get("peak_bytes") == (5 if (row["case"], row["provider"]) == (key, "torch") else None)
