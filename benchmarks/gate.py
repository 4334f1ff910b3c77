"""The correctness gate: nothing is timed whose results are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.problem import Problem, Results, module_step

# A result may err twice as much as torch.nn does in the same dtype: another order of the same sums.
TIMES_TORCH = 2.0

# And by this many units of rounding of the result's largest element: where torch.nn happens to be exact to the last bit, a
# vectorised exp or tanh is still off by a few of them.
FLOOR_EPS = 8.0


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        passed: every result is within its bound.
        worst: name of the result nearest to its bound, or farthest beyond.
        error: its largest absolute error against float64.
        torch_error: that of torch.nn in the same dtype.
        bound: what was allowed.
    """

    passed: bool
    worst: str
    error: float
    torch_error: float
    bound: float

    def __str__(self) -> str:
        return f"{self.worst}: error {self.error:.1e}, allowed {self.bound:.1e} (torch.nn's {self.torch_error:.1e})"


class Gate:
    """Judges the results of any peer on one problem; torch.nn's own error is measured once."""

    def __init__(self, problem: Problem, training: bool, measure: Callable[[], tuple[Any, ...]] | None = None) -> None:
        """Compute the reference and torch's error.

        Args:
            measure: the call whose error is the measure, in place of torch.nn's in the problem's dtype.
        """
        self._reference = problem.reference(training)
        with torch.set_grad_enabled(training), problem.seeded():
            yardstick = problem.named((measure or module_step(problem.module, problem, training))())
        self._names = tuple(yardstick)
        self._torch_errors = {name: _error(yardstick[name], self._reference[name]) for name in yardstick}
        eps = torch.finfo(problem.input.dtype).eps
        self._bounds = {
            name: TIMES_TORCH * error + FLOOR_EPS * eps * self._reference[name].abs().max().item()
            for name, error in self._torch_errors.items()
        }

    def judge(self, results: Results) -> Verdict:
        """Compare with the float64 reference. A missing result, a wrong shape, NaN or Inf is an infinite error."""
        errors = {name: _error(results.get(name), self._reference[name]) for name in self._names}
        worst = max(errors, key=lambda name: errors[name] / self._bounds[name])
        passed = all(errors[name] <= self._bounds[name] for name in errors)
        return Verdict(passed, worst, errors[worst], self._torch_errors[worst], self._bounds[worst])


def _error(result: torch.Tensor | None, reference: torch.Tensor) -> float:
    if result is None or result.shape != reference.shape:
        return float("inf")
    error = (result.detach().to(torch.float64) - reference.detach()).abs().max().item()
    return error if error == error else float("inf")
