"""Cells as equations: what is traced, what follows from it, and what is refused when a cell is defined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations_support import CELLS, TWO_STAGES, coupled, deep, gru, late, lstm, memory, reset_before, swish

import fused_rnn
from fused_rnn.cells import GRU, GRU_RESET_BEFORE, LSTM, RNN_TANH, mgu, relu, sigmoid, tanh
from fused_rnn.cells.definition import Definition
from fused_rnn.cells.derivation import signature
from fused_rnn.cells.in_torch import backward_in_torch
from fused_rnn.cells.language import evaluate, order
from fused_rnn.data.cell import Cell

every_cell = pytest.mark.parametrize("name", CELLS)


# As they were first written, by hand.
ROWS = {
    "rnn_tanh": Cell(
        "rnn_tanh", "RNN_TANH", ("h",), ("h",), ("h",), ("h",), reads_before=None, direct=False, tape_is_out=True
    ),
    "lstm": Cell(
        "lstm", "LSTM", tuple("ifgo"), ("h", "c"), tuple("ifgoc"), tuple("ifgo"), reads_before="c", direct=False, forget="f",
        in_one_piece=True,
    ),
    "gru": Cell(
        "gru", "GRU", tuple("rzn"), ("h",), ("r", "z", "n", "hn"), ("hn", "r", "z", "n"), reads_before="h", direct=True,
        apart="hn",
    ),
    "gru_reset_before": Cell(
        "gru_reset_before", "GRU_RESET_BEFORE", tuple("rzn"), ("h",), tuple("rznm"), tuple("rzn"), reads_before="h",
        direct=True, later=("n",), operand="m",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", [RNN_TANH, LSTM, GRU, GRU_RESET_BEFORE], ids=lambda row: row.name)
def test_the_rows_of_known_cells_follow(row: Cell) -> None:
    """All that kernels written by hand read."""
    assert dataclasses.replace(row, projected=None) == ROWS[row.name]


def values_of(definition: Definition) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Random shares of input and product, and states, all of them leaves."""
    row = definition.row

    def leaf() -> torch.Tensor:
        return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    return [leaf() for _ in row.gates], [leaf() for _ in row.gates], [leaf() for _ in row.states]


@every_cell
def test_one_step_and_its_backward(name: str) -> None:
    """The graph computes what the body computes, and the derived backward is that of torch.autograd."""
    definition = CELLS[name]
    derived, row = definition.derived, definition.row
    x, w, states = values_of(definition)
    after, tape = definition.equations.step(torch.cat(x, -1), torch.cat(w, -1), tuple(states))
    graph = derived.graph
    leaves = {graph.leaf("state", state): value for state, value in zip(row.states, states, strict=True)}
    for gate, of_x, of_h in zip(row.gates, x, w, strict=True):
        leaves[graph.leaf("x", gate)], leaves[graph.leaf("w", gate)] = of_x, of_h
    torch.testing.assert_close(evaluate(list(graph.after), leaves, x[0]), list(after))
    d_after = [torch.randn_like(each) for each in after]
    expected = torch.autograd.grad(after, (*x, *w, *states), d_after, allow_unused=True, materialize_grads=True)
    found, before = backward_in_torch(
        derived, [each.detach() for each in tape], [each.detach() for each in states], after[0].detach(), d_after
    )
    count = len(row.gates)
    assert tuple(found) == row.d_gates
    torch.testing.assert_close([found[gate] for gate in row.d_ih], list(expected[:count]))
    torch.testing.assert_close([found[block] for block in row.d_hh], list(expected[count : 2 * count]))
    torch.testing.assert_close(before, list(expected[2 * count :]))


@pytest.mark.parametrize("name", TWO_STAGES)
def test_the_second_stage(name: str) -> None:
    """The operand is what the body multiplies, and the second stage of the backward is that of torch.autograd."""
    definition = CELLS[name]
    equations, row = definition.equations, definition.row
    x, w, states = values_of(definition)
    first = w[: len(row.first)]
    assert equations.operand is not None
    assert equations.later_backward is not None
    operand = equations.operand(torch.cat(x, -1), torch.cat(first, -1), tuple(states))
    _, tape = equations.step(torch.cat(x, -1), torch.cat(w, -1), tuple(states))
    torch.testing.assert_close(tape[row.tape.index(row.operand)], operand)
    d_operand = torch.randn_like(operand)
    asked = (*x, *states)
    expected = torch.autograd.grad(operand, asked, d_operand, allow_unused=True, materialize_grads=True)
    found, direct = equations.later_backward(tuple(each.detach() for each in tape), tuple(states), d_operand)
    torch.testing.assert_close(direct, expected[len(x)])
    for gate, wanted in zip(row.gates, expected, strict=False):
        torch.testing.assert_close(found.get(gate, torch.zeros_like(wanted)), wanted)


@every_cell
def test_only_what_is_needed_is_kept(name: str) -> None:
    """Nothing is kept that follows from other kept values, but for c, the operand, and what the last gate has apart."""
    derived = CELLS[name].derived
    must = {derived.cell.cell_state, derived.cell.apart, derived.cell.operand}
    roots = [*derived.d_gates.values(), *(each for each in derived.d_before if each is not None)]
    read = set(order(roots, derived.available().__contains__))
    if derived.cell.later:
        second = [*derived.later_d_gates.values(), *([] if derived.later_direct is None else [derived.later_direct])]
        read |= set(order(second, derived.available_later().__contains__))
        early = {node for node in derived.kept.values() if not derived.graph.is_late(node)}
        read |= set(order([*derived.graph.after, *(set(derived.kept.values()) - early)], early.__contains__))
    for block, node in derived.kept.items():
        assert block in must or node in read


def test_two_stages() -> None:
    """Which gates are later, and what the tape holds for them."""
    assert (mgu.row.later, mgu.row.tape) == (("n",), ("f", "n", "m"))
    assert (deep.row.later, deep.row.tape) == (("o", "g"), ("i", "s", "o", "g", "c", "m"))
    assert (late.row.later, late.row.operand) == (("b",), "m")
    assert reset_before.row.d_gates == ("r", "z", "n")
    # Both stages of the backward have a share in f.
    assert "f" in mgu.derived.d_gates
    assert "f" in mgu.derived.later_d_gates


def test_what_is_kept() -> None:
    assert lstm.row.tape == ("i", "f", "g", "o", "c")
    assert gru.row.tape == ("r", "z", "n", "hn")
    assert coupled.row.tape == ("f", "g", "o", "c")
    # The sum of s is read twice, so it is kept in place of an activation.
    assert swish.derived.kept["s"] is swish.derived.sums["s"]
    assert memory.row.direct


def test_the_name_is_of_the_equations() -> None:
    """Cells with the same equations share kernels, whatever they are called in between."""

    def define(factor: float) -> Definition:
        @fused_rnn.cell(gates="n")
        def mine(x: Any, W: Any, h: Any) -> Any:
            return factor * tanh(x.n + W.n(h))

        return mine

    assert define(0.5).row.name == define(0.5).row.name != define(0.25).row.name
    assert signature(gru.derived.graph) != signature(lstm.derived.graph)


def test_a_cell_is_its_body() -> None:
    x, w, states = values_of(gru)

    class Shares:
        r, z, n = x

    class Products:
        r, z, n = (staticmethod(lambda h, value=value: value) for value in w)

    torch.testing.assert_close(
        gru(Shares, Products, *states), gru.equations.step(torch.cat(x, -1), torch.cat(w, -1), tuple(states))[0][0]
    )
    assert repr(gru) == "<cell equations_support.gru>"
    assert dataclasses.is_dataclass(gru.row)


def fails(body: Callable[..., Any], gates: Any = "n", states: Any = "h") -> Callable[[], Any]:
    return lambda: fused_rnn.cell(gates, states)(body)


def branching(x: Any, W: Any, h: Any) -> Any:
    return x.n if W.n(h) else h


@pytest.mark.parametrize(
    ("define", "error", "message"),
    [
        (fails(lambda x, W, h: tanh(x.n + W.n(h)), gates=""), ValueError, "gates: expected one or more names"),
        (fails(lambda x, W, h: h, gates="n n"), ValueError, "gates: expected one or more names, each once"),
        (fails(lambda x, W, h: h, gates="n 1"), ValueError, "gates: expected names, separated by blanks, got '1'"),
        (fails(lambda x, W, h: h, gates="a b c d e"), ValueError, "gates: expected at most four"),
        (fails(lambda x, W, h: h, states="c"), ValueError, "states: expected 'h' and at most one other"),
        (fails(lambda x, W, h: h, states="h c d"), ValueError, "states: expected 'h' and at most one other"),
        (fails(lambda x, W, h, n: h, states="h n"), ValueError, "gates, states: expected different names"),
        (fails(lambda x, W, h: h), ValueError, r"<lambda>: x\.n: expected every gate in the equations"),
        (fails(lambda x, W, h: tanh(x.n)), ValueError, r"W\.n: expected every gate .* it is never used"),
        (fails(lambda x, W, h: (h, h)), ValueError, "expected the states after the step, h, got 2 values"),
        (fails(lambda x, W, h, c: tanh(x.n + W.n(h)), states="h c"), ValueError, "expected the states after the step, h, c"),
        (fails(lambda x, W, h: None), TypeError, "expected a value of the step or a number, got NoneType"),
        (fails(lambda x, W, h: tanh(x.m + W.n(h))), AttributeError, r"x\.m: expected one of its gates, n"),
        (fails(lambda x, W, h: tanh(x.n + W.m(h))), AttributeError, r"W\.m: expected one of its gates, n"),
        (fails(lambda x, W, h: tanh(x.n + W.n(h * h))), ValueError, r"W: expected a product with h, got W\.n of others"),
        (
            fails(lambda x, W, h: tanh(x.a + W.a(2 * h) + x.b + W.b(h)), gates="a b"),
            ValueError,
            r"W\.a: only the last gates may",
        ),
        (
            fails(lambda x, W, h: tanh(x.a + W.a(h)) * (x.b + W.b(2 * h)) * (x.c + W.c(3 * h)), gates="a b c"),
            ValueError,
            r"W\.c: expected what W\.b multiplies, or h; a step has two stages",
        ),
        (
            fails(lambda x, W, h: tanh(x.a + W.a(h)) + x.b + W.b(x.b), gates="a b"),
            ValueError,
            r"W\.b: expected an operand that is not made of the gate 'b' itself",
        ),
        (
            fails(lambda x, W, h, c: (x.a + W.a(h) + x.b + W.b(c), c), gates="a b", states="h c"),
            ValueError,
            r"W\.b: expected an operand made of h and gates, got one of 'c'",
        ),
        (
            fails(lambda x, W, h: x.a + W.a(h) + x.b + W.b(2), gates="a b"),
            ValueError,
            r"W\.b: expected an operand with a value for each unit, got a number",
        ),
        (
            fails(lambda x, W, h: x.a + W.a(h) + x.b * W.b(2 * h), gates="a b"),
            ValueError,
            r"W\.b: only the last gate's share of h may be apart from x\.b: use .*, of a step with two stages none",
        ),
        (
            fails(lambda x, W, h: W.a(h) * W.a(2 * h) + x.a, gates="a"),
            ValueError,
            r"W\.a: expected the same operand wherever it is used, got two",
        ),
        (fails(lambda x, W, h: (x.n + W.n(h)).exp()), AttributeError, r"exp: expected an operation of the language \(\+, -"),
        (fails(lambda x, W, h: x.n + W.n(h) + "1"), TypeError, "expected a value of the step or a number, got str"),
        (fails(lambda x, W, h: tanh(x.n + W.n(h)) * float("inf")), ValueError, "<lambda>: expected a finite number, got inf"),
        (fails(lambda x, W, h: tanh(x.n + W.n(h)) + float("nan")), ValueError, "<lambda>: expected a finite number, got nan"),
        (fails(lambda x, W, h: x.n + W.n(h) + True), TypeError, "expected a value of the step or a number, got bool"),
        (
            fails(lambda x, W, h: tanh(x.n + W.n(h)) ** 2),
            TypeError,
            r"expected an operation of the language .* another operator",
        ),
        (fails(lambda x, W, h: tanh(x.n + W.n(h)) > h), TypeError, "expected an operation of the language"),
        (fails(branching), TypeError, "branching: an equation cannot branch on a value"),
        (
            fails(lambda x, W, h: tanh(x.a * W.a(h) + x.b + W.b(h)), gates="a b"),
            ValueError,
            r"W\.a: only the last gate's share of h may be apart from x\.a",
        ),
    ],
)
def test_wrong_definitions(define: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        define()


def test_values_of_another_cell_are_refused() -> None:
    stolen: list[Any] = []

    def first(x: Any, W: Any, h: Any) -> Any:
        stolen.append(h)
        return tanh(x.n + W.n(h))

    fused_rnn.cell("n")(first)
    with pytest.raises(TypeError, match="second: expected values of this cell, got one of first"):

        @fused_rnn.cell("n")
        def second(x: Any, W: Any, h: Any) -> Any:
            return tanh(x.n + W.n(h)) + stolen[0]


def test_functions_of_tensors() -> None:
    x = torch.randn(3)
    for function in (sigmoid, tanh, relu):
        assert torch.equal(function(x), getattr(torch, function.__name__)(x))
