"""pytorch-forecasting: recurrent networks, DeepAR and temporal fusion transformers, of sequences of any length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from downstream_support import Swap, assert_same, package

import fused_rnn

forecasting = package("pytorch_forecasting")
rnn = package("pytorch_forecasting.models.nn.rnn")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def _over(kind: str) -> type:
    """The library's subclass of torch.nn's class, with ours at its root: its forward calls the next one."""
    library = getattr(rnn, kind)
    members = {name: value for name, value in vars(library).items() if callable(value)}
    return type(rnn.RNN)(kind, (rnn.RNN, getattr(fused_rnn, kind)), members)


@contextmanager
def _with_ours(swap: Swap) -> Iterator[None]:
    """The library makes its layers of its own subclasses, which `convert` leaves alone; a user of ours replaces these."""
    transformer = package("pytorch_forecasting.models.temporal_fusion_transformer._tft")
    if not swap.convert:
        yield
        return
    lstm, gru = _over("LSTM"), _over("GRU")
    with mock.patch.object(rnn, "LSTM", lstm), mock.patch.object(rnn, "GRU", gru), mock.patch.object(transformer, "LSTM", lstm):
        yield


def _data(**options: Any) -> Any:
    pandas = package("pandas")
    time = numpy.tile(numpy.arange(24), 3)
    series = numpy.repeat(numpy.arange(3), 24)
    values = numpy.sin(time / (series + 2.0)) + 2
    table = pandas.DataFrame({"value": values, "time": time, "series": series.astype(str)})
    return forecasting.TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=6,
        max_prediction_length=3,
        static_categoricals=["series"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
        **{"min_encoder_length": 0, **options},
    )


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "RecurrentNetwork, LSTM": ("RecurrentNetwork", {"cell_type": "LSTM", "hidden_size": 5, "rnn_layers": 2, "dropout": 0.2}),
    "RecurrentNetwork, GRU": ("RecurrentNetwork", {"cell_type": "GRU", "hidden_size": 5}),
    "DeepAR": ("DeepAR", {"cell_type": "LSTM", "hidden_size": 5, "rnn_layers": 2, "dropout": 0.2}),
    "TemporalFusionTransformer": ("TemporalFusionTransformer", {"hidden_size": 4, "attention_head_size": 2, "dropout": 0.1}),
}


@pytest.mark.parametrize(("name", "options"), MODELS.values(), ids=MODELS)
def test_model(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Trained by Lightning on windows of every length, and asked for a forecast of three steps from its own."""
    lightning = package("lightning.pytorch")
    # The first value of a forecast is the last of the encoder for two of them: they take no empty one.
    data = _data(min_encoder_length=0 if name == "TemporalFusionTransformer" else 1)

    def program(swap: Swap) -> dict[str, Any]:
        with _with_ours(swap):
            model = getattr(forecasting, name).from_dataset(data, learning_rate=0.1, optimizer="sgd", **options)
        swap(model, made_so=True)
        trainer = lightning.Trainer(
            max_epochs=1,
            limit_train_batches=4,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=0.1,
        )
        trainer.fit(model, data.to_dataloader(train=True, batch_size=16, num_workers=0))
        model.eval()
        torch.manual_seed(1)
        inputs, _ = next(iter(data.to_dataloader(train=False, batch_size=128, num_workers=0)))
        assert inputs["encoder_lengths"].min() < 2
        with torch.no_grad():
            return {"forecast": model(inputs)["prediction"]}

    assert_same(program)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_lengths(kind: str) -> None:
    """The layer alone, its `lengths` argument included, which has zeros; a gradient step of all its weights."""

    def program(swap: Swap) -> dict[str, Any]:
        with _with_ours(swap):
            layer = rnn.get_rnn(kind)(3, 4, num_layers=2, batch_first=True)
        swap(layer, made_so=True)
        sequences = torch.linspace(-1, 1, 60).view(4, 5, 3).requires_grad_()
        results: dict[str, Any] = {}
        for place, lengths in enumerate(([5, 3, 0, 1], [0, 0, 0, 0])):
            out, state = layer(sequences, lengths=torch.tensor(lengths), enforce_sorted=False)
            states = state if isinstance(state, tuple) else (state,)
            parts = {"out": out, "h": states[0]}
            results.update({f"{key} {place}": part.detach() for key, part in parts.items()})
            if place == 0:
                sum(part.square().sum() for part in parts.values()).backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad
        return {**results, "d_sequences": sequences.grad}

    assert_same(program)


def test_left_alone() -> None:
    """A subclass that has its own forward is not converted, and the report says so."""
    model = forecasting.RecurrentNetwork.from_dataset(_data(), hidden_size=4, cell_type="GRU")
    report: list[fused_rnn.Conversion] = []
    fused_rnn.convert(model, report)
    (left,) = report
    assert left.after is left.before is rnn.GRU
    assert left.reason is not None
    assert "subclass" in left.reason
