"""The training jobs: tiny runs through their command lines."""

import json
import sys

import pytest
import torch
from jobs_support import keep_torch_settings  # noqa: F401, a fixture for every test
from matplotlib.image import imread

from benchmarks.training import adding, classifier, command, gradient_flow, session, tagger, trainer

JOBS = {"tagger": tagger, "classifier": classifier, "adding": adding}
TINY = {
    "tagger": "--hidden 8 --embedding 6 --batch 4 --length 20 --steps 6",
    "classifier": "--hidden 6 --batch 32 --steps 4",
    "adding": "--hidden 6 --batch 8 --steps 4 --lengths 9 14 --gradient-steps 2",
}
TASKS = {"tagger": [""], "classifier": ["last", "mean", "ends"], "adding": ["T9", "T14"]}
SOURCE = '# a comment\ndef name(x):\n    """Text."""\n    return 12 + x  # why\n'


@pytest.fixture
def run(tmp_path, capsys):
    """Run a job in its tiny size; return the exit code, what it printed, and its JSON rows."""
    text = tmp_path / "source.py"
    text.write_text(SOURCE * 30, encoding="utf-8")
    out = tmp_path / "out"

    def call(name, *arguments):
        line = [*TINY[name].split(), "--threads", "1", "--out", str(out), *arguments]
        if name == "tagger" and "--text" not in arguments:
            line += ["--text", str(text)]
        try:
            code = JOBS[name].main(line)
        except SystemExit as error:
            code = error.code
        path = out / f"{name}{'.partial' if code == 130 else ''}.json"
        return code, capsys.readouterr(), json.loads(path.read_text()) if path.exists() else []

    return call


# The command lines


@pytest.mark.parametrize("name", JOBS)
def test_both_trainings_coincide(run, tmp_path, name):
    code, printed, rows = run(name)
    assert code == 0
    assert [row["task"] for row in rows if row.get("provider") == "fused_rnn"] == TASKS[name]
    for task in TASKS[name]:
        found = {row["provider"]: row for row in rows if row.get("task") == task}
        base, ours, *yardsticks = found.values()
        assert (base["provider"], ours["provider"]) == ("torch.nn", "fused_rnn")
        assert len(base["losses"]) == len(ours["losses"]) == len(ours["seconds"]) > 3
        # float32 rounding, carried through a few steps of Adam.
        assert ours["losses"] == pytest.approx(base["losses"], abs=2e-5)
        for measure in JOBS[name].__dict__[name.title()].measures:
            assert ours[measure.key] == pytest.approx(base[measure.key], abs=2e-5)
            assert measure.label in printed.out
        assert ours["speed_up"] > 0
        assert ours["outcome"] == "finished"
        for yardstick in yardsticks:
            assert yardstick["provider"] in printed.out
            assert any(isinstance(yardstick[measure.key], float) for measure in JOBS[name].__dict__[name.title()].measures)
        assert yardsticks
        picture = imread(tmp_path / "out" / f"{name}{'_' if task else ''}{task}.png")
        assert picture.std() > 0.02
    assert "the two trainings agree" in printed.out
    assert not list((tmp_path / "out").glob("*.partial*"))


def test_adding_draws_what_it_measured(run, tmp_path):
    code, printed, rows = run("adding")
    assert code == 0
    curves = [row for row in rows if row["task"] == "gradients" and "stage" in row]
    descents = [row for row in rows if row["task"] == "gradients" and "clip" in row]
    assert {(c["cell"], c["stage"]) for c in curves} == {
        (cell, stage) for cell in ("rnn_tanh", "gru", "lstm") for stage in ("start", "clipped", "not clipped", "radius")
    }
    assert {c["length"] for c in curves} == {9, 14}
    assert all(c["steps"] == list(range(c["length"] + 1)) and len(c["norms"]) == c["length"] + 1 for c in curves)
    assert [d["clip"] for d in descents] == [0.0, 1.0]
    for name in ("adding_gradients.png", "adding_exploding.png"):
        picture = imread(tmp_path / "out" / name)
        assert picture.shape[0] > 600
        assert picture.std() > 0.05
    assert "what is left of the gradient" in printed.out


def test_learns_more_than_the_yardstick(run):
    """Small, but long enough: the commonest class of each character is beaten."""
    code, _, rows = run("tagger", "--steps", "60", "--lr", "0.03", "--hidden", "16")
    found = {row["provider"]: row for row in rows}
    assert code == 0
    assert found["fused_rnn"]["accuracy"] > found["by character"]["accuracy"] + 0.05
    assert found["by character"]["accuracy"] > min(row["accuracy"] for row in rows)


@pytest.mark.parametrize("name", JOBS)
def test_ctrl_c_keeps_what_was_measured_and_earlier_files(run, monkeypatch, tmp_path, name):
    run(name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    step, calls = trainer.Contender.step, []

    def interrupted(self, batch):
        # In the last task.
        calls.append(self.name)
        if len(calls) > (len(TASKS[name]) - 1) * (2 + 2 * int(TINY[name].split("--steps ")[1].split()[0])) + 5:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(trainer.Contender, "step", interrupted)
    code, printed, rows = run(name, "--seed", "1")
    assert code == 130
    assert "Ctrl-C" in printed.out
    assert "Traceback" not in printed.err
    assert f"{name}.partial.json" in printed.out
    assert [row["outcome"] for row in rows if row["provider"] == "fused_rnn"] == ["finished"] * (len(TASKS[name]) - 1) + [
        "interrupted"
    ]
    assert [row["losses"] for row in rows if row["provider"] == "torch.nn"][-1]
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before.items() <= after.items()


def test_ctrl_c_among_the_gradients_keeps_the_curves(run, monkeypatch, tmp_path):
    look, calls = gradient_flow.GradientFlow._look, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return look(self, *arguments, **options)

    monkeypatch.setattr(gradient_flow.GradientFlow, "_look", interrupted)
    code, printed, rows = run("adding")
    assert code == 130
    assert "curves are those so far" in printed.out
    assert len([row for row in rows if row["task"] == "gradients"]) == 3
    assert (tmp_path / "out" / "adding_gradients.partial.png").exists()
    assert not (tmp_path / "out" / "adding.json").exists()


@pytest.mark.parametrize("name", JOBS)
def test_ctrl_c_before_the_training(run, monkeypatch, name):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(JOBS[name], "Session", interrupted)
    code, printed, _ = run(name)
    assert (code, printed.err) == (130, "interrupted\n")


def test_two_trainings_of_different_quality_are_told(run, monkeypatch):
    monkeypatch.setattr(session.job, "fused_copy", lambda parser, model: (_other(model), "none"))
    code, printed, _ = run("tagger", "--steps", "40")
    assert code == 1
    assert "held-out accuracy: the two trainings DISAGREE" in printed.out
    assert "DISAGREE from the start" in printed.out


def _other(model):
    """A model that does not learn."""
    other = type(model)("lstm", model.embedding.num_embeddings, 6, 8, 1)
    torch.nn.init.zeros_(other.linear.weight)
    other.linear.weight.register_hook(torch.zeros_like)
    return other


def test_gradients_that_differ_are_told(run, monkeypatch):
    monkeypatch.setattr(gradient_flow, "_SAME", 0.0)
    code, _, _ = run("adding")
    assert code == 1


@pytest.mark.parametrize("name", JOBS)
def test_time_limit_leaves_no_training(run, name):
    code, printed, rows = run(name, "--time-limit", "1e-9", *(["--gradient-steps", "0"] if name == "adding" else []))
    assert code == 0
    assert printed.out.count("stopped by --time-limit") == len(TASKS[name])
    assert all(row["losses"] == [] for row in rows)


def test_a_loss_that_is_not_finite_ends_the_job(run):
    code, printed, rows = run(
        "adding", "--cell", "rnn_relu", "--lr", "1000", "--clip-norm", "0", "--lengths", "60", "70", "--steps", "60"
    )
    assert code == 1
    assert "not finite" in printed.out
    assert {row["task"] for row in rows} == {"T60"}
    assert rows[0]["losses"][-1] is None


WRONG = [
    *((name, ["--hidden", "0"], "--hidden") for name in JOBS),
    *((name, ["--steps", "x"], "--steps") for name in JOBS),
    *((name, ["--lr", "nan"], "--lr") for name in JOBS),
    *((name, ["--cell", "transformer"], "transformer") for name in JOBS),
    *((name, ["--hidden", "1000000"], "GiB") for name in JOBS),
    *((name, ["--nonsense"], "--nonsense") for name in JOBS),
    *((name, ["--threads", "0"], "--threads") for name in JOBS),
    ("tagger", ["--batch", "100000"], "too short"),
    ("tagger", ["--length", "0"], "--length"),
    ("tagger", ["--text", "/nowhere/at/all.py"], "/nowhere/at/all.py"),
    ("classifier", ["--pooling", "max"], "max"),
    ("adding", ["--lengths", "1"], "--lengths"),
    ("adding", ["--lengths"], "--lengths"),
    ("adding", ["--batch", "1000000", "--lengths", "1000000"], "GiB"),
    ("adding", ["--gradient-steps", "-1"], "--gradient-steps"),
]


@pytest.mark.parametrize(("name", "arguments", "words"), WRONG, ids=[f"{w[0]} {' '.join(w[1])}" for w in WRONG])
def test_wrong_options_get_one_line_and_exit_code_2(run, name, arguments, words):
    code, printed, _ = run(name, *arguments)
    assert code == 2
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_text_that_is_no_python(run, tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("Dear reader, (\n" * 100)
    code, printed, _ = run("tagger", "--text", str(path))
    assert (code, printed.err.count("\n")) == (2, 1)
    assert "no Python source" in printed.err


def test_missing_scikit_learn(run, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, printed, _ = run("classifier")
    assert (code, printed.err.count("\n")) == (2, 1)
    assert "scikit-learn" in printed.err


@pytest.mark.parametrize("name", JOBS)
def test_output_folder_that_cannot_be_made(run, tmp_path, name):
    path = tmp_path / "file"
    path.write_text("")
    code, printed, _ = run(name, "--out", str(path))
    assert (code, printed.err.count("\n")) == (2, 1)
    assert "--out" in printed.err


def test_results_that_cannot_be_written_in_the_end(run, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "write_rows", full)
    code, printed, _ = run("tagger")
    assert code == 2
    assert "No space left" in printed.err.splitlines()[-1]


@pytest.mark.parametrize("name", JOBS)
def test_a_backend_that_does_not_exist(run, monkeypatch, name):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "fastest")
    code, printed, _ = run(name)
    assert (code, printed.err.count("\n")) == (2, 1)
    assert "fastest" in printed.err


@pytest.mark.parametrize("name", JOBS)
def test_quick_sets_defaults_that_options_still_change(name, tmp_path):
    made = JOBS[name]._parser()
    line = ["--quick", "--steps", "7", "--out", str(tmp_path)]
    options = vars(command.parse_job(made, name, line, JOBS[name]._QUICK))
    assert options["steps"] == 7
    assert options["time_limit"] == JOBS[name]._QUICK["time_limit"]


@pytest.mark.parametrize("name", JOBS)
def test_help(capsys, name):
    with pytest.raises(SystemExit) as error:
        JOBS[name].main(["--help"])
    assert error.value.code == 0
    assert "--quick" in capsys.readouterr().out
