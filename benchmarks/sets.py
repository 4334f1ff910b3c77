"""What is measured, as data: named sets of cases. A new case is one line.

``goals`` is what a run without options measures. The origin of a shape says where such a size is met.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import CELLS, ITEM_BYTES, LOOPS, MODES, SHAPES, Case, Shape, parse_shape

_GATED = ("lstm", "gru")

# What a small call can be; the projection is to half of H.
_SMALL_KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"bidirectional": True},
    {"padded": True},
    {"resets": 4},
    {"ragged": True},
    {"proj_size": True},
    {"dtype": "bfloat16"},
)

# (T, N, H) and (B, H) that --quick measures of the small calls and of the steps.
_QUICK_SMALL = {(4, 4, 16), (16, 16, 64)}
_QUICK_STEPS = {(1, 128), (32, 128), (8, 512)}

# With --quick, a case outside the goals is left out above this.
QUICK_FLOPS = 2e9


def _line(
    B: int,
    T: int,
    H: int,
    origin: str,
    *,
    I: int | None = None,  # noqa: E741
    cells: Iterable[str] = tuple(CELLS),
    modes: Sequence[str] | None = None,
    dtypes: Iterable[str] = ("float32",),
    **options: Any,
) -> list[Case]:
    """The cases of one line: each cell in each dtype and mode. ``options`` are those of ``Case``."""
    shape = Shape(B, T, I or H, H, origin)
    if modes is None:
        modes = ("streaming",) if T == 1 else shape.modes
    return [Case(cell, shape, mode, dtype, **options) for cell in cells for dtype in dtypes for mode in modes]


def _goals() -> list[Case]:
    return [
        *(Case(cell, shape, mode) for cell in CELLS for shape in SHAPES for mode in shape.modes),
        *_line(32, 100, 256, "tagger, both directions", cells=_GATED, bidirectional=True),
    ]


def _published() -> list[Case]:
    return [
        *_line(64, 100, 512, "pytorch benchmarks/fastrnns defaults"),
        *_line(20, 35, 650, "PTB medium, Zaremba et al. 2014"),
        *_line(20, 35, 1500, "PTB large, Zaremba et al. 2014"),
        *_line(1, 1000, 256, "speech, one utterance"),
        *_line(16, 1000, 256, "speech, a batch of utterances"),
        *_line(16, 1024, 768, "FlashRNN, Pöppel et al. 2025", cells=_GATED),
    ]


def _rl() -> list[Case]:
    plain = [(64, 64), (64, 128), (256, 128), (1024, 64), (1024, 256)]
    shapes = [case for B, H in plain for case in _line(B, 128, H, "reinforcement learning, rollouts of 128 steps")]
    return [
        *shapes,
        *_line(64, 128, 128, "recurrent PPO, episodes of 32 steps", resets=32),
        *_line(256, 128, 64, "recurrent PPO, episodes of 100 steps", resets=100),
    ]


def _streaming() -> list[Case]:
    return [
        *_line(1, 1, 128, "streaming, small"),
        *_line(1, 1, 512, "streaming, one step"),
        *_line(1, 1, 1024, "streaming, wide"),
        *_line(16, 1, 512, "streaming, sixteen at once"),
    ]


def _options() -> list[Case]:
    return [
        *_line(32, 50, 256, "tagger", bidirectional=True),
        *_line(32, 50, 256, "tagger, sentences", bidirectional=True, ragged=True),
        *_line(64, 80, 256, "classifier, sentences", ragged=True),
        *_line(20, 35, 650, "PTB medium, Zaremba et al. 2014", num_layers=2, dropout=0.5, modes=("training",)),
        *_line(64, 128, 128, "recurrent PPO, episodes of 32 steps", resets=32),
    ]


def _dtypes() -> list[Case]:
    return _line(32, 100, 256, "character language model", dtypes=ITEM_BYTES)


def _grid() -> list[Case]:
    return [case for H in (64, 128, 256, 512, 1024) for B in (1, 8, 32, 128) for case in _line(B, 32, H, "grid of B and H")]


def _small() -> list[Case]:
    """Calls so short that what surrounds the kernels is most of their time."""
    cases = []
    for T, N, H, threads in itertools.product((1, 4, 16), (1, 4, 16), (16, 64), (1, 2)):
        shape = Shape(N, T, H, H, "small call", quick=(T, N, H) in _QUICK_SMALL)
        for options in _SMALL_KINDS:
            for cell in ("lstm",) if "proj_size" in options else tuple(CELLS):
                own = {"proj_size": H // 2} if "proj_size" in options else {}
                for mode in ("training", "inference"):
                    cases.append(Case(cell, shape, mode, summed=True, threads=threads, **(options | own)))
    return cases


def _steps() -> list[Case]:
    """One call a step: T is the number of calls."""
    cases = []
    for H, B, cell, loop in itertools.product((64, 128, 256, 512, 1024), (1, 8, 32, 64, 256), CELLS, LOOPS):
        shape = Shape(B, 20, H, H, "one call a step", quick=(B, H) in _QUICK_STEPS)
        cases += [Case(cell, shape, mode, loop=loop) for mode in ("training", "inference")]
    return cases


def _int8() -> list[Case]:
    """The inference of the goals, and one sequence where a step is the reading of the weights."""
    goals = [Case(cell, shape, mode) for cell in CELLS for shape in SHAPES for mode in shape.modes if mode != "training"]
    wide = _line(1, 50, 512, "one sequence, wide", modes=("inference",))
    return [*goals, *wide, *_line(1, 1, 1024, "streaming, wide")]


def _scaling() -> list[Case]:
    cores = os.cpu_count() or 1
    cases = []
    for T in (16, 32, 64, 128, 256):
        cases += _line(32, T, 256, "scaling")
    for B in (1, 4, 16, 64, 128):
        cases += _line(B, 64, 256, "scaling")
    for H in (64, 128, 512, 1024):
        cases += _line(32, 64, H, "scaling")
    for threads in (1, 2, 4, 8, 16, 32, 64):
        if threads <= cores:
            cases += _line(32, 64, 256, "scaling", threads=threads)
    return cases


@dataclass(frozen=True)
class NamedSet:
    """A set of cases: what it is for, the function that lists it, and whether --quick takes those marked or the fast ones."""

    about: str
    cases: Callable[[], list[Case]]
    marked: bool = False

    def quick(self, case: Case) -> bool:
        """Whether ``--quick`` measures a case of the set."""
        return case.shape.quick if self.marked else case.flops < QUICK_FLOPS


SETS: dict[str, NamedSet] = {
    "goals": NamedSet("the shapes that goals are set for", _goals, marked=True),
    "published": NamedSet("sizes of papers and of other benchmarks", _published),
    "rl": NamedSet("reinforcement learning: large batches of short rollouts, with resets", _rl),
    "streaming": NamedSet("one step at a time", _streaming),
    "options": NamedSet("two directions, ragged, dropout, resets", _options),
    "dtypes": NamedSet("every dtype at one shape", _dtypes),
    "grid": NamedSet("B × H, for the heat maps", _grid),
    "small": NamedSet("small calls of every kind, on one thread and on two", _small, marked=True),
    "steps": NamedSet("20 calls of one step, of a cell and of a layer", _steps, marked=True),
    "int8": NamedSet("inference, for --peers torch-int8,int8", _int8),
    "scaling": NamedSet("T, B, H and threads, one at a time", _scaling),
}
ALL = "all"


def select(
    cells: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    quick: bool = False,
    sets: Sequence[str] = ("goals",),
    dtypes: Sequence[str] | None = None,
) -> list[Case]:
    """The cases of ``sets`` that the filters leave, those of one cell and shape next to each other.

    Args:
        cells, modes: names to keep, or None for all.
        shapes: names to keep, or None for all. A shape that no chosen set has (``BxTxH`` or ``BxTxIxH``) is added: every
            cell, in training and inference, or as a streaming step where T is 1.
        quick: without ``shapes``, keep only those marked ``quick``, and of other sets the small ones.
        sets: names in ``SETS``, or "all".
        dtypes: names; cases of the sets keep their own where None, and a case without one of these is left out.

    Raises:
        ValueError: if a filter holds an unknown name, or nothing is left.
    """
    _check("cells", cells, CELLS)
    _check("modes", modes, MODES)
    _check("sets", sets, (*SETS, ALL))
    _check("dtypes", dtypes, ITEM_BYTES)
    names = list(SETS) if ALL in sets else list(dict.fromkeys(sets))
    found: dict[str, Case] = {}
    for name in names:
        for case in SETS[name].cases():
            if quick and shapes is None and not SETS[name].quick(case):
                continue
            # The first set that has a case gives the shape's origin.
            found.setdefault(case.key, case)
    known = {case.shape.name for case in found.values()}
    for text in shapes or ():
        if text not in known:
            try:
                shape = parse_shape(text)
            except ValueError as error:
                raise ValueError(f"--shapes: {error}") from error
            own = [Case(cell, shape, mode, dtype) for cell in CELLS for dtype in dtypes or ("float32",) for mode in shape.modes]
            found.update((case.key, case) for case in own)
    cases = [
        case
        for case in found.values()
        if (cells is None or case.cell in cells)
        and (modes is None or case.mode in modes)
        and (dtypes is None or case.dtype in dtypes)
        and (shapes is None or case.shape.name in shapes)
    ]
    if not cases:
        raise ValueError("these values of --sets, --cells, --shapes, --dtypes and --modes leave no case")
    order = list(CELLS)
    # Cases that share weights and data stand together; the sort is stable.
    first: dict[Case, int] = {}
    for i, case in enumerate(cases):
        first.setdefault(case.data, i)
    return sorted(cases, key=lambda case: (order.index(case.cell), first[case.data]))


def _check(option: str, names: Sequence[str] | None, known: Iterable[str]) -> None:
    known = list(known)
    for name in names or ():
        if name not in known:
            raise ValueError(f"--{option}: expected some of {','.join(known)}, got {name!r}")
