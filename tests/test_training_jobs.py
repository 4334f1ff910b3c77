"""The training jobs: their data, their yardsticks, and tiny runs through their command lines."""

import json
import sys
import token

import pytest
import torch
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


@pytest.fixture(autouse=True)
def _keep_torch_settings():
    """The jobs set torch's threads and seed for their whole process."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


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


# Data


def test_each_character_has_its_token_class():
    names = [tagger.CLASSES[i] for i in tagger.token_classes("if x:\n  y='a b' # c\n\x0c\nfor_ = 1.5\n").tolist()]
    assert names == [
        *["keyword"] * 2, "space", "name", "operator", "newline",
        *["space"] * 2, "name", "operator", *["string"] * 5, "space", *["comment"] * 3, "newline",
        "space", "newline",
        *["name"] * 4, "space", "operator", "space", *["number"] * 3, "newline",
    ]  # fmt: skip


def test_token_classes_agree_with_the_tokens_of_the_standard_library():
    """Every name, number and comment lies where tokenize saw it, form feeds and wide characters included."""
    source = tagger.standard_library().held_out
    classes = tagger.token_classes(source)
    text = "".join(
        character if c == tagger.CLASSES.index("number") else " " for character, c in zip(source, classes, strict=True)
    )
    assert text.split()
    assert all(number[0].isdigit() or number[0] == "." for number in text.split())
    starts = (classes == tagger.CLASSES.index("comment")) & (classes.roll(1) != classes)
    assert {source[i] for i in starts.nonzero().flatten().tolist()} == {"#"}


def test_f_strings_are_strings_on_every_python():
    classes = tagger.token_classes("x = f'ab{y}cd'\n")
    string = tagger.CLASSES.index("string")
    assert classes[4:8].tolist() == [string] * 4
    assert classes[11:14].tolist() == [string] * 3
    # From Python 3.12 on, what is in the braces is code.
    assert (classes[9] == string) != hasattr(token, "FSTRING_START")


@pytest.mark.parametrize("source", ["x = (\n", "if x:\n    y\n  z\n", "x = '''a\n"])
def test_what_is_no_python_is_refused(source):
    with pytest.raises(tagger.TextError, match="no Python source"):
        tagger.token_classes(source)


def test_windows_are_shuffled_whole_pieces():
    symbols = torch.arange(103)
    windows = tagger.Windows(symbols, symbols + 1000, 4, 5, seed=0)
    assert len(windows) == 5
    pieces = torch.cat([windows[number][0].t() for number in range(5)])
    assert sorted(pieces[:, 0].tolist()) == list(range(0, 100, 5))
    assert pieces[:, 0].tolist() != list(range(0, 100, 5))
    assert torch.equal(pieces - pieces[:, :1], torch.arange(5).expand(20, 5))
    assert torch.equal(windows[7][1], windows[2][0] + 1000)


def test_rates():
    classes = torch.tensor([0, 0, 0, 1])
    assert tagger.rates(torch.tensor([0, 0, 0, 0]), classes) == {"accuracy": 0.75, "recall": 0.5}
    assert tagger.rates(classes, classes) == {"accuracy": 1.0, "recall": 1.0}


@pytest.mark.parametrize("length", [2, 3, 50])
def test_sequences_have_a_mark_in_each_half(length):
    inputs, sums = adding.sequences(length, 64, 3)
    numbers, marks = inputs.unbind(2)
    assert inputs.shape == (length, 64, 2)
    assert marks[: length // 2].sum(0).eq(1).all()
    assert marks[length // 2 :].sum(0).eq(1).all()
    assert torch.equal(sums, (numbers * marks).sum(0))
    assert torch.equal(adding.sequences(length, 64, 3)[0], inputs)
    assert not torch.equal(adding.sequences(length, 64, 4)[0], inputs)


def test_who_answers_1_has_an_error_of_a_sixth():
    _, sums = adding.sequences(10, 20_000, 0)
    assert (sums - 1).square().mean().item() == pytest.approx(1 / 6, rel=0.03)


@pytest.mark.parametrize(("cell", "gates"), [("gru", 3), ("lstm", 4)])
def test_chrono_biases_spread_the_time_scales(cell, gates):
    model = adding.AddingModel(cell, 400, 1, 100, chrono=True)
    blocks = (model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0).detach().view(gates, 400)
    # A gate that keeps the share s forgets over 1 / (1 - s) steps.
    scales = 1 / (1 - blocks[1].sigmoid())
    assert scales.min() < 12
    assert 85 < scales.max() <= 100.01
    assert torch.equal(blocks[0], -blocks[1] if cell == "lstm" else torch.zeros(400))
    assert not blocks[2:].any()


def test_poolings():
    out = torch.randn(5, 3, 8)
    pool = {name: function for name, (_, _, function) in classifier.POOLINGS.items()}
    assert torch.equal(pool["last"](out), out[4])
    assert torch.equal(pool["mean"](out), out.sum(0) / 5)
    assert torch.equal(pool["ends"](out), torch.cat((out[0], out[4]), -1))


def test_digits_are_split_without_overlap():
    digits = classifier.Digits()
    (training, labels), (held_out, held_out_labels) = digits.training, digits.held_out
    assert training.shape == (64, 1437, 1)
    assert held_out.shape == (64, 360, 1)
    assert (training.mean().item(), training.std().item()) == pytest.approx((0, 1), abs=1e-3)
    assert min(torch.bincount(held_out_labels)) >= 34
    assert len(labels) == 1437
    assert 0.9 < digits.linear < 1
    assert digits.commonest == pytest.approx(0.1, abs=0.02)


# Gradients through time


@pytest.mark.parametrize("cell", gradient_flow.NAMES)
@pytest.mark.parametrize("length", [7, 250])
def test_norms_through_time_are_those_of_single_steps(cell, length):
    """Against plain autograd, step by step, of torch.nn's layer."""
    model = adding.AddingModel(cell, 5, 1, length, chrono=True).double()
    inputs, sums = (x.double() for x in adding.sequences(length, 3, 0))
    steps, norms = gradient_flow.norms_through_time(model, inputs, sums)
    assert (steps[0], steps[-1], len(steps) == len(norms) <= 101) == (0, length, True)

    zeros = torch.zeros(1, 3, 5, dtype=torch.float64, requires_grad=True)
    states = [(zeros, torch.zeros_like(zeros, requires_grad=True)) if cell == "lstm" else (zeros,)]
    for t in range(length):
        _, state = model.rnn(inputs[t : t + 1], states[-1] if cell == "lstm" else states[-1][0])
        states.append(state if cell == "lstm" else (state,))
    loss = (model.linear(states[-1][0][0])[:, 0] - sums).square().sum()
    for t, norm in zip(steps, norms, strict=True):
        gradients = torch.autograd.grad(loss, states[t], retain_graph=True, allow_unused=True)
        joint = torch.stack([g[0].square().sum(1) for g in gradients if g is not None]).sum(0).sqrt().mean().item()
        assert norm == pytest.approx(joint, rel=1e-9)


def test_norms_too_small_to_square_are_seen():
    assert gradient_flow._mean_norm([torch.full((1, 2, 4), 1e-200, dtype=torch.float64)]) == pytest.approx(2e-200)
    assert gradient_flow._mean_norm([torch.zeros(1, 2, 4)]) == 0


@pytest.mark.parametrize("cell", gradient_flow.NAMES)
def test_scaled_matrices_vanish_and_explode(cell):
    left = {}
    for radius in (0.5, 10):
        torch.manual_seed(0)
        model = adding.AddingModel(cell, 16, 1, 40, chrono=False)
        gradient_flow.scale_recurrent(model, radius)
        block = model.rnn.weight_hh_l0[-16:]
        assert torch.linalg.eigvals(block).abs().max().item() == pytest.approx(radius, rel=1e-4)
        _, norms = gradient_flow.norms_through_time(model.double(), *(x.double() for x in adding.sequences(40, 4, 0)))
        left[radius] = norms[0] / norms[-1]
    assert left[0.5] < 1e-5
    assert left[10] > 1e3


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

    monkeypatch.setattr(session, "write_json", full)
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
