"""Run the programs of a launch at the same time under Triton's interpreter, which itself runs one after another.

Every program has a thread of its own, of which one runs at a time; a schedule says who is next. The threads change places at
each load, store and atomic operation, so a program that waits at a barrier lets the others go on.

Memory is weak on purpose: what a program stores is seen by itself alone until it publishes it (an atomic operation that
releases, or its end), as late as a GPU may make it seen. So a program that reads what nobody has published to it reads what was
there before, and the result is wrong. What this cannot show is a missing acquire: what was published is seen at once.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

_builder = interpreter.interpreter_builder
_memory = interpreter._interpreter

# Given the programs that may run and the one that ran last, who is next.
Schedule = Callable[[Sequence[int], int], int]

# A poll is an addition of nothing. So many in a row, with nothing else between them, and nobody will ever arrive.
_POLLS_OF_A_PROGRAM = 8


class Stuck(Exception):
    """Every program waits for another."""


class _Given(Exception):
    """The launch has failed elsewhere."""


def first_ahead(ready: Sequence[int], last: int) -> int:
    """The first program runs ahead as far as it can, then the second, ..."""
    return min(ready)


def last_ahead(ready: Sequence[int], last: int) -> int:
    """The last program runs ahead as far as it can, then the one before, ..."""
    return max(ready)


def in_turn(ready: Sequence[int], last: int) -> int:
    """One operation each."""
    return min(ready, key=lambda i: (i <= last, i))


def at_random(seed: int) -> Schedule:
    """A program at random, which then often runs on for a while."""
    draw = random.Random(seed)
    return lambda ready, last: last if last in ready and draw.random() < 0.6 else draw.choice(ready)


def _once(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Replace the functions of Triton's language once a launch: at each call inside a kernel, it takes most of the time."""
    done = set()

    def patch(function: Any) -> Any:
        names = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if names not in done:
            done.add(names)
            return patch_lang(function)
        return None

    return patch


class _Launch:
    """One launch: its programs, and who runs."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.bodies: list[tuple[tuple[int, int, int], Callable[[], Any]]] = []
        self.now = 0
        self.polls = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        count = len(self.bodies)
        self.alive, self.waiting = set(range(count)), set()
        self.turns = [threading.Semaphore(0) for _ in range(count)]
        # Stores that the others do not see: (addresses, mask, what was there, what was written).
        self.unseen: list[list[tuple[Any, Any, Any, Any]]] = [[] for _ in range(count)]
        threads = [threading.Thread(target=self._program, args=(i,), daemon=True) for i in range(count)]
        patch_lang = interpreter._patch_lang
        interpreter._patch_lang = _once(patch_lang)
        for thread in threads:
            thread.start()
        self._give(self.schedule(sorted(self.alive), count - 1))
        for thread in threads:
            thread.join()
        interpreter._patch_lang = patch_lang
        if self.failure is not None:
            raise self.failure

    def _program(self, i: int) -> None:
        try:
            self._take(i)
            self.bodies[i][1]()
            self.publish()
        except BaseException as error:
            if self.failure is None:
                self.failure = error
        self.alive.discard(i)
        self.waiting.clear()
        if self.alive:
            self._give(self._next())

    def _give(self, i: int) -> None:
        self.now = i
        self.turns[i].release()

    def _take(self, i: int) -> None:
        """Wait for a program's turn; then it has its own place in the grid, and sees its own stores."""
        self.turns[i].acquire()
        if self.failure is not None:
            raise _Given
        _builder.grid_idx = self.bodies[i][0]
        for pointer, mask, _, written in self.unseen[i]:
            _memory.store(pointer, written, mask)

    def _next(self) -> int:
        ready = sorted(self.alive - self.waiting)
        # Where all wait, each looks again in turn.
        return self.schedule(ready, self.now) if ready else in_turn(sorted(self.alive), self.now)

    def switch(self) -> None:
        """Let the schedule say who goes on."""
        i, then = self.now, self._next()
        if then == i:
            return
        for pointer, mask, before, _ in reversed(self.unseen[i]):
            _memory.store(pointer, before, mask)
        self._give(then)
        self._take(i)

    def publish(self) -> None:
        """What the program has stored is seen by the others from now on."""
        self.unseen[self.now].clear()
        self.waiting.clear()

    def polled(self) -> None:
        """The program has looked whether the others are there; whether they were, its next operation shows."""
        self.polls += 1
        if self.polls > _POLLS_OF_A_PROGRAM * len(self.bodies):
            raise Stuck(f"programs {sorted(self.alive)} wait for one another")
        self.waiting.add(self.now)
        self.switch()

    def stored(self, pointer: Any, value: Any, mask: Any) -> None:
        """Store, unseen."""
        self.polls = 0
        before = _memory.load(pointer, mask, np.zeros_like(value), value.dtype)
        _memory.store(pointer, value, mask)
        self.unseen[self.now].append((pointer, mask, before, value))
        self.switch()


class _Recorded:
    """Stands in for the function of a kernel: keeps the calls, program by program, and runs them all with the last one."""

    def __init__(self, function: Any, programs: int, launch: _Launch) -> None:
        self._function, self._programs, self._launch = function, programs, launch
        self.__name__, self.__globals__ = function.__name__, function.__globals__
        self.__signature__ = interpreter.inspect.signature(function)

    def __call__(self, **arguments: Any) -> None:
        self._launch.bodies.append((_builder.grid_idx, lambda: self._function(**arguments)))
        if len(self._launch.bodies) == self._programs:
            self._launch.run()


@dataclass
class Seen:
    """What happened: the programs of each launch."""

    programs: list[int] = field(default_factory=list)


@contextmanager
def together(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> Iterator[Seen]:
    """Run all programs of every launch at the same time."""
    current: list[_Launch] = []
    seen = Seen()
    launched = interpreter.GridExecutor.__call__
    load, rmw = _builder.create_masked_load, _builder.create_atomic_rmw

    def all_at_once(self: Any, *args: Any, **kwargs: Any) -> None:
        programs = int(np.prod(self.grid))
        seen.programs.append(programs)
        current.append(_Launch(schedule))
        self.fn = _Recorded(self.fn, programs, current[-1])
        try:
            launched(self, *args, **kwargs)
        finally:
            current.pop()

    def masked_load(*args: Any, **kwargs: Any) -> Any:
        current[-1].polls = 0
        current[-1].switch()
        return load(*args, **kwargs)

    def masked_store(pointer: Any, value: Any, mask: Any, *hints: Any) -> None:
        current[-1].stored(pointer.data, value.data, mask.data)

    def atomic_rmw(operation: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        launch = current[-1]
        if "release" in str(sem).lower():
            launch.publish()
        found = rmw(operation, pointer, value, mask, sem, scope)
        if value.data.any():
            launch.polls = 0
            launch.switch()
        else:
            launch.polled()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", all_at_once)
        patch.setattr(_builder, "create_masked_load", masked_load)
        patch.setattr(_builder, "create_masked_store", masked_store)
        patch.setattr(_builder, "create_atomic_rmw", atomic_rmw)
        yield seen
