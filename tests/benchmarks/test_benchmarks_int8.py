"""The peers with int8 weights: what they are judged by, what their rows hold, and the table of them."""

import dataclasses

import pytest
import torch
from benchmarks_support import OURS, TINY, no_pause, rendered, run, run_info, tiny_cases  # noqa: F401, a fixture for every test

from benchmarks import goals, int8_table, results
from benchmarks.cases import Case, Shape
from benchmarks.peers import int8, peers
from benchmarks.problem import Problem
from benchmarks.sets import SETS
from benchmarks.suite import judge_peer

pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

TABLE = {"ours": OURS, "torch-int8": int8.PEER, "int8": int8.OUR_PEER}


def test_rows_and_their_table():
    found = run(tiny_cases(("inference",)), TABLE) | {"run": run_info(providers=list(TABLE), complete=True)}
    rows = {(row["cell"], row["provider"]): row for row in found["rows"]}
    for cell in ("lstm", "gru", "rnn"):
        row = rows[cell, "int8"]
        assert row["status"] == "ok", row
        assert 0 < row["saved_bytes"] != row["saved_bytes_float32"] > 0
    for cell in ("lstm", "gru"):
        row = rows[cell, "torch-int8"]
        assert row["status"] == "ok", row
        assert row["gate"]["error"] == row["gate"]["torch"] > 1e-5
    assert rows["rnn", "torch-int8"]["reason"] == "torch quantizes no RNN layer"
    text = rendered(found)
    assert "Int8 weights" in text
    assert "torch int8 / int8, slowest shape" in {goal["goal"] for goal in goals.evaluate(found)}
    assert "torch int8 / int8, slowest shape" not in {goal["goal"] for goal in goals.evaluate(run([]))}
    assert "Int8 weights" not in rendered(run(tiny_cases(("inference",))))


def test_page(tmp_path, capsys):
    path = tmp_path / "int8.json"
    found = run(tiny_cases(("inference",)), TABLE) | {"run": run_info(providers=list(TABLE))}
    results.save(found, path)
    assert int8_table.main([str(path)]) == 0
    text = (tmp_path / "int8.md").read_text()
    assert text.count("\n| inference | ") == 3
    assert "a CPU, 1 thread" in text
    results.save(run([Case("lstm", TINY, "inference")]), path)
    with pytest.raises(SystemExit):
        int8_table.main([str(path)])
    assert "no case of the results has the provider 'int8'" in capsys.readouterr().err


def test_weights_take_a_quarter():
    problem = Problem(Case("lstm", Shape(1, 2, 128, 128, "test"), "inference"))
    figures = int8.OUR_PEER.prepare(problem, problem.case, 1).figures
    assert figures["saved_bytes"] < 0.28 * figures["saved_bytes_float32"]


@pytest.mark.parametrize(
    "options", [{"bidirectional": True}, {"ragged": True}, {"padded": True}, {"resets": 2}, {"loop": "layer"}, {"loop": "cell"}]
)
def test_cases_with_options(options):
    """Where both can run a case, both do, and are right by the measure."""
    problem = Problem(Case("gru", TINY, "inference", **options))
    for name in TABLE:
        peer = peers()[name]
        if name != "ours" and not peer.reason(problem.case):
            with torch.no_grad():
                provider, found = judge_peer(peer, None, problem, problem.case, 1)
            assert provider is not None, found


def test_what_is_no_case_for_them():
    for peer in (int8.PEER, int8.OUR_PEER):
        assert peer.reason(Case("lstm", TINY, "training")) == "inference only"
        assert peer.reason(Case("lstm", TINY, "inference", "bfloat16")) == "in place of float32 alone"
        assert peer.reason(Case("lstm", TINY, "inference", proj_size=2)) == "has no projection"
        assert peer.reason(Case("rnn", TINY, "inference", bidirectional=True))
        assert peer.unavailable() is None
        assert peer.version()


def test_a_much_larger_error_than_torchs_is_wrong():
    def prepare(problem, case, threads):
        provider = int8.PEER.prepare(problem, case, threads)
        return dataclasses.replace(provider, tensors=lambda results: tuple(each * 1.3 for each in results))

    worse = dataclasses.replace(int8.PEER, prepare=prepare)
    (row,) = run([Case("lstm", TINY, "inference")], {"torch-int8": worse})["rows"]
    assert row["status"] == "wrong"
    assert row["reason"].startswith("wrong results, not timed")
    assert "WRONG" in rendered(run([Case("lstm", TINY, "inference")], {"int8": dataclasses.replace(worse, name="int8")}))


def test_the_set_has_the_inference_of_the_goals():
    cases = SETS["int8"].cases()
    goals_of = {case.key for case in SETS["goals"].cases() if not case.training and case.plain}
    assert goals_of <= {case.key for case in cases}
    assert {case.shape.H for case in cases if case.shape.B == 1 and case.mode == "inference"} >= {512, 1024}


def test_the_goal_for_one_sequence_speaks_of_no_other():
    goal = next(goal for goal in goals.GOALS if goal.under == "int8" and goal.over == "ours")
    assert goal.speaks_of(1, 512)
    assert not goal.speaks_of(2, 512)
    assert not goal.speaks_of(1, 511)
