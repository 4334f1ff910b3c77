"""The table of cells: what a row may say, and that the C++ kernels say the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fused_rnn.cells import CELLS, GRU, GRU_RESET_BEFORE, LSTM, RNN_TANH
from fused_rnn.data.cell import Cell


def test_a_row_must_say_what_passes_beside_the_product() -> None:
    """Kernels take a wrong guess for the truth: no value is assumed."""
    with pytest.raises(TypeError, match="'reads_before' and 'direct'"):
        Cell("leaky", "LEAKY", ("n",), ("h",), ("n",), ("n",))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("cell", "changed", "message"),
    [
        (LSTM, {"gates": ()}, r"cell lstm: gates: expected one or more names, each once, got \(\)"),
        (LSTM, {"tape": ("i", "f", "g", "o", "c", "c")}, "tape: expected one or more names, each once"),
        (LSTM, {"states": ("c", "h")}, "states: expected 'h' and at most one other"),
        (LSTM, {"states": ("h", "c", "d")}, "states: expected 'h' and at most one other"),
        (LSTM, {"tape": ("f", "i", "g", "o", "c")}, r"tape: expected the gates \('i', 'f', 'g', 'o'\) first"),
        (LSTM, {"tape": ("i", "f", "g", "o")}, "tape: expected 'c' behind the gates"),
        (GRU, {"tape": ("r", "z", "n")}, "tape: expected 'hn' behind the gates"),
        (LSTM, {"d_gates": ("f", "i", "g", "o")}, r"d_gates: expected \('i', 'f', 'g', 'o'\)"),
        (GRU, {"d_gates": ("r", "z", "n")}, r"d_gates: expected \('hn', 'r', 'z', 'n'\), got \('r', 'z', 'n'\)"),
        (GRU, {"apart": None}, r"d_gates: expected \('r', 'z', 'n'\), got \('hn', 'r', 'z', 'n'\)"),
        (GRU, {"tape_is_out": True}, "tape_is_out: expected False, as the tape or the state is not h alone"),
        (GRU, {"reads_before": "c"}, r"reads_before: expected None or one of the states \('h',\), got 'c'"),
        (GRU, {"direct": False}, "direct: expected True, as the backward reads h before the step"),
        (GRU_RESET_BEFORE, {"later": ("z",)}, r"later: expected the last of \('r', 'z', 'n'\), but not all, got \('z',\)"),
        (GRU_RESET_BEFORE, {"later": ("r", "z", "n")}, "later: expected the last of"),
        (GRU_RESET_BEFORE, {"later": ()}, "operand: expected a block if there are later gates, else None, got 'm'"),
        (GRU_RESET_BEFORE, {"operand": None}, "operand: expected a block if there are later gates, else None, got None"),
        (GRU_RESET_BEFORE, {"operand": "q"}, r"tape: expected 'q' behind the gates, got \('r', 'z', 'n', 'm'\)"),
        (GRU_RESET_BEFORE, {"operand": "n"}, "tape: expected 'n' behind the gates"),
        (GRU_RESET_BEFORE, {"apart": "m"}, "apart: expected None, as the last gate is one of the later ones"),
        (GRU_RESET_BEFORE, {"projected": sum}, "projected: expected None"),
        (RNN_TANH, {"forget": "f"}, r"forget: expected None or one of the gates \('h',\), got 'f'"),
        (GRU, {"projected": sum}, "projected: expected None"),
    ],
)
def test_rows_that_contradict_themselves(cell: Cell, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(cell, **changed)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_blocks_of_both_weights(cell: Cell) -> None:
    """Each row of a weight has its block of d_gates; groups and order say the same in other ways."""
    assert len(cell.d_ih) == len(cell.d_hh) == cell.num_gates
    assert {*cell.d_ih, *cell.d_hh} == set(cell.d_gates)
    assert cell.d_gates[-cell.num_gates :] == cell.d_ih
    assert tuple(block for group in cell.d_hh_groups for block in group) == cell.d_hh
    for group in cell.d_hh_groups:
        first = cell.d_gates.index(group[0])
        assert cell.d_gates[first : first + len(group)] == group
    assert [cell.d_hh[block] for block in cell.weight_blocks] == list(cell.d_gates[: len(cell.first)])
    assert cell.first + cell.later == cell.gates


def test_the_kernels_know_the_same_cells() -> None:
    """csrc/cells.def, and the constants of the structs, field by field."""
    _C = pytest.importorskip("fused_rnn._C")

    def place(blocks: tuple[str, ...], block: str | None) -> int | None:
        return None if block is None else blocks.index(block)

    expected = [
        {
            "name": cell.name,
            "gates": len(cell.gates),
            "tape": len(cell.tape),
            "bias": len(cell.bias),
            "d_gates": len(cell.d_gates),
            "weight_blocks": list(cell.weight_blocks),
            "apart": place(cell.d_hh, cell.apart),
            "later": len(cell.later),
            "operand": place(cell.tape, cell.operand),
            "cell_state": place(cell.tape, cell.cell_state),
            "reads_before": cell.reads_before if cell.reads_before in (None, "h") else "c",
            "direct": cell.direct,
            "projection": cell.projected is not None,
            "tape_is_out": cell.tape_is_out,
        }
        for cell in CELLS.values()
    ]
    assert sorted(_C.cells(), key=str) == sorted(expected, key=str)
    names = ", ".join(row["name"] for row in _C.cells()[:-1]) + " or " + _C.cells()[-1]["name"]
    with pytest.raises(ValueError, match=f"cell: expected {names}, got lstn"):
        _C.layer_forward("lstn", torch.zeros(1, 1), None, [], 1, 1, None, (False,), None, False, False, False, 1)
