"""GluonTS: DeepAR and the temporal fusion transformer, trained by their estimators and sampled from by their predictors."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from downstream_support import Swap, assert_same, package

package("gluonts")
package("gluonts.torch")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def _series() -> Any:
    dataset = package("gluonts.dataset.common")
    time = numpy.arange(60, dtype=numpy.float32)
    targets = [numpy.sin(time / period) + 2 for period in (2.0, 3.0, 5.0)]
    return dataset.ListDataset([{"target": target, "start": "2020-01-01"} for target in targets], freq="D")


OPTIONS: dict[str, dict[str, Any]] = {
    "DeepAREstimator": {"hidden_size": 6, "num_parallel_samples": 5, "lags_seq": [1, 2, 7], "dropout_rate": 0.2},
    "TemporalFusionTransformerEstimator": {"hidden_dim": 8, "variable_dim": 4, "num_heads": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_estimator(tmp_path: Path, name: str) -> None:
    """DeepAR trains on one call over all steps, and samples step by step with its state; the other has two LSTMs."""
    model = package("gluonts.torch.model.deepar" if name == "DeepAREstimator" else "gluonts.torch.model.tft")
    estimator = getattr(model, name)(
        **{"freq": "D", "prediction_length": 3, "context_length": 6, "batch_size": 4, "num_batches_per_epoch": 3, "lr": 0.01},
        **OPTIONS[name],
        trainer_kwargs={
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )

    def program(swap: Swap) -> dict[str, Any]:
        network = swap(estimator.create_lightning_module())
        with mock.patch.object(estimator, "create_lightning_module", return_value=network):
            predictor = estimator.train(_series())
        # The predictor holds the network that was trained last, or loads the best of its checkpoints into a new one.
        torch.manual_seed(1)
        forecasts = list(predictor.predict(_series()))
        return {f"quantile {q}, {place}": one.quantile(q) for place, one in enumerate(forecasts) for q in (0.1, 0.5, 0.9)}

    # The attention's bias for keys adds the same to all scores that a softmax then compares: its gradient is zero but for
    # rounding, of which Adam makes whole steps.
    assert_same(program, unlike=("attention.in_proj_bias",))
