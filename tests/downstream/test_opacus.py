"""Opacus: gradients of single examples, clipped and with noise, of models that hold recurrent layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from downstream_support import Swap, assert_same, package
from torch import Tensor, nn

import fused_rnn

opacus = package("opacus")
validators = package("opacus.validators")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha"),
]


def _model(swap: Swap, kind: str) -> nn.Sequential:
    """Opacus takes layers that return one tensor: a subclass, of torch.nn's class or of ours, returns the outputs alone."""
    return swap(_built(fused_rnn if swap.convert else nn, kind), made_so=True)


def _built(library: Any, kind: str) -> nn.Sequential:
    base: Any = getattr(library, kind)

    class Outputs(base):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)[0]

    options = {"num_layers": 2, "bidirectional": True} if kind == "GRU" else {}
    layer = Outputs(3, 4, batch_first=True, **options)
    return nn.Sequential(layer, nn.Linear(8 if options else 4, 2))


def _data() -> tuple[Tensor, Tensor]:
    sequences = torch.linspace(-1, 1, 144).view(8, 6, 3)
    return sequences, (sequences.sum((1, 2)) > 0).long()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradients_of_examples(kind: str) -> None:
    """Opacus forms them by torch.func: a map over the gradients of the layer, called by itself with its weights.

    On the CPU, torch.nn's own GRU and RNN raise under such a map. So one example after another is backpropagated with them.
    """
    plain, fused = _built(nn, kind), _built(fused_rnn, kind)
    fused.load_state_dict(plain.state_dict())
    model = opacus.GradSampleModule(fused)
    sequences, classes = _data()
    nn.functional.cross_entropy(model(sequences).mean(1), classes).backward()
    for place in range(len(sequences)):
        plain.zero_grad()
        nn.functional.cross_entropy(plain(sequences[place : place + 1]).mean(1), classes[place : place + 1]).backward()
        for name, parameter in plain.named_parameters():
            actual = fused.get_parameter(name).grad_sample[place]
            torch.testing.assert_close(
                actual, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_dp_sgd() -> None:
    """PrivacyEngine: batches drawn by Poisson, one of them perhaps empty, gradients clipped one by one, noise on their sum."""

    def program(swap: Swap) -> dict[str, Any]:
        model = _model(swap, "LSTM")
        engine = opacus.PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*_data()), batch_size=4),
            noise_multiplier=0.5,
            max_grad_norm=0.1,
            noise_generator=torch.Generator().manual_seed(5),
        )
        losses = []
        for sequences, classes in loader:
            if not len(classes):
                continue
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(sequences).mean(1), classes)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses
        return {"losses": losses, "epsilon": engine.get_epsilon(delta=1e-3)}

    assert_same(program)


def _classifier() -> nn.Sequential:
    return nn.Sequential(nn.LSTM(3, 4, batch_first=True, bidirectional=True))


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="Opacus looks up what it replaces by a module's exact class, torch.nn's: a converted layer stays, unnoticed",
)
def test_replaced_by_opacus() -> None:
    model = validators.ModuleValidator.fix(fused_rnn.convert(_classifier()))
    assert isinstance(model[0], opacus.layers.DPLSTM)


@pytest.mark.parametrize("way", ["reverted", "registered"])
def test_made_replaceable(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways to Opacus's own layers: reverting, or registering torch.nn's entries for our class. Both keep the weights."""
    model = fused_rnn.convert(_classifier())
    sequences, _ = _data()
    expected = model(sequences)[0]
    if way == "reverted":
        fused_rnn.revert(model)
    else:
        for table in (validators.ModuleValidator.FIXERS, validators.ModuleValidator.VALIDATORS):
            monkeypatch.setitem(table, fused_rnn.LSTM, table[nn.LSTM])
    fixed = validators.ModuleValidator.fix(model)
    assert isinstance(fixed[0], opacus.layers.DPLSTM)
    torch.testing.assert_close(fixed[0](sequences)[0], expected, rtol=1e-5, atol=1e-6)
