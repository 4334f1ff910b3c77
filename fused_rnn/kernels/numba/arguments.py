"""What a kernel is told, and how it finds its rows: the argument block and the addresses that follow from it.

Addresses and strides are int64, in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, auto
from typing import Any

from numba import njit

from fused_rnn.kernels.numba.memory import read_byte, read_int64, write_int64


class Arg(IntEnum):
    """Where an argument lies in the block of int64 that a kernel gets."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count

    TICKET = auto()  # counts the threads that arrived
    TEAM_SIZE = auto()
    TEAM_SIZE_FUNCTION = auto()  # or 0, then TEAM_SIZE holds
    GIVE_WAY = auto()
    ROW_MAJOR = auto()  # share by row, not by unit
    LENGTH = auto()  # T
    BATCH = auto()  # N
    DIRECTIONS = auto()  # D
    SIZES = auto()  # (T,) int64, or 0: dense
    OFFSETS = auto()  # (T,) int64, or 0
    REVERSE = auto()  # (D,) bytes
    RESET = auto()  # (R,) bytes, or 0
    GATES = auto()  # G
    CELL_STATE = auto()  # bytes from a row of the tape to its block c, for cells that have one
    UNITS = auto()  # H
    STATE_SIZE = auto()  # P
    ITEM = auto()  # bytes of a float
    LANES = auto()  # floats of a vector
    TAPE = auto()
    TAPE_ROW = auto()  # stride of rows
    TAPE_DIRECTION = auto()  # stride of directions
    OUT = auto()
    OUT_ROW = auto()
    OUT_DIRECTION = auto()
    STATE_H = auto()  # (D, N, P)
    STATE_C = auto()  # (D, N, H), or 0
    WEIGHTS = auto()  # panels of the recurrent product
    WEIGHTS_DIRECTION = auto()
    LATER = auto()  # panels of the later gates' product, or 0
    LATER_DIRECTION = auto()
    STORED = auto()  # (D,) addresses of weights (G·H, P) as torch stores them, in place of panels; or 0
    PROJECTION = auto()  # panels of weight_hr, or 0
    PROJECTION_DIRECTION = auto()
    BIAS = auto()  # (D, blocks of the cell's bias·H)
    BIAS_DIRECTION = auto()
    ZEROS = auto()  # max(bias blocks·H, P) zeros
    HIDDEN = auto()  # (D, N, H): o·tanh(c) before its projection
    PLAIN_VECTORS = auto()  # vectors of columns in a panel of a product that no cell follows
    PLAIN_ROWS = auto()  # most rows of such a product
    SCRATCH = auto()
    SCRATCH_THREAD = auto()  # stride of threads
    SCRATCH_ROWS = auto()  # where the tables of addresses start in a thread's scratch
    COUNTERS = auto()  # one line for each group of threads that wait for each other
    BEGIN = auto()  # t_begin
    END = auto()  # t_end
    D_GATES = auto()
    D_GATES_ROW = auto()
    D_GATES_DIRECTION = auto()
    D_PROJECTED = auto()  # bytes from a row of d_gates to the gradient of h, behind its blocks, with a projection
    D_OUT = auto()
    D_OUT_ROW = auto()
    D_OUT_DIRECTION = auto()
    D_CELLS = auto()
    D_CELLS_ROW = auto()
    D_CELLS_DIRECTION = auto()
    FIRST_H = auto()  # states_0
    FIRST_C = auto()


_A = Arg
compiled_helper = njit(error_model="numpy")


def compiled_as(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile under a name of its own.

    Numba derives the linker's symbol from the name, and a number that starts anew in every process. Functions that share a
    name and come from the cache of different processes would be taken for each other.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        function.__name__ = function.__qualname__ = name
        return compiled_helper(function)

    return decorate


@compiled_helper
def get(p: int, index: int) -> int:
    """An argument."""
    return read_int64(p + 8 * index)


@compiled_helper
def rows_at(p: int, t: int) -> int:
    """How many rows step ``t`` has."""
    sizes = get(p, _A.SIZES)
    return get(p, _A.BATCH) if sizes == 0 else read_int64(sizes + 8 * t)


@compiled_helper
def first_at(p: int, t: int) -> int:
    """The first row of step ``t``."""
    offsets = get(p, _A.OFFSETS)
    return t * get(p, _A.BATCH) if offsets == 0 else read_int64(offsets + 8 * t)


@compiled_helper
def is_reset(p: int, row: int) -> bool:
    """Whether the state before this row is zero."""
    reset = get(p, _A.RESET)
    return reset != 0 and read_byte(reset + row) != 0


@compiled_helper
def last_step(p: int, reverse: bool, row: int, begin: int, end: int) -> int:
    """The step of sequence ``row`` in begin .. end - 1 that the forward walks last; the row has one."""
    if reverse:
        return begin
    t = end - 1
    while rows_at(p, t) <= row:
        t -= 1
    return t


@compiled_helper
def previous(p: int, d: int, t: int, row: int, steps: tuple[int, int], states: tuple[int, int], h: int, c: int) -> None:
    """Write the addresses of the states before step ``t`` of sequence ``row`` to ``h`` and ``c``.

    steps: the step walked before in the forward, and how many rows it has. states: h and c before the first.
    """
    near, near_rows = steps
    item = get(p, _A.ITEM)
    units = get(p, _A.UNITS)
    if is_reset(p, first_at(p, t) + row):
        write_int64(h, get(p, _A.ZEROS))
        write_int64(c, get(p, _A.ZEROS))
    elif row < near_rows:
        index = first_at(p, near) + row
        write_int64(h, get(p, _A.OUT) + index * get(p, _A.OUT_ROW) + d * get(p, _A.OUT_DIRECTION))
        tape = get(p, _A.TAPE) + index * get(p, _A.TAPE_ROW) + d * get(p, _A.TAPE_DIRECTION)
        write_int64(c, tape + get(p, _A.CELL_STATE))
    else:
        number = d * get(p, _A.BATCH) + row
        write_int64(h, states[0] + number * get(p, _A.STATE_SIZE) * item)
        write_int64(c, states[1] + number * units * item)


@compiled_helper
def before(p: int, reverse: bool, t: int) -> tuple[int, int]:
    """The step that the forward walks before ``t``, and how many rows it has (0: there is none)."""
    near = t + 1 if reverse else t - 1
    if near < 0 or near >= get(p, _A.LENGTH):
        return 0, 0
    return near, rows_at(p, near)
