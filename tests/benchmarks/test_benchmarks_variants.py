"""The measurement of cells that torch.nn lacks: its rows, its page, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks_support import no_pause, run_info  # noqa: F401, a fixture for every test
from torch import Tensor

from benchmarks import variants
from benchmarks.__main__ import main


@pytest.mark.parametrize("mode", variants.MODES)
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_everybody_computes_the_same_cell(name: str, mode: str) -> None:
    rows = variants.measure(name, "3x5x8", mode, 1e-9, compiled=False)
    beside = variants.VARIANTS[name].beside
    expected = ["ours", *([f"our {beside}"] if beside else []), "loop", "TorchScript"]
    assert [row["provider"] for row in rows] == expected
    for row in rows:
        assert row["status"] == "ok"
        assert row["ms"]["median"] > 0
        assert (row["ratio"]["median"] == 1) == (row["provider"] == "ours")
        assert ("error" in row) != row["provider"].startswith("our ")


def _wrong(x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(x[:, : h.shape[1]] + h), c


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(variants.VARIANTS, "mgu", variants.Variant(variants.VARIANTS["mgu"].cell, _wrong, 2))
    rows = variants.measure("mgu", "3x5x8", "inference", 1e-9, compiled=False)
    # The loop in float64 is that of the loops.
    assert {row["provider"]: row["status"] for row in rows}["ours"] == "wrong"
    page = variants.markdown(rows, {**run_info(), "command": ["python"], "commit": "0"})
    assert "mgu inference 3x5x8, ours: an error of" in page


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "variants.json"
    options = ["--cells", "mgu", "--shapes", "2x3x4", "--seconds", "0.01", "--threads", "1", "--quick", "--json", str(path)]
    assert main(["variants", *options]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["mode"] for row in rows} == {"training", "inference"}
    page = path.with_suffix(".md").read_text()
    assert "| mgu | training | 2x3x4 |" in page
    assert page in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--cells", "lstm", "--cells: expected some of gru_reset_before,lstm_coupled,mgu,own_lstm,own_forgetful, got 'lstm'"),
        ("--modes", "streaming", "--modes: expected some of training,inference, got 'streaming'"),
        ("--shapes", "3x4", "expected BxTxH or BxTxIxH, got '3x4'"),
    ],
)
def test_bad_options(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["variants", option, value])
    assert message in capsys.readouterr().err
