"""Whole models as libraries write them over torch.nn, trained before, during and after their conversion."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from tolerances import assert_close_to_reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fused_rnn
from fused_rnn.kernels import dispatch

DTYPES = [torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


class Tagger(nn.Module):
    """Embedding → bidirectional LSTM over packed sentences → a tag for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 7, padding_idx=0)
        self.rnn = nn.LSTM(7, 9, num_layers=2, bidirectional=True, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.tags = nn.Linear(18, 5)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(words), lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.tags(self.dropout(out))

    def loss(self, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        lengths = torch.tensor([4, 9, 1, 6, 9])
        words = pad_sequence([torch.randint(1, 23, (int(n),), generator=draw) for n in lengths], batch_first=True)
        logits = self(words, lengths)
        return F.cross_entropy(logits.flatten(0, 1), (words % 5).masked_fill(words == 0, -100).flatten())


class Crnn(nn.Module):
    """Convolutions over the picture of a line → bidirectional LSTMs along it → CTC over its characters."""

    class Recurrent(nn.Module):
        def __init__(self, features: int, hidden: int, out: int) -> None:
            super().__init__()
            self.rnn = nn.LSTM(features, hidden, bidirectional=True)
            self.embedding = nn.Linear(2 * hidden, out)

        def forward(self, input: Tensor) -> Tensor:
            return self.embedding(self.rnn(input)[0])

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.rnn = nn.Sequential(self.Recurrent(6 * 4, 11, 8), self.Recurrent(8, 7, 6))

    def forward(self, picture: Tensor) -> Tensor:
        columns = self.cnn(picture).flatten(1, 2).permute(2, 0, 1)
        return self.rnn(columns).log_softmax(-1)

    def loss(self, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        dtype = self.cnn[0].weight.dtype
        picture = torch.rand(3, 1, 8, 30, generator=draw, dtype=torch.float64).to(dtype)
        targets = torch.randint(1, 6, (3, 4), generator=draw)
        return F.ctc_loss(self(picture), targets, torch.tensor([15, 15, 12]), torch.tensor([4, 2, 3]))


class Seq2Seq(nn.Module):
    """A bidirectional GRU reads packed sentences, a cell writes the answer with attention over what was read."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(17, 6), nn.Embedding(13, 8)
        self.encoder = nn.GRU(6, 5, bidirectional=True)
        self.bridge = nn.Linear(10, 8)
        self.decoder = nn.ModuleDict({"cell": cell(8 + 8, 8)})
        self.read = nn.Linear(10, 8, bias=False)
        self.mix = nn.Linear(16, 8)
        self.predict = nn.Linear(8, 13)
        self.predict.weight = self.target.weight

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.source(source), lengths, enforce_sorted=False)
        packed, last = self.encoder(packed)
        memory = self.read(pad_packed_sequence(packed)[0])  # (S, N, 8)
        padding = torch.arange(len(memory)).unsqueeze(1) >= lengths  # (S, N)
        h = torch.tanh(self.bridge(last.transpose(0, 1).flatten(1)))
        c, context, logits = torch.zeros_like(h), torch.zeros_like(h), []
        for word in target:
            input = torch.cat((self.target(word), context), 1)
            cell = self.decoder["cell"]
            if isinstance(cell, (nn.LSTMCell, fused_rnn.LSTMCell)):
                h, c = cell(input, (h, c))
            else:
                h = cell(input, h)
            scores = (memory * h).sum(-1).masked_fill(padding, -torch.inf).softmax(0)
            context = torch.tanh(self.mix(torch.cat(((scores.unsqueeze(-1) * memory).sum(0), h), 1)))
            logits.append(self.predict(context))
        return torch.stack(logits)

    def loss(self, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        source = torch.randint(17, (7, 4), generator=draw)
        target = torch.randint(13, (6, 4), generator=draw)
        logits = self(source, torch.tensor([3, 7, 1, 7]), target[:-1])
        return F.cross_entropy(logits.flatten(0, 1), target[1:].flatten())


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "tagger": (Tagger, 1),
    "crnn": (Crnn, 2),
    "seq2seq with GRUCell": (functools.partial(Seq2Seq, nn.GRUCell), 2),
    "seq2seq with LSTMCell": (functools.partial(Seq2Seq, nn.LSTMCell), 2),
    "seq2seq with RNNCell": (functools.partial(Seq2Seq, nn.RNNCell), 2),
}
models = pytest.mark.parametrize("name", MODELS)


def _make(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name][0]().double().to(dtype)


def _train(name: str, dtype: torch.dtype, changes: dict[int, Callable[[nn.Module], nn.Module]]) -> dict[str, Tensor]:
    """Train some steps, changing the model before some of them; return all losses, gradients and the state at the end."""
    model, result = _make(name, dtype), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(6):
        changes.get(step, lambda model: model)(model)
        optimizer.zero_grad()
        torch.manual_seed(step)
        result[f"loss {step}"] = loss = model.loss(step % 2)
        loss.backward()
        result |= {f"gradient {step} of {key}": value.grad.clone() for key, value in model.named_parameters()}
        optimizer.step()
    state = model.state_dict()
    return result | {key: value for key, value in state.items() if value.is_floating_point()}


_plain = functools.cache(functools.partial(_train, changes={}))


@dtypes
@models
def test_training_through_conversion_and_back(name: str, dtype: torch.dtype) -> None:
    """One optimizer, made before the conversion, trains the model as torch.nn would, before, during and after it."""
    report: list[fused_rnn.Conversion] = []
    changes = {1: lambda model: fused_rnn.convert(model, report), 4: lambda model: fused_rnn.revert(model, report)}
    actual = _train(name, dtype, changes)
    assert len(report) == 2 * MODELS[name][1]
    assert all(row.reason is None for row in report)
    expected, reference = _plain(name, dtype), _plain(name, torch.float64)
    assert actual.keys() == expected.keys()
    assert actual["loss 5"] < actual["loss 1"]
    for key, value in actual.items():
        assert_close_to_reference(value, expected[key], reference[key], key)


@models
def test_frozen_parts_stay_frozen(name: str) -> None:
    """What requires no gradient gets none, and what lies below still does."""
    model = _make(name, torch.float32)
    for module in model.modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCell, nn.GRUCell, nn.LSTMCell)):
            module.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    fused = fused_rnn.convert(copy.deepcopy(model))
    assert [parameter.requires_grad for parameter in fused.parameters()] == flags
    for each in (model, fused):
        torch.manual_seed(0)
        each.loss(0).backward()
    for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


# The reentrant kind sees no tensors inside of a PackedSequence or a pair of states.
@pytest.mark.parametrize(("name", "use_reentrant"), [*((name, False) for name in MODELS), ("crnn", True)])
def test_activation_checkpointing(name: str, use_reentrant: bool) -> None:
    """A forward that is thrown away and computed again in the backward gives the same bits."""

    def gradients(again: bool) -> dict[str, Tensor]:
        model = fused_rnn.convert(_make(name, torch.float32))
        if again:
            for module in model.modules():
                if type(module).__module__.startswith("fused_rnn.") or type(module) is Crnn.Recurrent:
                    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=use_reentrant)
        torch.manual_seed(0)
        model.loss(0).backward()
        return {key: parameter.grad for key, parameter in model.named_parameters()}

    backend = dispatch.choose(torch.device("cpu"))
    with mock.patch.object(backend, "forward", side_effect=backend.forward) as forward:
        expected = gradients(False)
        calls = forward.call_count
        torch.testing.assert_close(gradients(True), expected, rtol=0, atol=0)
    assert forward.call_count > 2 * calls


def test_checkpointed_segments_with_dropout() -> None:
    """The second forward draws the masks of the first."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(fused_rnn.GRU(6, 6, 2, dropout=0.5), First()) for _ in range(4)))
    input, gradients = torch.randn(5, 3, 6), []
    for run in (model, lambda input: checkpoint_sequential(model, 2, input, use_reentrant=False)):
        torch.manual_seed(1)
        model.zero_grad()
        run(input).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


def test_saved_tensors_go_through_hooks() -> None:
    """As offloading does: what the backward needs is handed over and fetched again."""

    def take(tensor: Tensor) -> Tensor:
        taken.append(tensor)
        return tensor.clone()

    taken: list[Tensor] = []
    model = fused_rnn.convert(_make("tagger", torch.float32)).eval()
    model.loss(0).backward()
    expected = {key: value.grad.clone() for key, value in model.named_parameters()}
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(take, lambda tensor: tensor):
        loss = model.loss(0)
    loss.backward()
    assert taken
    torch.testing.assert_close({key: value.grad for key, value in model.named_parameters()}, expected, rtol=0, atol=0)
