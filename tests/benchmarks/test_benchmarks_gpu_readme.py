"""The README's figures of a GPU are those of the committed results, and nothing that was wrong is among them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import readme

RESULTS = Path(readme.__file__).parents[1] / "results"
FILES = ("gpu_goals.json", "gpu_quick.json")


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    return [json.loads((RESULTS / name).read_text()) for name in FILES]


def test_the_readme_has_what_the_results_say(runs: list[dict[str, Any]]) -> None:
    shown = readme.README.read_text().split(readme.BEGIN)[1].split(readme.END)[0].strip()
    assert shown == readme.block(runs)
    assert readme.PICTURE.with_suffix(".md").read_text() == readme.page(runs)


def test_wrong_rows_are_not_shown(runs: list[dict[str, Any]]) -> None:
    changed = copy.deepcopy(runs[:1])
    for row in changed[0]["rows"][:2]:
        row["status"] = "wrong: a gradient"
    assert len(readme._cases(changed)) == len(readme._cases(runs[:1])) - 1


def test_a_picture_is_drawn(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "gpu.png"
    readme.draw(runs, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_was_not_measured_is_a_dash(runs: list[dict[str, Any]]) -> None:
    row = {key: value for key, value in runs[0]["rows"][0].items() if key != "ratio_graph_torch_nn"}
    lines = readme.table({"a layer": {"forward": row}}, times=True)
    assert lines[2].count("—") == 4
