"""Which Python files of the package a call enters: what a reader has to follow, and part of what a small call costs."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.arguments import Parser
from benchmarks.cases import Case, Shape
from benchmarks.peers import fused
from benchmarks.problem import Problem
from benchmarks.results import ResultsError

_ROOT = Path(__file__).resolve().parent.parent
_SHAPE = Shape(2, 3, 16, 16, "files entered")

# What is looked at, as the cases of the benchmark are called.
CALLS: dict[str, Case] = {
    "LSTM training": Case("lstm", _SHAPE, "training", summed=True),
    "LSTM training, two directions": Case("lstm", _SHAPE, "training", summed=True, bidirectional=True),
    "LSTM training, lengths": Case("lstm", _SHAPE, "training", summed=True, padded=True),
    "LSTM inference": Case("lstm", _SHAPE, "inference", summed=True),
    "LSTMCell training": Case("lstm", _SHAPE, "training", loop="cell"),
    "LSTMCell inference": Case("lstm", _SHAPE, "inference", loop="cell"),
}
INTERPRETED: dict[str, Case] = {
    "LSTM inference, Triton": Case("lstm", _SHAPE, "inference", summed=True),
    "LSTM training, Triton": Case("lstm", _SHAPE, "training", summed=True),
}

# Triton's interpreter runs a kernel's own source, which is no part of the way to it.
_INTERPRETER = os.path.join("triton", "runtime", "interpreter.py")


def entered(call: Callable[[], Any], package: Path) -> dict[str, int]:
    """The files below a folder whose functions a call enters, with the number of entries; in the order of the first.

    The call's own thread is watched, where the backward of tensors on the CPU runs too.
    """
    found: Counter[str] = Counter()
    start = f"{package.resolve()}{os.sep}"
    before = sys.getprofile()

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(start) and not _interpreted(frame):
            found[name.removeprefix(start)] += 1

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return dict(found)


def _interpreted(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.endswith(_INTERPRETER):
            return True
        frame = frame.f_back
    return False


def count(calls: Mapping[str, Case], backend: str | None = None) -> dict[str, dict[str, int]]:
    """``entered`` of each call's second time, when what is made once has been made."""
    import torch

    package = fused.package()
    peer = fused.peer("ours", backend)
    found = {}
    for name, case in calls.items():
        provider = peer.prepare(Problem(case), case, 1)
        with torch.set_grad_enabled(case.training), provider.scope():
            provider.step()
            found[name] = entered(provider.step, Path(package.__file__).parent)
    return found


def main(arguments: Sequence[str]) -> int:
    """The command: a table of the calls, for one version or two."""
    from benchmarks.versions.processes import Process, WorkerError, has_package

    parser = Parser(
        prog="python -m benchmarks files", description="Count the Python files of the package that a call enters, as Markdown."
    )
    parser.add_argument(
        "packages", type=Path, nargs="*", default=[_ROOT], metavar="FOLDER", help="versions of the package (default: this one)"
    )
    parser.add_argument("--names", action="store_true", help="name the files")
    parser.add_argument("--no-triton", action="store_true", help="leave out the calls under Triton's interpreter")
    options = parser.parse_args(arguments)
    for folder in options.packages:
        if not has_package(folder):
            parser.error(f"no package fused_rnn in {folder}")
    lines = ["| call | " + " | ".join(f"files, {folder.resolve().name} | entries" for folder in options.packages) + " |"]
    lines.append("|---|" + "---:|---:|" * len(options.packages))
    columns: list[dict[str, dict[str, int]]] = []
    reasons = []
    for folder in options.packages:
        found: dict[str, dict[str, int]] = {}
        for interpreted in (False,) if options.no_triton else (False, True):
            try:
                process = Process("packages", folder.resolve(), {"TRITON_INTERPRET": "1"} if interpreted else {})
            except ResultsError as error:
                parser.error(str(error).removeprefix("--packages: "))
            try:
                found |= process.ask("files", interpreted=interpreted)
            except WorkerError as error:
                reasons.append(f"{folder.resolve().name}: {error}")
            finally:
                process.close()
        columns.append(found)
    for name in dict.fromkeys(name for found in columns for name in found):
        shown = [f"{len(found[name])} | {sum(found[name].values())}" if name in found else "– | –" for found in columns]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    if options.names:
        for folder, found in zip(options.packages, columns, strict=True):
            lines += ["", *(f"- {folder.resolve().name}, {name}: {', '.join(files)}" for name, files in found.items())]
    print("\n".join([*lines, *([""] if reasons else []), *reasons]))
    return 1 if reasons else 0
