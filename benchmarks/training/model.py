"""A character-level language model, its loss, its evaluation and its samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training.text import Streams, Vocabulary

State = Any  # a tensor, an (h, c) pair, or None for zeros: what the recurrent layer takes and returns

_LAYERS: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}
CELLS = tuple(_LAYERS)


def recurrent(cell: str, input_size: int, hidden_size: int, layers: int = 1, **options: Any) -> nn.Module:
    """Make torch.nn's layers of a cell, one of ``CELLS``; ``options`` as dropout, bidirectional."""
    if cell not in _LAYERS:
        raise ValueError(f"cell: expected one of {', '.join(_LAYERS)}, got {cell!r}")
    kind, own = _LAYERS[cell]
    return kind(input_size, hidden_size, layers, **own, **options)


class CharacterModel(nn.Module):
    """Embedding → recurrent layers → linear, one prediction of the next symbol per character.

    The recurrent layers are torch.nn's; ``fused_rnn.convert`` replaces them.

    Args:
        cell: one of ``CELLS``.
        size: the number of symbols.
        dropout: applied to the embedding, between the layers and before the linear.
        tie_weights: the linear layer uses the embedding's matrix; needs embedding == hidden.
    """

    def __init__(
        self, cell: str, size: int, embedding: int, hidden: int, layers: int, dropout: float, *, tie_weights: bool
    ) -> None:
        super().__init__()
        if tie_weights and embedding != hidden:
            raise ValueError(f"tie_weights: expected embedding == hidden, got {embedding} and {hidden}")
        self.embedding = nn.Embedding(size, embedding)
        self.rnn = recurrent(cell, embedding, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.linear = nn.Linear(hidden, size)
        self.dropout = nn.Dropout(dropout)
        if tie_weights:
            # A unit-variance embedding, torch's default, would start the softmax far from uniform.
            nn.init.uniform_(self.embedding.weight, -(hidden**-0.5), hidden**-0.5)
            self.linear.weight = self.embedding.weight

    def embed(self, symbols: Tensor) -> Tensor:
        """The part before the recurrence: (T, B) → (T, B, embedding)."""
        embedded: Tensor = self.dropout(self.embedding(symbols))
        return embedded

    def predict(self, out: Tensor) -> Tensor:
        """The part after the recurrence: (T, B, hidden) → logits (T, B, symbols)."""
        logits: Tensor = self.linear(self.dropout(out))
        return logits

    def forward(self, symbols: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Predict the symbol after each of ``symbols`` (T, B): logits (T, B, symbols), and the state after the last."""
        out, state = self.rnn(self.embed(symbols), state)
        return self.predict(out), state


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of logits (T, B, symbols) against targets (T, B)."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def detach(state: State) -> State:
    """The same state with no history: gradients stop at the segment's start, the values go on."""
    return state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)


def segment_loss(model: CharacterModel, batch: tuple[Tensor, Tensor, bool], state: State) -> tuple[Tensor, State]:
    """Loss of one segment; the state goes on to the next one, without its history."""
    inputs, targets, first = batch
    logits, state = model(inputs, None if first else state)
    return cross_entropy(logits, targets), detach(state)


def likelihood(loss: float) -> dict[str, float]:
    """The held-out loss and its perplexity, as figures of a row."""
    # A diverged model's loss has an infinite exponential, which is no reason to lose the table.
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


@torch.no_grad()
def evaluate(model: CharacterModel, streams: Streams) -> float:
    """Mean loss in nats per character over one epoch, the state carried from segment to segment."""
    training = model.training
    model.eval()
    total, state = 0.0, None
    for step in range(len(streams)):
        inputs, targets, _ = streams.segment(step)
        logits, state = model(inputs, state)
        total += cross_entropy(logits, targets, reduction="sum").item()
    model.train(training)
    return total / streams.characters


def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw a symbol other than the unknown one.

    Args:
        logits: (symbols,).
        temperature: divides the logits: below 1 bolder, above 1 wilder.
        top_k: draw from the k likeliest only; 0 means all.
        generator: the only source of randomness.
    """
    # Symbol 0 stands for no character, so it cannot be written.
    logits = logits[1:]
    likeliest, symbols = logits.topk(min(top_k, len(logits)) if top_k else len(logits))
    probabilities = torch.softmax((likeliest.double() - likeliest.max()) / temperature, 0)
    return 1 + int(symbols[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: CharacterModel,
    vocabulary: Vocabulary,
    prompt: str,
    length: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
) -> str:
    """Continue a prompt by ``length`` characters, one at a time: each step gets one symbol and the state of the last."""
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    logits, state = model(vocabulary.encode(prompt).unsqueeze(1))
    symbols: list[int] = []
    for _ in range(length):
        symbols.append(sample(logits[-1, 0], temperature, top_k, generator))
        logits, state = model(torch.tensor([[symbols[-1]]]), state)
    model.train(training)
    return vocabulary.decode(symbols)
