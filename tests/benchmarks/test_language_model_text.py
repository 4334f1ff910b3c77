"""The language model's text: its parts, its symbols, its batches, and the trigram that it is compared with."""

import math

import pytest
import torch

from benchmarks.training.markov import Trigram
from benchmarks.training.text import (
    STANDARD_LIBRARY,
    UNKNOWN,
    Streams,
    TextError,
    Vocabulary,
    from_file,
    standard_library,
)

# Text


def test_standard_library_text_is_there_and_its_parts_are_whole_files():
    text = standard_library()
    assert len(text.training) > 2_000_000
    assert 0.02 < len(text.held_out) / len(text.training) < 0.2
    assert sorted(STANDARD_LIBRARY, key=lambda name: name + ".py") == STANDARD_LIBRARY
    assert len(set(STANDARD_LIBRARY)) == len(STANDARD_LIBRARY)


def test_standard_library_splits_by_position(tmp_path):
    for name in STANDARD_LIBRARY:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (tmp_path / f"{STANDARD_LIBRARY[0]}.py").unlink()
    text = standard_library(tmp_path)
    held_out = STANDARD_LIBRARY[10::20]
    assert text.held_out == "".join(f"# {name}\n" for name in held_out)
    assert text.training == "".join(f"# {name}\n" for name in STANDARD_LIBRARY[1:] if name not in held_out)
    assert f"{len(STANDARD_LIBRARY) - 1} of {len(STANDARD_LIBRARY)}" in text.name


def test_standard_library_without_source(tmp_path):
    with pytest.raises(TextError, match="--text"):
        standard_library(tmp_path)


def test_file_is_cut_once(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffábc\r\n".encode() + b"0123456789" * 10)
    text = from_file(path)
    assert text.training + text.held_out == "ábc\n" + "0123456789" * 10
    assert len(text.held_out) == 10


def test_vocabulary_maps_rare_characters_to_the_unknown_symbol():
    vocabulary = Vocabulary("aabbz")
    assert vocabulary.symbols == [UNKNOWN, "a", "b"]
    assert vocabulary.encode("abz?").tolist() == [1, 2, 0, 0]
    assert vocabulary.decode([1, 2, 0]) == f"ab{UNKNOWN}"


def test_vocabulary_of_a_long_text_leaves_out_more():
    assert Vocabulary("a" * 300_000 + "zz").symbols == [UNKNOWN, "a"]


@pytest.mark.parametrize(("length", "batch", "bptt"), [(101, 4, 5), (100, 4, 5), (64, 3, 7), (21, 4, 5), (500, 1, 13)])
def test_streams_cover_the_text_in_order(length, batch, bptt):
    symbols = torch.arange(length)
    streams = Streams(symbols, batch, bptt)
    segments = [streams.segment(step) for step in range(len(streams))]
    inputs = torch.cat([segment[0] for segment in segments])
    targets = torch.cat([segment[1] for segment in segments])
    kept = (length - 1) // batch // bptt * bptt
    assert all(segment[0].shape == (bptt, batch) for segment in segments)
    for column in range(batch):
        # One stream begins where the last one ends: only the end of the text is left out.
        assert inputs[:, column].tolist() == list(range(column * kept, (column + 1) * kept))
    assert torch.equal(targets, inputs + 1)
    assert [segment[2] for segment in segments] == [True] + [False] * (len(segments) - 1)
    assert streams.characters == inputs.numel()


def test_streams_begin_another_epoch():
    streams = Streams(torch.arange(50), 2, 8)
    again = streams.segment(len(streams))
    assert torch.equal(again[0], streams.segment(0)[0])
    assert again[2]


@pytest.mark.parametrize(("length", "batch", "bptt"), [(101, 4, 7), (10, 1, 20), (23, 3, 7)])
def test_ragged_streams_leave_out_less_than_one_character_a_stream(length, batch, bptt):
    streams = Streams(torch.arange(length), batch, bptt, ragged=True)
    inputs = torch.cat([streams.segment(step)[0] for step in range(len(streams))])
    assert sorted(inputs.flatten().tolist()) == list(range(streams.characters))
    assert length - 1 - streams.characters < batch


def test_streams_refuse_a_text_shorter_than_one_batch():
    Streams(torch.arange(21), 4, 5)
    with pytest.raises(TextError, match="takes 21 characters, 20 are there"):
        Streams(torch.arange(20), 4, 5)


# Trigram


def _brute_force(fitted, size, context, symbol):
    """Witten-Bell probability of a symbol after a context, by counting over the text again for every question."""
    if context is None:
        return 1 / size
    order = len(context)
    successors = [fitted[i + order] for i in range(len(fitted) - order) if tuple(fitted[i : i + order]) == context]
    shorter = _brute_force(fitted, size, context[1:] if order else None, symbol)
    if not successors:
        return shorter
    kinds = len(set(successors))
    return (successors.count(symbol) + kinds * shorter) / (len(successors) + kinds)


def test_trigram_equals_brute_force_counts():
    size = 7
    generator = torch.Generator().manual_seed(3)
    fitted = torch.randint(5, (60,), generator=generator)
    # Symbols 5 and 6 and some contexts never occur in the fitted text.
    judged = torch.randint(size, (80,), generator=generator)
    found = Trigram(fitted, size).log_probability(judged)
    symbols, text = judged.tolist(), fitted.tolist()
    wanted = [math.log(_brute_force(text, size, tuple(symbols[max(0, i - 2) : i]), symbols[i])) for i in range(1, 80)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


def test_trigram_is_a_distribution():
    size = 6
    model = Trigram(torch.tensor([0, 1, 2, 0, 1, 3, 0, 1, 2, 4]), size)
    for context in ([0, 1], [1, 2], [5, 5], [4, 0]):
        probabilities = [model.log_probability(torch.tensor([*context, s]))[-1].exp().item() for s in range(size)]
        assert sum(probabilities) == pytest.approx(1, rel=1e-12)
        assert min(probabilities) > 0


@pytest.mark.parametrize("length", [1, 2, 3])
def test_trigram_of_almost_no_text(length):
    assert torch.isfinite(Trigram(torch.zeros(length, dtype=torch.int64), 3).log_probability(torch.tensor([1, 0, 0, 2]))).all()
