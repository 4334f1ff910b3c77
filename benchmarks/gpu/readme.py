"""``python -m benchmarks.gpu.readme RESULTS...``: the README's table of GPU results and its picture, only from results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
README = Path(__file__).parents[2] / "README.md"
PICTURE = Path(__file__).parents[1] / "results" / "gpu.png"
MODES = {"training": "training", "forward": "inference"}

Row = Mapping[str, Any]


def _label(row: Row) -> str:
    extra = {"plain": "", "reset": ", resets", "ragged": ", ragged"}[row["extra"]]
    both = ", both directions" if row["directions"] == 2 else ""
    sizes = f"{row['batch']} × {row['steps']} × {row['hidden']}"
    return f"{row['cell'].removesuffix('_tanh').upper()} {sizes}, {row['dtype']}{extra}{both}"


def _times(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}×"


def _milliseconds(row: Row, name: str) -> str:
    found = row.get(f"{name}_ms")
    return "—" if found is None else f"{found['median']:.3g}"


def _cases(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Row]]:
    """Rows that are right, by case and mode; a later file's row takes the place of an earlier one's."""
    cases: dict[str, dict[str, Row]] = {}
    for run in runs:
        for row in run["rows"]:
            if row["status"] == "ok" and "ratio_torch_nn" in row:
                cases.setdefault(_label(row), {})[row["mode"]] = row
    return cases


def block(runs: Sequence[Mapping[str, Any]]) -> str:
    """The README's block: layers in one direction, without ragged lengths."""
    plain = {
        label: modes
        for label, modes in _cases(runs).items()
        if all((row["directions"], row["extra"]) == (1, "plain") for row in modes.values())
    }
    lines = [
        "Times as fast as `torch.nn` (cuDNN), same weights: the GPU's time, both sides in a CUDA graph, and the time of a",
        "call, which at few steps is the host's. (In bfloat16 `torch.nn` puts its weights together at every call.)",
        "",
        *table(plain, times=False),
        "",
        f"Measured with `python -m benchmarks gpu` on one {_machine(runs)}.",
        "",
        "![Speed-up over cuDNN for each layer](benchmarks/results/gpu.png)",
        "",
        "Every layer that was measured, with times: [benchmarks/results/gpu.md](benchmarks/results/gpu.md).",
    ]
    return "\n".join(lines)


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Every layer, with milliseconds, and how each file was measured."""
    lines = ["# Layers on a GPU", "", "Times as fast as `torch.nn` (cuDNN), and milliseconds of ours, both as CUDA graphs.", ""]
    lines += [*table(_cases(runs), times=True), ""]
    for run in runs:
        made = run["run"]
        lines += [f"`{' '.join(made['command'])}`, {_machine([run])}. {made.get('note', '')}".strip(), ""]
    return "\n".join(lines)


def _machine(runs: Sequence[Mapping[str, Any]]) -> str:
    made = runs[0]["run"]
    date = " and ".join(dict.fromkeys(run["run"]["date"][:10] for run in runs))
    return (
        f"{made['device']}, torch {made['torch']}, cuDNN {made['cudnn']}, triton {made['triton']}, "
        f"driver {made['driver']}, {date}"
    )


def table(cases: Mapping[str, Mapping[str, Row]], times: bool) -> list[str]:
    """One line for each layer; times: with a column of milliseconds for each mode."""
    kinds = ("as a graph", "ms", "called") if times else ("as a graph", "called")
    heads = [f"{word}, {kind}" for word in MODES.values() for kind in kinds]
    lines = ["| layer, B × T × H | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for label, modes in sorted(cases.items(), key=lambda item: _order(item[1])):
        cells = []
        for mode in MODES:
            row = modes.get(mode, {})
            cells.append(_times(row.get("ratio_graph_torch_nn")))
            cells += [_milliseconds(row, "ours_graph")] if times else []
            cells.append(_times(row.get("ratio_torch_nn")))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _order(modes: Mapping[str, Row]) -> tuple[Any, ...]:
    row = next(iter(modes.values()))
    dtypes, cells = ("bfloat16", "float32", "float16"), ("lstm", "gru", "rnn_tanh")
    return (dtypes.index(row["dtype"]), row["extra"] != "plain", row["directions"], cells.index(row["cell"]), -row["steps"],
            row["hidden"], row["batch"])  # fmt: skip


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of training as a graph, one for each layer, against the line of cuDNN."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = sorted(_cases(runs).items(), key=lambda item: _order(item[1]), reverse=True)
    shown = [(label, modes["training"]["ratio_graph_torch_nn"]) for label, modes in cases if _has_graph(modes)]
    figure, axes = plt.subplots(figsize=(8, 0.26 * len(shown) + 1), layout="constrained")
    axes.barh([label for label, _ in shown], [value for _, value in shown], color="#3b6ea5")
    axes.axvline(1.0, color="#b03a2e", linewidth=1)
    axes.set_xlabel("times as fast as torch.nn (cuDNN), training, both in a CUDA graph")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.01)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _has_graph(modes: Mapping[str, Row]) -> bool:
    return "training" in modes and "ratio_graph_torch_nn" in modes["training"]


def main(arguments: Sequence[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.readme", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="results of python -m benchmarks gpu, the best known last")
    options = parser.parse_args(arguments)
    runs = [json.loads(path.read_text()) for path in options.results]
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{block(runs)}\n{END}{rest.split(END)[1]}")
    PICTURE.with_suffix(".md").write_text(page(runs))
    draw(runs, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
