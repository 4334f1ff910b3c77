"""captum: which inputs a recurrent classifier's answer came from, by gradients, by paths, by occlusion and inside the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from downstream_support import Swap, assert_same, package
from torch import Tensor, nn

captum = package("captum")
attr = package("captum.attr")


class Classifier(nn.Module):
    """Words → LSTM → GRU → the class."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(10, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def features(self, embedded: Tensor) -> Tensor:
        return self.out(self.gru(self.lstm(embedded)[0])[0].mean(1))

    def forward(self, words: Tensor) -> Tensor:
        return self.features(self.words(words))


def _trained(swap: Swap) -> tuple[Classifier, Tensor]:
    model = swap(Classifier())
    words = torch.arange(18).view(3, 6) % 9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(words), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    return model.eval(), words


METHODS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 8},
    "GradientShap": {"baselines": "zeros", "n_samples": 4},
    "FeatureAblation": {},
    "Occlusion": {"sliding_window_shapes": (2, 4)},
    "ShapleyValueSampling": {"n_samples": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_inputs(method: str) -> None:
    """Attributions of the embedded words."""

    def program(swap: Swap) -> dict[str, Any]:
        model, words = _trained(swap)
        embedded = model.words(words).detach()
        options = {**METHODS[method]}
        if options.get("baselines") == "zeros":
            options["baselines"] = torch.zeros_like(embedded)
        explained = getattr(attr, method)(model.features).attribute(embedded, target=1, **options)
        assert explained.abs().max() > 1e-4
        return {"attributions": explained.detach()}

    assert_same(program)


def test_embedding_layer() -> None:
    """Integrated gradients at the embedding, which captum replaces during forwards by hooks."""

    def program(swap: Swap) -> dict[str, Any]:
        model, words = _trained(swap)
        method = attr.LayerIntegratedGradients(model, model.words)
        explained, delta = method.attribute(words, torch.zeros_like(words), target=1, n_steps=8, return_convergence_delta=True)
        return {"attributions": explained.detach(), "delta": delta.detach()}

    assert_same(program)


class Head(nn.Module):
    """The part of a classifier behind its embedding, as a module: captum hangs hooks into it."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedded: Tensor) -> Tensor:
        return self.model.features(embedded)


@pytest.mark.parametrize("layer", ["lstm", "gru"])
@pytest.mark.parametrize(
    "method", ["LayerActivation", "LayerGradientXActivation", "LayerConductance", "LayerIntegratedGradients"]
)
def test_recurrent_layer(layer: str, method: str) -> None:
    """At what goes into a recurrent layer: what comes out, a tensor and a tuple of states, captum takes from no module."""

    def program(swap: Swap) -> dict[str, Any]:
        model, words = _trained(swap)
        target = {} if method == "LayerActivation" else {"target": 1}
        explained = getattr(attr, method)(Head(model), getattr(model, layer)).attribute(
            model.words(words).detach(), attribute_to_layer_input=True, **target
        )
        (explained,) = explained if isinstance(explained, tuple) else (explained,)
        return {"attributions": explained.detach()}

    assert_same(program)


def test_influence_of_examples() -> None:
    """TracIn: inner products of the gradients of single examples."""
    influence = package("captum.influence")

    def program(swap: Swap) -> dict[str, Any]:
        model, words = _trained(swap)
        data = torch.utils.data.TensorDataset(words, torch.tensor([0, 1, 2]))
        method = influence.TracInCP(
            model,
            data,
            ["as it is"],
            checkpoints_load_func=lambda *_: 1.0,
            loss_fn=nn.CrossEntropyLoss(reduction="none"),
            batch_size=3,
        )
        return {"influence": method.influence((words, torch.tensor([0, 1, 2])))}

    assert_same(program)
