"""How the threads of a team share the work and wait for each other."""

from __future__ import annotations

from fused_rnn.kernels.numba.arguments import Arg, compiled_helper, get
from fused_rnn.kernels.numba.memory import call_int, fetch_add, read_acquire, wait_for

# Two cache lines, because x86 prefetches lines in pairs.
COUNTER_BYTES = 128

_A = Arg


@compiled_helper
def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``."""
    best = 1
    for candidate in range(2, number + 1):
        if candidate <= most and number % candidate == 0:
            best = candidate
    return best


@compiled_helper
def arrive(p: int) -> tuple[int, int]:
    """This thread's number and how many there are."""
    function = get(p, _A.TEAM_SIZE_FUNCTION)
    threads = get(p, _A.TEAM_SIZE) if function == 0 else call_int(function)
    return fetch_add(p + 8 * _A.TICKET, 1), threads


@compiled_helper
def share(p: int, thread: int, threads: int, panels: int) -> tuple[int, int, int, int, int, int]:
    """Share of the directions, rows and units: (number, of how many) of each."""
    by_direction = 1
    for candidate in range(2, threads + 1):
        if threads % candidate == 0 and get(p, _A.DIRECTIONS) % candidate == 0:
            by_direction = candidate
    team = threads // by_direction
    by_row = _divisor(team, get(p, _A.BATCH)) if get(p, _A.ROW_MAJOR) else team // _divisor(team, panels)
    by_unit = team // by_row
    member = thread // by_direction
    return thread % by_direction, by_direction, member // by_unit, by_row, member % by_unit, by_unit


@compiled_helper
def meet(p: int, group: int, meeting: int, members: int) -> None:
    """Wait until all threads of a group have come to their ``meeting``-th meeting, counted from 1."""
    if members > 1:
        counter = get(p, _A.COUNTERS) + COUNTER_BYTES * group
        fetch_add(counter, 1)
        if read_acquire(counter) < meeting * members:
            wait_for(counter, meeting * members, get(p, _A.GIVE_WAY))


@compiled_helper
def panels_of(width: int, lanes: int, vectors: int) -> int:
    """Panels that a width takes."""
    return (width + lanes * vectors - 1) // (lanes * vectors)


@compiled_helper
def part(number: int, share: int, shares: int) -> tuple[int, int]:
    """First of one share of ``number`` things, and first of the next share."""
    return number * share // shares, number * (share + 1) // shares
