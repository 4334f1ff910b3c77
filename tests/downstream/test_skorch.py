"""skorch: a classifier of sequences with scikit-learn's interface, fitted, cloned, searched and saved."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy
import pytest
import torch
from downstream_support import Swap, assert_same, package
from torch import Tensor, nn

skorch = package("skorch")


class Classifier(nn.Module):
    """The mean over the steps of two layers, both ways, decides."""

    def __init__(self, swap: Swap, kind: str = "LSTM", hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(3, hidden, num_layers=2, batch_first=True, bidirectional=True, dropout=dropout)
        self.out = nn.Linear(2 * hidden, 2)
        # skorch builds the module itself, so it is converted as it is built.
        swap(self)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.out(self.rnn(sequence)[0].mean(1))


def _data() -> tuple[Any, Any]:
    draw = numpy.random.default_rng(0)
    sequences = draw.standard_normal((24, 5, 3)).astype(numpy.float32)
    return sequences, (sequences.sum((1, 2)) > 0).astype(numpy.int64)


def _net(swap: Swap, **options: Any) -> Any:
    return skorch.NeuralNetClassifier(
        Classifier,
        module__swap=swap,
        criterion=nn.CrossEntropyLoss,
        # Adam would make whole steps of gradients that are nearly zero, where rounding decides.
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        lr=0.1,
        batch_size=8,
        verbose=0,
        **{"max_epochs": 3, **options},
    )


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_fit_predict(kind: str) -> None:
    """Dropout between the layers draws the same masks; a validation split runs in evaluation mode beside the training."""

    def program(swap: Swap) -> dict[str, Any]:
        sequences, classes = _data()
        net = _net(swap, module__kind=kind, module__dropout=0.3).fit(sequences, classes)
        return {
            "train": net.history[:, "train_loss"],
            "valid": net.history[:, "valid_loss"],
            "probabilities": net.predict_proba(sequences),
            "classes": net.predict(sequences),
        }

    assert_same(program)


def test_callbacks() -> None:
    """Clipped gradients, a schedule of learning rates, and the best weights loaded at the end."""
    callbacks = package("skorch.callbacks")

    def program(swap: Swap) -> dict[str, Any]:
        sequences, classes = _data()
        net = _net(
            swap,
            max_epochs=4,
            callbacks=[
                callbacks.GradientNormClipping(0.1),
                callbacks.LRScheduler("StepLR", step_size=2, gamma=0.1),
                callbacks.EarlyStopping(patience=2, load_best=True),
            ],
        ).fit(sequences, classes)
        return {"train": net.history[:, "train_loss"], "probabilities": net.predict_proba(sequences)}

    assert_same(program)


def test_grid_search() -> None:
    """scikit-learn clones the net for every setting and fold, and fits each anew."""
    search = package("sklearn.model_selection")

    def program(swap: Swap) -> dict[str, Any]:
        sequences, classes = _data()
        net = _net(swap, max_epochs=1, train_split=None)
        found = search.GridSearchCV(
            net, {"module__hidden": [3, 5]}, cv=2, scoring="neg_log_loss", refit=True, error_score="raise"
        ).fit(sequences, classes)
        return {"scores": found.cv_results_["mean_test_score"], "probabilities": found.predict_proba(sequences)}

    assert_same(program)


def test_saved_parameters() -> None:
    """Parameters and an optimizer's state saved by one net are loaded by another, which trains on."""

    def program(swap: Swap) -> dict[str, Any]:
        sequences, classes = _data()
        net = _net(swap).fit(sequences, classes)
        parameters, optimizer = io.BytesIO(), io.BytesIO()
        net.save_params(f_params=parameters, f_optimizer=optimizer)
        parameters.seek(0)
        optimizer.seek(0)
        other = _net(swap).initialize()
        other.load_params(f_params=parameters, f_optimizer=optimizer)
        other.partial_fit(sequences, classes)
        return {"loaded": other.predict_proba(sequences)}

    assert_same(program)


def test_pickle() -> None:
    def program(swap: Swap) -> dict[str, Any]:
        sequences, classes = _data()
        net = _net(swap).fit(sequences, classes)
        module = pickle.loads(pickle.dumps(net.module_))
        assert type(module.rnn) is type(net.module_.rnn)
        return {"logits": module(torch.as_tensor(sequences)).detach()}

    assert_same(program)
