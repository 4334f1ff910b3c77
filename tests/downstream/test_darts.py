"""Darts: forecasts by recurrent models, fitted to series, sampled from, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from downstream_support import Swap, assert_same, package

package("darts")
models = package("darts.models")
timeseries = package("darts.timeseries")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def _series() -> list[Any]:
    time = numpy.arange(40, dtype=numpy.float32)
    return [timeseries.TimeSeries.from_values(numpy.sin(time / period)) for period in (2.0, 3.0)]


def _trainer(folder: Path) -> dict[str, Any]:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return {"pl_trainer_kwargs": {"accelerator": "cpu", "default_root_dir": folder, **quiet}}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"RNNModel, {kind}": (
            "RNNModel",
            {"model": kind, "hidden_dim": 5, "n_rnn_layers": 2, "dropout": 0.2, "training_length": 12},
        )
        for kind in ("LSTM", "GRU", "RNN")
    },
    **{
        f"BlockRNNModel, {kind}": ("BlockRNNModel", {"model": kind, "hidden_dim": 5, "output_chunk_length": 2})
        for kind in ("LSTM", "GRU", "RNN")
    },
    "TFTModel": (
        "TFTModel",
        {"hidden_size": 4, "num_attention_heads": 2, "output_chunk_length": 2, "add_relative_index": True},
    ),
}


@pytest.mark.parametrize(("name", "options"), MODELS.values(), ids=MODELS)
def test_fit_predict(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """RNNModel carries its state from step to step of a forecast; the others encode, and the last builds two LSTMs."""

    def program(swap: Swap) -> dict[str, Any]:
        model = getattr(models, name)(
            input_chunk_length=6,
            n_epochs=2,
            batch_size=8,
            random_state=0,
            # Adam makes whole steps of small gradients, and the loss of quantiles has kinks: both magnify rounding.
            optimizer_cls=torch.optim.SGD,
            optimizer_kwargs={"lr": 0.05},
            **options,
            **_trainer(tmp_path),
        )
        build = model._create_model
        # The model is built in `fit`, once the series is known.
        with mock.patch.object(model, "_create_model", lambda sample: swap(build(sample))):
            model.fit(_series())
        forecast = model.predict(5, series=_series()[0])
        return {"forecast": forecast.values()}

    assert_same(program)
