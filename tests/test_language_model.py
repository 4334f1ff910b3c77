"""The language model job: its model, its training loop, and tiny runs through its command line."""

import collections
import json
import math
import statistics

import pytest
import torch
from matplotlib.image import imread

from benchmarks.training import breakdown, language_model, trainer
from benchmarks.training.model import CELLS, CharacterModel, evaluate, generate, sample
from benchmarks.training.plots import moving_mean, plot_race
from benchmarks.training.text import Streams, Vocabulary

TINY = "--hidden 12 --embedding 8 --batch 4 --bptt 9 --steps 12 --lr 0.03 --sample-length 30 --threads 1".split()


@pytest.fixture(autouse=True)
def _keep_torch_settings():
    """The job sets torch's threads and seed for its whole process."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


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


# Model, evaluation, samples


def _model(size, cell="gru", tie_weights=False):
    torch.manual_seed(0)
    return CharacterModel(cell, size, 5, 5, 2, 0.0, tie_weights=tie_weights)


@pytest.mark.parametrize("cell", CELLS)
def test_evaluation_carries_the_state(cell):
    """Segments of any length give the loss of one long segment."""
    model, symbols = _model(6, cell), torch.randint(6, (101,), generator=torch.Generator().manual_seed(1))
    whole = evaluate(model, Streams(symbols, 2, 50, ragged=True))
    assert evaluate(model, Streams(symbols, 2, 7, ragged=True)) == pytest.approx(whole, rel=1e-5)


def test_tied_weights_are_one_parameter():
    tied, loose = _model(6, tie_weights=True), _model(6)
    assert tied.linear.weight is tied.embedding.weight
    assert sum(p.numel() for p in loose.parameters()) - sum(p.numel() for p in tied.parameters()) == 30


def test_generation_is_deterministic_under_its_seed():
    vocabulary = Vocabulary("abcdef" * 3)
    model = _model(len(vocabulary))
    style = {"temperature": 1.0, "top_k": 0}
    first = generate(model, vocabulary, "ab", 40, seed=1, **style)
    torch.rand(5)
    assert generate(model, vocabulary, "ab", 40, seed=1, **style) == first
    assert generate(model, vocabulary, "ab", 40, seed=2, **style) != first
    assert set(first) <= set("abcdef")
    assert len(first) == 40


@pytest.mark.parametrize("cell", CELLS)
def test_streaming_with_top_k_1_equals_argmax_over_the_whole_text(cell):
    """The state carried from step to step stands for the whole prefix."""
    vocabulary = Vocabulary("abcdef" * 3)
    model = _model(len(vocabulary), cell)
    written = generate(model, vocabulary, "abc", 15, temperature=3.0, top_k=1, seed=0)
    prefix = "abc"
    for character in written:
        with torch.no_grad():
            logits, _ = model(vocabulary.encode(prefix).unsqueeze(1))
        assert character == vocabulary.symbols[1 + int(logits[-1, 0, 1:].argmax())]
        prefix += character


def test_sample_follows_top_k_and_temperature():
    logits = torch.tensor([9.0, 0.0, 1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)

    def draw(temperature, top_k):
        return collections.Counter(sample(logits, temperature, top_k, generator) for _ in range(600))

    assert set(draw(1.0, 2)) == {3, 4}
    assert set(draw(50.0, 0)) == {1, 2, 3, 4}
    assert draw(0.01, 0) == {4: 600}
    share = draw(1.0, 2)[4] / 600
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.08)
    assert set(draw(1.0, 100)) <= {1, 2, 3, 4}


# Training


def test_clipping():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, -4.0])
    trainer.Settings(1, 0.1).clip([parameter])
    assert parameter.grad.tolist() == [3, -4]
    trainer.Settings(1, 0.1, clip_value=3.5).clip([parameter])
    assert parameter.grad.tolist() == [3, -3.5]
    parameter.grad = torch.tensor([3.0, -4.0])
    trainer.Settings(1, 0.1, clip_norm=1).clip([parameter])
    assert parameter.grad.tolist() == pytest.approx([0.6, -0.8], rel=1e-4)


def test_learning_rate_rises_and_falls():
    settings = trainer.Settings(steps=100, lr=2.0)
    rates = [settings.lr_at(step) for step in range(100)]
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(max(rates[28:31]))
    assert 0.1 <= rates[-1] < 0.11
    assert rates[40:] == sorted(rates[40:], reverse=True)


def test_race_gives_both_the_same_batches_in_turns():
    seen = []

    def contender(name):
        def loss_of(model, batch, carry):
            assert carry == (batch - 1 if batch else None)
            seen.append((name, batch))
            return model.weight.sum(), batch

        return trainer.Contender(name, torch.nn.Linear(1, 1, bias=False), loss_of, settings)

    settings = trainer.Settings(steps=5, lr=0.1, block=2)
    both = [contender("a"), contender("b")]
    assert trainer.race(both, lambda step: step, settings) is trainer.Outcome.FINISHED
    warm_up, taken = seen[:2], seen[2:]
    assert warm_up == [("a", 0), ("b", 0)]
    assert taken == [
        *[("a", 0), ("a", 1), ("b", 0), ("b", 1)],
        *[("b", 2), ("b", 3), ("a", 2), ("a", 3)],
        *[("a", 4), ("b", 4)],
    ]
    assert [len(c.seconds) for c in both] == [5, 5]


def test_one_held_up_step_does_not_change_the_speed_up():
    base, ours = (trainer.Contender(n, torch.nn.Linear(1, 1), None, trainer.Settings(1, 0.1)) for n in ("base", "ours"))
    assert trainer.speed_up(base, ours) is None
    base.seconds, ours.seconds = [0.3] * 9, [0.2] * 9
    assert trainer.speed_up(base, ours) == pytest.approx(1.5)
    assert not trainer.disturbed(base, ours)
    base.seconds[4] = 60.0
    assert trainer.speed_up(base, ours) == pytest.approx(1.5)
    assert trainer.total_speed_up(base, ours) == pytest.approx(62.4 / 1.8)
    assert trainer.disturbed(base, ours)


@pytest.mark.parametrize("wanted", [True, False], ids=["embedded", "plain"])
@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.LSTM])
def test_recurrent_clock_counts_the_layers_alone(kind, wanted, monkeypatch):
    """With a clock that only moves where the test says: what is before and after the layer does not count."""
    now = [0.0]
    monkeypatch.setattr(breakdown.time, "perf_counter", lambda: now[0])

    class Taking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forward, backward):
            now[0] += forward
            ctx.backward = backward
            return x.clone()

        @staticmethod
        def backward(ctx, d_x):
            now[0] += ctx.backward
            return d_x, None, None

    class Layer(kind):
        def forward(self, x):
            out, state = super().forward(x)
            return Taking.apply(out, 7.0, 3.0), state

    layer = Layer(3, 4)
    clock = breakdown.RecurrentClock(torch.nn.ModuleList([layer]))
    x = torch.randn(5, 2, 3, requires_grad=wanted)
    for _ in range(2):
        with clock:
            out, _ = layer(Taking.apply(x, 100.0, 200.0))
            Taking.apply(out, 400.0, 800.0).sum().backward()
        assert clock.seconds == 10.0
    with clock:
        layer(x)
    assert clock.seconds == 7.0
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_moving_mean():
    assert moving_mean([1, 2, 3, 6], 2) == [1.5, 2.5, 4.5]
    assert moving_mean([1, 2], 1) == [1, 2]


# The command line


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
    assert ours["perplexity"] == pytest.approx(math.exp(ours["held_out_loss"]))
    assert 1 < trigram["perplexity"] < 30
    assert ours["characters_per_second"] == pytest.approx(12 * 36 / sum(ours["seconds"]))
    assert ours["speed_up"] == pytest.approx(statistics.median(base["seconds"]) / statistics.median(ours["seconds"]))
    assert ours["total_speed_up"] == pytest.approx(sum(base["seconds"]) / sum(ours["seconds"]))
    for row in (base, ours):
        assert 0 < row["rnn_seconds"] < row["median_seconds"] == statistics.median(row["seconds"])
        assert row["rnn_seconds"] + row["other_seconds"] == pytest.approx(row["median_seconds"])
    assert ours["backend"]
    assert {"python", "torch", "fused_rnn"} <= set(ours["versions"])
    assert ours["date"]
    assert ours["device"]
    for words in ("torch.nn", "fused_rnn", "trigram", "speed-up", "characters per second", "held-out perplexity"):
        assert words in printed.out
    assert f"{trigram['perplexity']:.3f}" in printed.out
    assert "def " + ours["sample"] in printed.out
    assert len(ours["sample"]) == 30
    assert imread(tmp_path / "out" / "language_model.png").std() > 0.02


def test_picture_shows_both_curves(tmp_path):
    path = tmp_path / "race.png"
    base, ours = (trainer.Contender(n, torch.nn.Linear(1, 1), None, trainer.Settings(1, 0.1)) for n in ("base", "ours"))
    base.losses = ours.losses = [3 / (1 + step / 9) for step in range(100)]
    base.seconds, ours.seconds = [0.2] * 100, [0.1] * 100
    plot_race(path, "title", base, ours, {"level": 1.0})
    picture = imread(path)
    assert picture.shape[0] > 400
    assert picture.shape[1] > 800
    # Both halves hold ink of the blue line and of the orange one.
    red, green, blue = (picture[..., channel] for channel in range(3))
    for half in (slice(0, picture.shape[1] // 2), slice(picture.shape[1] // 2, None)):
        assert ((blue - red)[:, half] > 0.3).sum() > 200
        assert ((red - blue)[:, half] > 0.3).sum() > 200
    assert green.min() < 0.5


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
