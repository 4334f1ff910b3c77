"""A user's own cell: the decorator that makes one of its equations, and the table in which backends find it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fused_rnn.cells.derivation import Derived, Row, derive
from fused_rnn.cells.language import trace
from fused_rnn.data.cell import Cell

if TYPE_CHECKING:
    from fused_rnn.data.equations import Equations

__all__ = ["DEFINED", "Definition", "Row", "built_in", "cell"]

# By the names of their rows.
DEFINED: dict[str, Definition] = {}


class Definition:
    """A cell made by ``fused_rnn.cell``.

    Called, it is its body: with ``x`` and ``W``, which have the gates as attributes, and the states before the step.

    Attributes:
        body: the equations.
        derived: what follows from them.
    """

    def __init__(
        self, body: Callable[..., Any], gates: tuple[str, ...], states: tuple[str, ...], row: Row | None = None
    ) -> None:
        functools.update_wrapper(self, body)
        self.body = body
        self.derived: Derived = derive(trace(body.__name__, gates, states, body), row)
        DEFINED[self.row.name] = self

    @property
    def row(self) -> Cell:
        """The cell as data."""
        return self.derived.cell

    @functools.cached_property
    def equations(self) -> Equations:
        """One step in plain torch."""
        # Here, and not above: setup.py reads the definitions where there is no torch.
        from fused_rnn.cells.in_torch import equations_of

        return equations_of(self.derived, self.body)

    def __call__(self, x: Any, W: Any, *states: Any) -> Any:
        """The body."""
        return self.body(x, W, *states)

    def __reduce__(self) -> str:
        # Found by its name where it is defined, as functions are.
        return self.body.__qualname__

    def __repr__(self) -> str:
        return f"<cell {self.body.__module__}.{self.body.__qualname__}>"


def _names(value: str | Sequence[str], argument: str) -> tuple[str, ...]:
    names = tuple(value.split()) if isinstance(value, str) else tuple(value)
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{argument}: expected names, separated by blanks, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{argument}: expected one or more names, each once, got {value!r}")
    return names


def cell(gates: str | Sequence[str], states: str | Sequence[str] = "h") -> Callable[[Callable[..., Any]], Definition]:
    """Make a recurrent cell of its equations; ``fused_rnn.Recurrent`` runs it.

    The decorated function takes ``x``, ``W`` and the states before the step, and returns the states after it, h first. ``x.g``
    is W_ig x + b_ig of gate g, and ``W.g(h)`` is W_hg h + b_hg. Values are combined by ``+ - * /``, numbers, and the functions
    ``sigmoid``, ``tanh`` and ``relu`` of ``fused_rnn.cells``. Units meet in ``W`` alone: the rest is the same for each of them.

    The last gates may multiply another value than h, the same one for all of them, made of h and of the gates before: ``r * h``
    in ``W.n(r * h)``. Such a step has two stages, a product in each.

    Args:
        gates: their names, in the order of the weights' rows: at most four.
        states: their names: ``"h"``, which ``W`` multiplies and which is the output, and at most one other.

    Raises:
        ValueError: if a name is missing or there twice; if a gate is never used, or a state is not returned; if of another gate
            than the last one, or of any in a step with two stages, the shares ``x`` and ``W`` are not simply added up; if ``W``
            multiplies what no second stage can.
        TypeError: if the equations do something else with a value.

    >>> from fused_rnn.cells import sigmoid, tanh
    >>> @cell(gates="f g")
    ... def forgetful(x, W, h):
    ...     f = sigmoid(x.f + W.f(h))
    ...     return f * h + (1 - f) * tanh(x.g + W.g(h))
    >>> forgetful.row.gates
    ('f', 'g')
    """
    return _definer(gates, states, None)


def built_in(row: Row, gates: str, states: str = "h") -> Callable[[Callable[..., Any]], Definition]:
    """As ``cell``, for those of this package: their rows have names of their own."""
    return _definer(gates, states, row)


def _definer(
    gates: str | Sequence[str], states: str | Sequence[str], row: Row | None
) -> Callable[[Callable[..., Any]], Definition]:
    gate_names, state_names = _names(gates, "gates"), _names(states, "states")
    if state_names[0] != "h" or len(state_names) > 2:
        raise ValueError(f"states: expected 'h' and at most one other, got {states!r}")
    if len(gate_names) > 4:
        raise ValueError(f"gates: expected at most four, which is what the kernels hold, got {len(gate_names)}")
    if {*gate_names} & {*state_names} - {"h"}:
        raise ValueError(f"gates, states: expected different names, got {gates!r} and {states!r}")

    def define(body: Callable[..., Any]) -> Definition:
        return Definition(body, gate_names, state_names, row)

    return define
