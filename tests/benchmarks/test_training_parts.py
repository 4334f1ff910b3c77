"""The parts of the training jobs: the character model and its samples, the race of two trainings, its clock and picture."""

import collections
import math

import pytest
import torch
from jobs_support import keep_torch_settings  # noqa: F401, a fixture for every test
from matplotlib.image import imread

from benchmarks.training import breakdown, trainer
from benchmarks.training.model import CELLS, CharacterModel, evaluate, generate, sample
from benchmarks.training.plots import moving_mean, plot_race
from benchmarks.training.text import Streams, Vocabulary

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
