"""The interface between the suite and whom it measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.gate import Gate
from benchmarks.problem import Problem


@dataclass(frozen=True)
class Provider:
    """A peer made ready for one case.

    Attributes:
        step: the call that is timed.
        forward: the forward alone, its graph kept by what it returns; None where there is no graph. For the memory held.
        tensors: turns what ``step`` returns into torch's results, in the order of ``Problem.result_names``.
        scope: entered once around a block of calls, outside the timing.
        note: what a reader of the figure has to know.
        figures: what the row has beside the times.
    """

    step: Callable[[], Any]
    forward: Callable[[], Any] | None = None
    tensors: Callable[[Any], tuple[Tensor, ...]] = tuple
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    note: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """Someone who can be measured.

    Attributes:
        name: key in the results and on the command line.
        title: what tables call it.
        unavailable: why it cannot run here, or None.
        version: of the library; asked only where it is available.
        refuses: why it cannot run a case, or None; ``Case.threads`` is set when it is asked.
        prepare: ``(problem, case, threads) -> Provider``, with the problem's weights.
        compiles: whether the first call may take minutes; that time is not the case's.
        gate: what judges its results, where that is not the error of torch.nn.
    """

    name: str
    title: str
    unavailable: Callable[[], str | None]
    version: Callable[[], str]
    refuses: Callable[[Case], str | None]
    prepare: Callable[[Problem, Case, int], Provider]
    compiles: bool = False
    gate: Callable[[Problem], Gate] | None = None

    def reason(self, case: Case) -> str | None:
        """Why there is no figure for this case, or None."""
        return self.unavailable() or self.refuses(case)
