"""The deep language model job: tiny runs through its command line."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from jobs_support import keep_torch_settings  # noqa: F401, a fixture for every test
from matplotlib.image import imread

import fused_rnn
from benchmarks import jobs
from benchmarks.training import command, deep, trainer
from benchmarks.training.layer_norms import LayerNorms

TINY = "--hidden 12 --embedding 8 --layers 4 --batch 4 --bptt 9 --steps 12 --lr 0.03 --threads 1".split()


@pytest.fixture
def run(tmp_path, capsys):
    """Run the job on a toy text; return the exit code, what it printed, and its JSON rows."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def name_{i % 7}(x): return {i % 11} + x\n" for i in range(120)), encoding="utf-8")

    def call(*arguments):
        given = [] if "--text" in arguments else ["--text", str(text)]
        try:
            code = deep.main([*given, "--out", str(tmp_path / "out"), *TINY, *arguments])
        except SystemExit as error:
            code = error.code
        path = tmp_path / "out" / f"deep{'.partial' if code == 130 else ''}.json"
        return code, capsys.readouterr(), json.loads(path.read_text()) if path.exists() else []

    return call


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_trains_with_and_without_connections(run, tmp_path, cell):
    code, printed, rows = run("--cell", cell)
    assert code == 0
    assert [(row["provider"], row["task"]) for row in rows] == [
        ("torch.nn", ""),
        ("fused_rnn", ""),
        *(("fused_rnn", kind) for kind in deep.KINDS),
    ]
    base, ours, *connected = rows
    assert ours["losses"] == pytest.approx(base["losses"], abs=2e-5)
    assert ours["first_gradients"] == pytest.approx(base["first_gradients"], rel=1e-3, abs=1e-7)
    for row in rows:
        assert len(row["losses"]) == 12
        assert len(row["first_gradients"]) == len(row["last_gradients"]) == 4
        assert all(norm > 0 for norm in row["first_gradients"])
        assert row["perplexity"] == pytest.approx(math.exp(row["held_out_loss"]), rel=2e-5)
        assert row["outcome"] == "finished"
        assert min(row["load_at_start"], row["load_at_end"]) >= 0
    if cell == "lstm":
        # What connections are for: the gradient reaches the first layers.
        share = [row["first_gradients"][0] / row["first_gradients"][-1] for row in rows]
        assert share[1] < 0.1
        assert min(share[2:]) > 0.1
    for kind, row in zip(deep.KINDS, connected, strict=True):
        assert row["title"].endswith(f", {kind}")
        assert row["speed_up"] is None
        assert kind in printed.out
        assert row["losses"][1] != ours["losses"][1]
    assert ours["speed_up"] > 0
    assert "gradient norms of each layer's weights, first 10 steps" in printed.out
    assert "gradient norms of each layer's weights, last 12 steps" in printed.out
    assert f"{ours['first_gradients'][3]:.1e}" in printed.out
    assert imread(tmp_path / "out" / "deep.png").std() > 0.02
    assert not list((tmp_path / "out").glob("*.partial*"))


def test_norms_are_those_of_the_gradients():
    """Of weights and biases of both directions, for each step that there was."""
    stack = torch.nn.GRU(3, 4, 2, bidirectional=True)
    norms = LayerNorms(stack)
    expected = []
    for _ in range(3):
        norms.begin()
        norms.begin()
        stack.zero_grad()
        stack(torch.randn(5, 2, 3))[0].square().sum().backward()
        of_layer = [torch.cat([p.grad.flatten() for n, p in stack.named_parameters() if f"_l{k}" in n]) for k in (0, 1)]
        expected.append([float(grad.norm()) for grad in of_layer])
    assert len(norms.steps) == 3
    assert norms.mean(0, 1) == pytest.approx(expected[0], rel=1e-5)
    assert norms.mean(-2, None) == pytest.approx([(a + b) / 2 for a, b in zip(*expected[1:], strict=True)], rel=1e-5)


@pytest.mark.parametrize("kind", deep.KINDS)
def test_the_stacks_begin_with_the_same_weights(kind):
    model = deep.CharacterModel("lstm", 9, 5, 6, 3, 0.0, tie_weights=False)
    fused = fused_rnn.convert(model)
    made = deep._connected(fused, kind)
    found: dict[str, Any] = dict(made.named_parameters())
    assert made.rnn.connections == kind
    for name, value in fused.named_parameters():
        assert (found[name].shape == value.shape) == (kind != "dense" or name not in ("rnn.weight_ih_l1", "rnn.weight_ih_l2"))
        if found[name].shape == value.shape:
            assert torch.equal(found[name], value)
            assert found[name] is not value


def test_ctrl_c_keeps_what_was_measured_and_earlier_files(run, monkeypatch, tmp_path):
    run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    step, calls = trainer.Contender.step, []

    def interrupted(self, batch):
        # After five steps of warming up and the trainings of all but the last.
        calls.append(self.name)
        if len(calls) > 5 + 4 * 12 + 3:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(trainer.Contender, "step", interrupted)
    code, printed, rows = run("--seed", "1")
    assert code == 130
    assert "Ctrl-C" in printed.out
    assert "Traceback" not in printed.err
    assert [len(row["losses"]) for row in rows] == [12] * 4 + [3]
    assert rows[0]["held_out_loss"] is None
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before.items() <= after.items()
    assert {"deep.partial.json", "deep.partial.png"} <= after.keys()


def test_time_limit_leaves_no_training(run, tmp_path):
    code, printed, rows = run("--time-limit", "1e-9")
    assert code == 0
    assert "stopped by --time-limit" in printed.out
    assert all(row["losses"] == row["first_gradients"] == [] for row in rows)
    assert not (tmp_path / "out" / "deep.png").exists()


def test_a_loss_that_is_not_finite_ends_the_job(run):
    code, printed, rows = run("--cell", "rnn_relu", "--lr", "1000", "--clip-norm", "0", "--steps", "60")
    assert code == 1
    assert "not finite" in printed.out
    assert rows[0]["outcome"] == "diverged"


def test_trainings_that_differ_are_told(run, monkeypatch):
    def other(parser, model):
        fused = fused_rnn.convert(deep.copy.deepcopy(model))
        with torch.no_grad():
            fused.rnn.weight_ih_l2.mul_(1.01)
        return fused, "none"

    monkeypatch.setattr(deep.job, "fused_copy", other)
    code, printed, _ = run()
    assert code == 1
    assert "DISAGREE from the start" in printed.out


WRONG = [
    (["--layers", "1"], "--layers: expected 2 or more"),
    (["--connections", "skip"], "skip"),
    (["--connections"], "--connections"),
    (["--hidden", "0"], "--hidden"),
    (["--hidden", "1000000"], "GiB"),
    (["--held-out", "-1"], "--held-out"),
    (["--held-out", "1"], "too short"),
    (["--steps", "x"], "--steps"),
    (["--cell", "transformer"], "transformer"),
    (["--text", "/nowhere/at/all.txt"], "/nowhere/at/all.txt"),
    (["--batch", "100000"], "too short"),
    (["--dropout", "0.5"], "--dropout"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_wrong_options_get_one_line_and_exit_code_2(run, arguments, words):
    code, printed, _ = run(*arguments)
    assert code == 2
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_results_that_cannot_be_written_in_the_end(run, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deep, "write_rows", full)
    code, printed, _ = run("--connections", "residual")
    assert code == 2
    assert "No space left" in printed.err.splitlines()[-1]


def test_quick_sets_defaults_that_options_still_change(tmp_path):
    line = ["--quick", "--steps", "7", "--out", str(tmp_path)]
    options = vars(command.parse_job(deep._parser(), "deep", line, deep._QUICK))
    assert options["steps"] == 7
    assert options["hidden"] == deep._QUICK["hidden"]


def test_rows_of_the_readme(run, tmp_path):
    """A line for each training; what torch.nn has not shows no time of it."""
    run("--connections", "residual", "highway")
    lines = jobs.table(jobs.load_jobs(tmp_path / "out"))[2:]
    assert [line.split(" | ")[0].rpartition(", ")[2] for line in lines] == ["bptt 9", "residual", "highway"]
    assert " – " not in lines[0]
    for line in lines[1:]:
        assert line.split(" | ")[2] == line.split(" | ")[4] == "–"
        assert line.endswith("| – | – |")
