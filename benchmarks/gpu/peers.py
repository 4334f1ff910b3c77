"""Who else is timed beside torch.nn, each where it is installed and where it has such a layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.gpu import outside
from benchmarks.gpu import problem as problems
from benchmarks.gpu.cases import Case
from benchmarks.gpu.graphs import told
from benchmarks.gpu.pieces import cudnn_pieces
from benchmarks.gpu.problem import Problem, Results, Run
from benchmarks.gpu.torchrl import torchrl
from benchmarks.peers import compiling

# How far a peer may be from ours, relative to the size of the result as a whole: roundings of T steps, on both sides.
AGREES = {"bfloat16": 0.05, "float16": 0.02, "float32": 0.01}


@dataclass(frozen=True)
class Peer:
    """Another way to run a case.

    Attributes:
        name: as in the columns.
        missing: why it cannot be measured here, or None.
        takes: whether it has the layer of a case.
        prepare: makes its run of a problem.
        asked: whether it is timed only with ``--peers``.
    """

    name: str
    missing: Callable[[], str | None]
    takes: Callable[[Case], bool]
    prepare: Callable[[Problem], Run]
    asked: bool = False


# Beyond so many units TorchRL's kernels, which unroll the product, may compile for minutes.
_TORCHRL_HIDDEN = 512


def _torchrl_takes(case: Case) -> bool:
    # Its kernels compile in float32 alone.
    layer = case.cell in ("lstm", "gru") and case.dtype == "float32" and case.directions == 1 and case.extra != "ragged"
    return layer and case.hidden <= _TORCHRL_HIDDEN


PEERS = (
    Peer("cudnn_pieces", lambda: None, lambda case: case.extra == "reset", cudnn_pieces),
    Peer("torchrl", problems.torchrl_missing, _torchrl_takes, torchrl),
    Peer("gru_qat", lambda: outside.not_installed("gru_qat"), outside.gru_qat_takes, outside.gru_qat),
    Peer("flashrnn", lambda: outside.not_installed("flashrnn"), outside.flashrnn_takes, outside.flashrnn, asked=True),
    Peer("loop_compiled", compiling.unavailable, outside.loop_takes, outside.loop_compiled, asked=True),
)


def missing(asked: bool) -> dict[str, str]:
    """Peer by peer, why it is not measured."""
    found = {}
    for peer in PEERS:
        why = "not asked for (--peers)" if peer.asked and not asked else _missing(peer)
        if why:
            found[peer.name] = why
    return found


def _missing(peer: Peer) -> str | None:
    """A package that is there and does not import is as good as missing."""
    try:
        return peer.missing()
    except Exception as error:
        return told(error)


class Peers:
    """Prepares peers, and gives up one whose first calls have taken too long: they compile while nobody else can be timed."""

    def __init__(self, without: Mapping[str, str], seconds: float) -> None:
        """without: peers that are not tried; seconds: for the first calls of each, all cases together."""
        self._without, self._seconds = without, seconds
        self._spent: dict[str, float] = {}

    def sides(self, problem: Problem, ours: Results) -> tuple[dict[str, Run], dict[str, str]]:
        """The peers that run a problem and agree with our results of training, and what is wrong with the others."""
        runs: dict[str, Run] = {}
        notes: dict[str, str] = {}
        for peer in PEERS:
            if peer.name in self._without or not peer.takes(problem.case):
                continue
            spent = self._spent.get(peer.name, 0.0)
            if spent > self._seconds:
                notes[peer.name] = f"not tried: its first calls in other cases took {spent:.0f} s"
                continue
            begin = time.perf_counter()
            try:
                run = peer.prepare(problem)
                wrong = disagreement(ours, run(True), AGREES[problem.case.dtype])
                # Without a graph it may be other code, which is compiled now.
                run(False)
            except Exception as error:
                notes[peer.name] = f"failed: {told(error)}"
            else:
                if wrong:
                    notes[peer.name] = f"wrong: {wrong}"
                else:
                    runs[peer.name] = run
            self._spent[peer.name] = spent + time.perf_counter() - begin
        return runs, notes


def disagreement(ours: Results, theirs: Results, most: float) -> str | None:
    """Which result differs by more than ``most`` of its size, or None. What a peer does not tell is not judged."""
    for name, value in theirs.items():
        expected = ours[name].double()
        off = torch.linalg.vector_norm(value.double() - expected) / torch.linalg.vector_norm(expected)
        if not off.item() <= most:
            return f"{name} differs by {off.item():.1e} of its size"
    return None
