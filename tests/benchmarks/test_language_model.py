"""The language model job: tiny runs through its command line."""

import json
import math
import statistics

import pytest
from jobs_support import keep_torch_settings  # noqa: F401, a fixture for every test
from matplotlib.image import imread

from benchmarks.training import language_model, trainer

# Files hold six digits.
DIGITS = 2e-5

TINY = "--hidden 12 --embedding 8 --batch 4 --bptt 9 --steps 12 --lr 0.03 --sample-length 30 --threads 1".split()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def name_{i % 7}(x): return {i % 11} + x\n" for i in range(120)), encoding="utf-8")
    return path


@pytest.fixture
def run(text, tmp_path, capsys):
    """Run the command line on the toy text; return the exit code, what it printed, and its JSON rows by provider."""

    def call(*arguments):
        try:
            code = language_model.main(["--text", str(text), "--out", str(tmp_path / "out"), *TINY, *arguments])
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        # An interrupted run writes beside the files of a whole one.
        path = tmp_path / "out" / f"language_model{'.partial' if code == 130 else ''}.json"
        rows = {row["provider"]: row for row in json.loads(path.read_text())} if path.exists() else {}
        return code, printed, rows

    return call


def _ratio(average, base, ours):
    return average(base["seconds"]) / average(ours["seconds"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cell", "lstm"],
        ["--cell", "gru", "--layers", "1"],
        ["--cell", "rnn_tanh", "--clip-value", "0.1"],
        ["--cell", "rnn_relu", "--tie-weights", "--embedding", "12"],
    ],
    ids=lambda arguments: arguments[1],
)
def test_both_trainings_coincide(run, tmp_path, arguments):
    code, printed, rows = run(*arguments)
    assert code == 0
    base, ours, trigram = rows["torch.nn"], rows["fused_rnn"], rows["trigram"]
    assert len(base["losses"]) == len(ours["losses"]) == len(base["seconds"]) == len(ours["seconds"]) == 12
    # float32 rounding, carried through 12 steps of Adam; 5e-7 was measured.
    assert ours["losses"] == pytest.approx(base["losses"], abs=1e-5)
    assert ours["held_out_loss"] == pytest.approx(base["held_out_loss"], abs=1e-5)
    assert base["losses"][-1] < base["losses"][0]
    assert ours["perplexity"] == pytest.approx(math.exp(ours["held_out_loss"]), rel=DIGITS)
    assert 1 < trigram["perplexity"] < 30
    assert ours["characters_per_second"] == pytest.approx(12 * 36 / sum(ours["seconds"]), rel=DIGITS)
    assert ours["speed_up"] == pytest.approx(_ratio(statistics.median, base, ours), rel=DIGITS)
    assert ours["total_speed_up"] == pytest.approx(_ratio(sum, base, ours), rel=DIGITS)
    for row in (base, ours):
        assert 0 < row["rnn_seconds"] < row["median_seconds"]
        assert row["median_seconds"] == pytest.approx(statistics.median(row["seconds"]), rel=DIGITS)
        assert row["rnn_seconds"] + row["other_seconds"] == pytest.approx(row["median_seconds"], rel=DIGITS)
    assert ours["backend"]
    assert {"python", "torch", "fused_rnn"} <= set(ours["versions"])
    assert ours["date"]
    assert ours["cpu"]
    assert ours["torch_isa"]
    assert "commit" in ours
    # Where on this machine files lie is nobody's business.
    assert str(tmp_path) not in (tmp_path / "out" / "language_model.json").read_text()
    for words in ("torch.nn", "fused_rnn", "trigram", "speed-up", "characters per second", "held-out perplexity"):
        assert words in printed.out
    assert f"{trigram['perplexity']:.3f}" in printed.out
    assert "def " + ours["sample"] in printed.out
    assert len(ours["sample"]) == 30
    assert imread(tmp_path / "out" / "language_model.png").std() > 0.02


def test_the_same_seed_gives_the_same_training(run):
    first, again, other = run()[2], run()[2], run("--seed", "1")[2]
    assert first["fused_rnn"]["losses"] == again["fused_rnn"]["losses"]
    assert first["fused_rnn"]["sample"] == again["fused_rnn"]["sample"]
    assert first["fused_rnn"]["losses"] != other["fused_rnn"]["losses"]


def test_dropout_trains_and_is_off_in_evaluation(run):
    code, _, rows = run("--dropout", "0.3")
    assert code == 0
    assert all(math.isfinite(loss) for loss in rows["fused_rnn"]["losses"])


def test_both_clippings_change_the_training(run):
    plain = run("--clip-norm", "0")[2]["fused_rnn"]["losses"]
    by_norm = run("--clip-norm", "0.01")[2]["fused_rnn"]["losses"]
    by_value = run("--clip-value", "0.001")[2]["fused_rnn"]["losses"]
    assert plain[0] == by_norm[0] == by_value[0]
    assert len({plain[-1], by_norm[-1], by_value[-1]}) == 3


def test_ctrl_c_prints_the_table_so_far(run, monkeypatch, tmp_path):
    step, calls = trainer.Contender.step, []

    def interrupted(self, batch):
        calls.append(self.name)
        # Two steps of warming up, then six steps of training.
        if len(calls) == 9:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(trainer.Contender, "step", interrupted)
    code, printed, rows = run()
    assert code == 130
    assert "Ctrl-C" in printed.out
    assert "speed-up" in printed.out
    assert "Traceback" not in printed.err
    assert len(rows["torch.nn"]["losses"]) == 6
    assert rows["torch.nn"]["held_out_loss"] is None
    assert rows["torch.nn"]["outcome"] == "interrupted"


def test_ctrl_c_keeps_the_files_of_an_earlier_run(run, monkeypatch, tmp_path):
    run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(language_model, "evaluate", interrupted)
    code, printed, _ = run("--seed", "1")
    assert code == 130
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"language_model.json", "language_model.png"}
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"language_model.partial.json", "language_model.partial.png"}
    assert "language_model.partial.json" in printed.out


def test_ctrl_c_after_the_training_keeps_the_figures(run, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(language_model, "evaluate", interrupted)
    code, printed, rows = run()
    assert code == 130
    assert "speed-up" in printed.out
    assert len(rows["fused_rnn"]["losses"]) == 12


def test_ctrl_c_before_the_training(run, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(language_model, "from_file", interrupted)
    code, printed, _ = run()
    assert code == 130
    assert printed.err == "interrupted\n"


def test_time_limit_ends_the_training_between_blocks(run):
    code, printed, rows = run("--time-limit", "1e-9")
    assert code == 0
    assert "--time-limit" in printed.out
    assert rows["fused_rnn"]["outcome"] == "time limit"
    assert rows["fused_rnn"]["losses"] == []


def test_a_loss_that_is_not_finite_ends_the_training(run):
    code, printed, rows = run("--lr", "1000", "--cell", "rnn_relu", "--clip-norm", "0", "--steps", "60", "--layers", "6")
    assert code == 1
    assert "not finite" in printed.out
    assert (rows["torch.nn"]["losses"][-1], rows["torch.nn"]["outcome"]) == (None, "diverged")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cell", "transformer"], "transformer"),
        (["--hidden", "0"], "--hidden"),
        (["--hidden", "many"], "--hidden"),
        (["--layers", "-1"], "--layers"),
        (["--embedding", "1.5"], "--embedding"),
        (["--batch", "0"], "--batch"),
        (["--bptt", "0"], "--bptt"),
        (["--steps", "0"], "--steps"),
        (["--lr", "0"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--clip-norm", "-1"], "--clip-norm"),
        (["--clip-value", "0"], "--clip-value"),
        (["--dropout", "1"], "--dropout"),
        (["--seed", "-1"], "--seed"),
        (["--threads", "0"], "--threads"),
        (["--temperature", "0"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--top-k", "-1"], "--top-k"),
        (["--sample-length", "-1"], "--sample-length"),
        (["--time-limit", "-1"], "--time-limit"),
        (["--prompt", ""], "--prompt"),
        (["--tie-weights"], "--embedding equal to --hidden"),
        (["--batch", "100000"], "too short"),
        (["--hidden", "1000000"], "GiB"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_options_get_one_line_and_exit_code_2(run, arguments, words):
    code, printed, _ = run(*arguments)
    assert code == 2
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"abcab", "too short"),
        (b"caf\xe9" * 100, "not UTF-8 text: byte 0xe9 at position 3"),
        ("".join(map(chr, range(32, 900))).encode(), "occurs twice"),
    ],
    ids=["missing", "empty", "short", "undecodable", "no character twice"],
)
def test_wrong_texts_get_one_line_and_exit_code_2(run, tmp_path, content, words):
    path = tmp_path / "other.txt"
    if content is not None:
        path.write_bytes(content)
    code, printed, _ = run("--text", str(path))
    assert code == 2
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_a_folder_is_no_text(run, tmp_path):
    code, printed, _ = run("--text", str(tmp_path))
    assert code == 2
    assert printed.err.count("\n") == 1


def test_output_folder_that_cannot_be_made(run, text):
    code, printed, _ = run("--out", str(text))
    assert code == 2
    assert printed.err.count("\n") == 1
    assert "--out" in printed.err


def test_a_backend_that_does_not_exist(run, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "fastest")
    code, printed, _ = run()
    assert code == 2
    assert printed.err.count("\n") == 1
    assert "fastest" in printed.err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as error:
        language_model.main(["--help"])
    assert error.value.code == 0
    assert "--clip-value" in capsys.readouterr().out
