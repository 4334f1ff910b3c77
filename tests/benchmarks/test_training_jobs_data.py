"""The training jobs' data, models and yardsticks, and the gradients' norms through time."""

import token

import pytest
import torch

from benchmarks.training import adding, classifier, gradient_curves, tagger

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


@pytest.mark.parametrize("cell", gradient_curves.NAMES)
@pytest.mark.parametrize("length", [7, 250])
def test_norms_through_time_are_those_of_single_steps(cell, length):
    """Against plain autograd, step by step, of torch.nn's layer."""
    model = adding.AddingModel(cell, 5, 1, length, chrono=True).double()
    inputs, sums = (x.double() for x in adding.sequences(length, 3, 0))
    steps, norms = gradient_curves.norms_through_time(model, inputs, sums)
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
    assert gradient_curves._mean_norm([torch.full((1, 2, 4), 1e-200, dtype=torch.float64)]) == pytest.approx(2e-200)
    assert gradient_curves._mean_norm([torch.zeros(1, 2, 4)]) == 0


@pytest.mark.parametrize("cell", gradient_curves.NAMES)
def test_scaled_matrices_vanish_and_explode(cell):
    left = {}
    for radius in (0.5, 10):
        torch.manual_seed(0)
        model = adding.AddingModel(cell, 16, 1, 40, chrono=False)
        gradient_curves.scale_recurrent(model, radius)
        block = model.rnn.weight_hh_l0[-16:]
        assert torch.linalg.eigvals(block).abs().max().item() == pytest.approx(radius, rel=1e-4)
        _, norms = gradient_curves.norms_through_time(model.double(), *(x.double() for x in adding.sequences(40, 4, 0)))
        left[radius] = norms[0] / norms[-1]
    assert left[0.5] < 1e-5
    assert left[10] > 1e3
