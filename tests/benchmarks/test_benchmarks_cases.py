"""The benchmark's cases, options, peers and floors, on tiny shapes."""

import dataclasses
import sys

import pytest
import torch
from benchmarks_support import OURS, TINY, assert_right, no_pause, run, tiny_cases  # noqa: F401, a fixture for every test
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks import memory
from benchmarks.cases import CELLS, ITEM_BYTES, Case, Shape, parse_shape
from benchmarks.floors import Floors
from benchmarks.fma import fma_rate
from benchmarks.lengths import WORDS, lengths
from benchmarks.peers import cell_loop, peers, torch_nn
from benchmarks.problem import Problem
from benchmarks.sets import SETS, select

OPTIONS = (
    {},
    {"num_layers": 2, "bidirectional": True},
    {"ragged": True},
    {"ragged": True, "bidirectional": True},
    {"resets": 2},
    {"num_layers": 2, "dropout": 0.5},
    {"dtype": "float64"},
    {"dtype": "bfloat16"},
    {"padded": True},
    {"padded": True, "bidirectional": True, "summed": True},
    {"summed": True},
    {"summed": True, "ragged": True},
    {"summed": True, "resets": 2},
    {"loop": "layer"},
    {"loop": "cell"},
)


# Sets


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_cases_with_keys_of_their_own(name):
    cases = SETS[name].cases()
    assert cases
    assert len({case.key for case in cases}) == len(cases)
    assert all(case.shape.origin for case in cases)
    assert {case.cell for case in cases} <= set(CELLS)
    assert select(sets=[name], quick=True)


def test_all_sets_together_hold_each_case_once():
    keys = [case.key for case in select(sets=["all"])]
    assert len(keys) == len(set(keys))
    assert {case.key for name in SETS for case in SETS[name].cases()} == set(keys)


def test_cases_that_share_their_data_stand_together():
    cases = select(sets=["all"])
    blocks = [case.data for i, case in enumerate(cases) if i == 0 or cases[i - 1].data != case.data]
    assert len(blocks) == len(set(blocks))


def test_a_shape_of_your_own():
    cases = select(["gru"], ["3x7x5", "2x1x4x6"], dtypes=["float64"])
    assert [(case.shape.sizes, case.mode, case.dtype) for case in cases] == [
        ((3, 7, 5, 5), "training", "float64"),
        ((3, 7, 5, 5), "inference", "float64"),
        ((2, 1, 4, 6), "streaming", "float64"),
    ]
    assert parse_shape("2x1x4x6").name == "2x1x4x6"


def test_resets_do_not_go_with_two_directions():
    with pytest.raises(ValueError, match="resets"):
        Case("gru", TINY, "training", resets=2, bidirectional=True)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("gru", {"proj_size": 2}),
        ("gru", {"padded": True, "ragged": True}),
        ("gru", {"padded": True, "resets": 2}),
        ("gru", {"loop": "cells"}),
        ("gru", {"loop": "cell", "bidirectional": True}),
        ("gru", {"loop": "layer", "summed": True}),
    ],
    ids=str,
)
def test_a_case_that_nobody_can_serve_is_refused(cell, options):
    with pytest.raises(ValueError, match="a case"):
        Case(cell, TINY, "training", **options)


def test_small_calls_are_of_every_kind_and_size():
    cases = SETS["small"].cases()
    assert all(case.summed for case in cases)
    assert {(c.shape.T, c.shape.B, c.shape.H, c.threads) for c in cases} == {
        (T, N, H, threads) for T in (1, 4, 16) for N in (1, 4, 16) for H in (16, 64) for threads in (1, 2)
    }
    at_one = [case for case in cases if (case.shape.name, case.threads) == ("4x4x16", 2)]
    # The projection is LSTM's alone.
    assert len(at_one) == 2 * (3 * 6 + 1)
    assert {case.proj_size for case in at_one} == {0, 8}
    assert {case.mode for case in cases} == {"training", "inference"}


def test_steps_are_calls_of_cells_and_of_layers():
    cases = SETS["steps"].cases()
    assert {(c.shape.B, c.shape.H, c.loop) for c in cases} == {
        (B, H, loop) for B in (1, 8, 32, 64, 256) for H in (64, 128, 256, 512, 1024) for loop in ("layer", "cell")
    }
    assert {case.shape.T for case in cases} == {20}
    assert len(cases) == 50 * 3 * 2


@pytest.mark.parametrize("name", ["small", "steps"])
def test_quick_takes_some_of_every_kind(name):
    def kinds(cases):
        return {
            (c.cell, c.mode, c.dtype, c.bidirectional, c.ragged, c.padded, bool(c.resets), c.loop, c.threads) for c in cases
        }

    cases, quick = SETS[name].cases(), select(sets=[name], quick=True)
    assert kinds(cases) == kinds(quick)
    assert len(quick) * 5 < len(cases)


def test_lengths_have_the_shape_of_the_distribution():
    assert lengths(64, 39) == tuple(sorted(WORDS * 2, reverse=True))
    for B, T in ((1, 7), (5, 20), (33, 80), (200, 3)):
        found = lengths(B, T)
        assert len(found) == B
        assert found[0] == T
        assert min(found) >= 1
        assert list(found) == sorted(found, reverse=True)


def test_a_ragged_case_counts_the_steps_that_exist():
    case = Case("rnn", Shape(5, 20, 4, 6, "test"), "inference", ragged=True)
    problem = Problem(case)
    packed = pack_padded_sequence(torch.zeros(20, 5, 1), torch.tensor(lengths(5, 20)))
    assert problem.batch_sizes.tolist() == packed.batch_sizes.tolist()
    assert problem.input.shape == (sum(lengths(5, 20)), 4)
    assert case.flops == 2 * sum(lengths(5, 20)) * 6 * (4 + 6)


def test_traffic_counts_every_byte_once():
    B, T, I, H = TINY.sizes  # noqa: E741
    elements = T * B * (I + H) + 4 * H * (I + H) + 4 * B * H
    assert Case("lstm", TINY, "inference").traffic == 4 * elements
    assert Case("lstm", TINY, "training", dtype="bfloat16").traffic == 2 * 2 * elements
    assert set(ITEM_BYTES.values()) == {getattr(torch, name).itemsize for name in ITEM_BYTES}


# Peers


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["ours", "torch", "loop"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_every_peer_computes_the_same(name, options, mode):
    for cell in CELLS:
        case = Case(cell, TINY, mode, **options)
        if peers()[name].reason(case):
            assert name == "loop"
            assert not case.plain
        else:
            assert_right(name, case)


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("options", [{}, {"summed": True}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_a_projection_computes_the_same(options, mode):
    case = Case("lstm", TINY, mode, proj_size=2, **options)
    for name in ("ours", "torch"):
        assert_right(name, case)
    for name in ("loop", "jax", "onnxruntime"):
        assert peers()[name].refuses(case)
    module = Problem(case).module
    weights = sum(value.numel() for value in module.parameters() if value.dim() == 2)
    assert case.num_weights == weights


def test_padded_lengths_are_in_no_order_and_the_padding_is_zero():
    case = Case("gru", Shape(16, 20, 4, 6, "test"), "inference", padded=True)
    problem = Problem(case)
    assert sorted(problem.lengths.tolist(), reverse=True) == list(lengths(16, 20))
    assert problem.lengths.tolist() != list(lengths(16, 20))
    assert case.rows == sum(lengths(16, 20))
    for name in ("ours", "torch"):
        with torch.no_grad():
            out = problem.named(peers()[name].prepare(problem, case, 1).step())["out"]
        padding = torch.arange(20)[:, None] >= problem.lengths
        assert padding.any()
        assert not out[padding].any()


@pytest.mark.parametrize("loop", ["layer", "cell"])
def test_a_loop_takes_the_steps_of_the_layer(loop):
    """The same weights in one call of a layer, and the gradients of the same sum."""
    case = Case("lstm", TINY, "training", loop=loop)
    problem = Problem(case)
    layer = torch.nn.LSTM(TINY.I, TINY.H)
    layer.load_state_dict({f"{name.removesuffix('_l0')}_l0": value for name, value in problem.module.state_dict().items()})
    out, ends = layer(problem.input, problem.states)
    gradients = torch.autograd.grad(out, tuple(layer.parameters()), problem.d_outputs[0])
    found = problem.named(peers()["ours"].prepare(problem, case, 1).step())
    torch.testing.assert_close([found["out"], found["h_n"], found["c_n"]], [out, *ends])
    torch.testing.assert_close([found[name] for name in problem.result_names[3:]], list(gradients))


def test_jax_computes_the_same():
    pytest.importorskip("jax", reason="JAX is an optional peer")
    for cell in CELLS:
        for mode in ("training", "inference"):
            for options in ({}, {"resets": 2}):
                assert_right("jax", Case(cell, TINY, mode, **options))
    assert peers()["jax"].refuses(Case("gru", TINY, "training", ragged=True))


def test_resets_change_the_result_and_stop_the_gradient():
    case = Case("lstm", Shape(2, 6, 3, 4, "test"), "training", resets=3)
    problem = Problem(case)
    problem.reset = torch.zeros(6, 2, dtype=torch.bool)
    problem.reset[3] = True
    results = problem.named(peers()["ours"].prepare(problem, case, 1).step())
    problem.d_outputs[0][:3] = 0
    stopped = problem.named(peers()["ours"].prepare(problem, case, 1).step())
    assert results["d_input"][:3].abs().max() > 0
    assert stopped["d_input"][:3].abs().max() == 0
    assert stopped["d_h_0"].abs().max() == 0
    problem.reset[:] = False
    assert (problem.named(peers()["ours"].prepare(problem, case, 1).step())["out"] != results["out"])[3:].any()


def test_a_peer_without_its_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    row = run([Case("gru", TINY, "training")], {"ours": OURS, "jax": peers()["jax"]})["rows"][-1]
    assert (row["status"], row["reason"]) == ("missing", "not installed: jax (pip install jax)")


def test_the_compiled_loop_refuses_to_unroll_forever():
    case = Case("gru", Shape(2, cell_loop.MOST_UNROLLED + 1, 3, 4, "test"), "training")
    assert "unrolls" in cell_loop.COMPILED.refuses(case)


def test_what_a_peer_takes_to_compile_is_a_figure_of_its_own():
    found = run([Case("rnn", TINY, "inference")], {"ours": OURS, "slow": dataclasses.replace(OURS, name="slow", compiles=True)})
    assert ["setup_s" in row for row in found["rows"]] == [False, True]


def test_rows_say_what_they_are():
    found = run([Case("gru", TINY, "training", resets=2, threads=2), Case("gru", TINY, "training", threads=1)])
    first, last = found["rows"][1], found["rows"][-2]
    assert first["case"] == "training/gru/2x3x4x5/float32/resets=2/threads=2"
    assert (first["options"], first["threads"], first["device"]) == (["resets=2"], 2, "cpu")
    assert "one call per step" in first["note"]
    # The run has one thread.
    assert (last["case"], last["threads"]) == ("training/gru/2x3x4x5/float32", 1)


def test_a_case_with_the_threads_of_the_run_is_measured_once():
    case = Case("gru", TINY, "inference")
    found = run([case, dataclasses.replace(case, threads=1)], {"ours": OURS})
    assert len(found["rows"]) == 1


# Floors


def test_multiply_adds_are_counted_and_not_removed():
    # The best of a few: microseconds of work, in which another process may have had the processor.
    assert 1e8 < max(fma_rate(1, 32, 2000) for _ in range(5)) < 1e13
    assert max(fma_rate(2, 64, 2000) for _ in range(5)) > 1e8


def test_floors_scale_with_the_work():
    floors = Floors(size=32, elements=64)
    floors.gemm(1, "float32").sample()
    floors.sample_others(1, "float32")
    small, large = Case("gru", TINY, "inference"), Case("gru", TINY, "training")
    a, b = floors.of(small, 1, 0), floors.of(large, 1, 0)
    assert set(a) == {"gemm", "fma", "bandwidth"}
    assert b["gemm"] == pytest.approx(3 * a["gemm"])
    assert b["bandwidth"] == pytest.approx(2 * a["bandwidth"])
    assert set(floors.summary(1)) == {"gemm_gflops", "fma_gflops", "bandwidth_gbs"}
    assert floors.summary(2) == {}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_every_dtype_has_floors(dtype):
    found = run([Case("rnn", TINY, "inference", dtype=dtype)], {"ours": OURS, "torch": torch_nn.PEER})
    for row in found["rows"]:
        assert row["status"] == "ok"
        assert row["reaches"]["gemm"] == pytest.approx(1 / row["x_floor"])
        assert all(share > 0 for share in row["reaches"].values())


# Peaks


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peaks_see_what_a_call_needs():
    case = Case("rnn", Shape(32, 64, 256, 256, "test"), "inference")
    found = memory.peaks(["torch", "nobody"], [case], None, 1, 60.0)
    assert set(found) == {(case.key, "torch"), (case.key, "nobody")}
    assert found[case.key, "nobody"]["peak_reason"].startswith("not measured")
    found = memory.peaks(["torch"], [*tiny_cases(("training",)), case], None, 1, 60.0)
    row = 32 * 64 * 256 * 4
    # The input projection of all steps, the list of the outputs and the output made from it.
    assert 2 * row <= found[case.key, "torch"]["peak_bytes"] + memory.PEAK_NOISE
    assert found[case.key, "torch"]["peak_bytes"] <= 5 * row
    assert len(found) == 4


def test_peaks_end_with_their_time():
    case = Case("rnn", TINY, "inference")
    assert memory.peaks(["torch"], [case], None, 1, -1.0) == {
        (case.key, "torch"): {"peak_reason": "not measured: no time left"}
    }
