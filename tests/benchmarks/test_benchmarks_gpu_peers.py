"""The GPU benchmark's sides without a GPU: all compute the same, and a peer that does not is a note."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.gpu import cases, outside, peers, pieces, problem, report, run, timed
from benchmarks.gpu.cases import Case

CPU = torch.device("cpu")
TINY = Case("gru", 5, 3, 4, "float32")


@pytest.mark.parametrize("extra", cases.EXTRAS)
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("directions", [1, 2])
def test_all_sides_compute_the_same(cell: str, extra: str, directions: int) -> None:
    """Ours, the reference and torch.nn: outputs, states and gradients of the same problem."""
    made = problem.make(Case(cell, 5, 3, 4, "float32", directions, extra), CPU)
    ours = problem.ours(made, None)(True)
    for other in (problem.ours(made, "reference"), problem.torch_nn(made)):
        if other is None:
            assert extra == "reset"
            continue
        theirs = other(True)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


def test_resets_and_ragged_rows_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "RESET_SHARE", 0.5)
    reset = problem.make(Case("gru", 5, 3, 40, "float32", 1, "reset"), CPU).reset
    assert reset is not None
    assert 0 < reset.sum() < len(reset)
    ragged = problem.make(Case("gru", 5, 3, 40, "float32", 1, "ragged"), CPU).steps.batch_sizes
    assert ragged is not None
    assert ragged[0] == 3
    assert ragged[-1] == 1


def test_torchrl_is_asked_for_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem.importlib.util, "find_spec", lambda name: None)
    assert problem.torchrl_missing() == "torchrl is not installed"


def test_the_pieces_of_torch_nn_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients of a whole layer with resets, in both directions; a reset at the first step discards the state."""
    monkeypatch.setattr(problem, "RESET_SHARE", 0.2)
    for cell, directions in itertools.product(cases.CELLS, (1, 2)):
        made = problem.make(Case(cell, 5, 3, 40, "float32", directions, "reset"), CPU)
        assert made.reset is not None
        assert made.reset[:3].any()
        ours = problem.ours(made, None)(True)
        theirs = pieces.cudnn_pieces(made)(True)
        assert ours.keys() == theirs.keys()
        assert peers.disagreement(ours, theirs, 1e-5) is None
    with pytest.raises(ValueError, match="expected a dense batch with resets"):
        pieces.cudnn_pieces(problem.make(TINY, CPU))


def test_the_pieces_by_hand() -> None:
    """Two sequences of three steps; the second starts anew at step 1: pieces of 3, 2 and 1 steps."""
    reset = torch.tensor([[False, False], [False, True], [False, False]]).flatten()
    made = pieces.cut(reset, 3, 2)
    assert made.batch_sizes.tolist() == [3, 2, 1]
    assert made.rows.tolist() == [0, 3, 1, 2, 5, 4]
    assert (made.first.tolist(), made.last.tolist(), made.kept.tolist()) == ([0, 2], [0, 1], [True, True])


def test_a_peer_that_is_wrong_or_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not timed, ours and torch.nn are; one that is missing is not tried."""

    def wrong(made: problem.Problem) -> problem.Run:
        side = problem.ours(made, "reference")
        return lambda training: {name: 2 * value for name, value in side(training).items()}

    def fails(made: problem.Problem) -> problem.Run:
        raise RuntimeError("no kernel")

    def takes(case: Case) -> bool:
        return True

    given = [("right", lambda made: problem.ours(made, "reference")), ("wrong_one", wrong), ("failing", fails)]
    tried = [peers.Peer(name, lambda: None, takes, prepare) for name, prepare in given]
    lost = peers.Peer("lost", lambda: 1 // 0 and None, takes, fails)
    slow = peers.Peer("slow", lambda: None, takes, fails, asked=True)
    monkeypatch.setattr(peers, "PEERS", (*tried, lost, slow))
    results = run.measure(run.Options(CPU, rounds=1, quick=True), [TINY], lambda text: None)
    assert list(results["run"]["missing"]) == ["lost", "slow"]
    for row in results["rows"]:
        assert row["status"] == "ok"
        assert row["ratio_right"] > 0
        assert row["wrong_one"].startswith("wrong: ")
        assert row["failing"] == "failed: RuntimeError: no kernel"
        assert not {"lost", "slow", "ratio_wrong_one", "ratio_failing"} & set(row)
        assert "failing failed: RuntimeError" in timed.line(row)
    assert any(line.startswith("without lost: ZeroDivisionError") for line in report.problems(results))


def test_a_peer_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first case, with a note in the others."""
    peer = peers.Peer("slow", lambda: None, lambda case: True, lambda made: problem.ours(made, "reference"))
    monkeypatch.setattr(peers, "PEERS", (peer,))
    monkeypatch.setattr(run, "QUICK_PEER", 0.0)
    results = run.measure(run.Options(CPU, rounds=1, quick=True), [TINY, Case("lstm", 5, 3, 4, "float32")], lambda text: None)
    assert ["ratio_slow" in row for row in results["rows"]] == [True, True, False, False]
    assert results["rows"][2]["slow"].startswith("not tried: its first calls in other cases took ")


def test_the_loop_over_cells_computes_the_same() -> None:
    for cell in cases.CELLS:
        made = problem.make(Case(cell, 5, 3, 4, "float32"), CPU)
        with torch.compiler.set_stance("force_eager"):
            theirs = outside.loop_compiled(made)(True)
        assert peers.disagreement(problem.ours(made, None)(True), theirs, 1e-5) is None


def test_nan_is_no_agreement() -> None:
    there = {"out": torch.ones(2)}
    assert peers.disagreement(there, {"out": torch.tensor([1.0, float("nan")])}, 0.1) == "out differs by nan of its size"
