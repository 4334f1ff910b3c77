"""The peer that compiles torch.nn's recurrent layers with allow_rnn."""

import pytest
import torch
from benchmarks_support import assert_right

from benchmarks.cases import Case, Shape
from benchmarks.peers import compiling, torch_nn


@pytest.mark.skipif(compiling.unavailable() is not None, reason=str(compiling.unavailable()))
@pytest.mark.parametrize(
    ("cell", "mode", "options"),
    [
        ("lstm", "inference", {}),
        ("gru", "inference", {"bidirectional": True}),
        ("lstm", "inference", {"resets": 2}),
        ("rnn", "training", {}),
    ],
)
def test_layers_allowed_under_torch_compile_are_compiled_and_compute_the_same(cell, mode, options):
    torch._dynamo.utils.counters.clear()
    assert_right("torch-allow-rnn", Case(cell, Shape(2, 2, 4, 5, "test"), mode, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.config.allow_rnn


@pytest.mark.parametrize(
    ("options", "steps", "reason"),
    [
        ({}, torch_nn.MOST_UNROLLED + 1, "unrolls"),
        ({"ragged": True}, 3, "PackedSequence"),
        ({"padded": True}, 3, "PackedSequence"),
        ({"loop": "cell"}, 3, "cells"),
        ({"num_layers": 2, "dropout": 0.5}, 3, "dropout"),
    ],
    ids=str,
)
def test_layers_allowed_under_torch_compile_refuse(options, steps, reason):
    assert reason in torch_nn.ALLOWED.refuses(Case("gru", Shape(2, steps, 3, 4, "test"), "training", **options))


def test_resets_are_compiled_for_one_step():
    shape = Shape(2, torch_nn.MOST_UNROLLED + 1, 3, 4, "test")
    assert torch_nn.ALLOWED.refuses(Case("gru", shape, "training", resets=4)) is None
