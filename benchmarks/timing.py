"""Interleaved timing in one process.

A shared machine drifts by tens of per cent within a minute, so providers take turns round by round and only figures of the
same rounds are compared. Threads of libgomp and of ONNX Runtime's pool spin for a while after a call and take the cores from
whoever comes next; so each turn starts with a pause and one untimed call.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.peers.base import Provider

PAUSE = 0.03
# A turn repeats short calls for this long and yields their median.
TURN = 0.02
MAX_CALLS = 400


@dataclass
class Samples:
    """Seconds per call of each provider, one figure per round; every provider has the same number of rounds."""

    rounds: dict[str, list[float]]
    interrupted: bool = False
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def num_rounds(self) -> int:
        """Complete rounds."""
        return min((len(r) for r in self.rounds.values()), default=0)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80, linear between neighbours."""
    ordered = sorted(values)

    def at(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8)}


def turn(provider: Provider, training: bool) -> tuple[float, int]:
    """One turn of one provider: pause, untimed call, timed calls.

    Returns:
        the median seconds of a call, and how many calls it is the median of.
    """
    time.sleep(PAUSE)
    with torch.set_grad_enabled(training), provider.scope():
        begin = time.perf_counter()
        provider.step()
        estimate = time.perf_counter() - begin
        calls = max(1, min(MAX_CALLS, int(TURN / max(estimate, 1e-7))))
        seconds = [timed_call(provider) for _ in range(calls)]
    return statistics.median(seconds), calls


def timed_call(provider: Provider) -> float:
    """Seconds of one call. Its result is freed after that, so that neither this call nor the next one pays for it."""
    begin = time.perf_counter()
    result = provider.step()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def short_turn(provider: Provider, training: bool, length: float, first: bool = True) -> tuple[float, int]:
    """One turn without a pause, for as many seconds: where providers take turns too quickly for a median.

    Args:
        first: leave out the first call, unless it alone took longer than the turn.

    Returns:
        the lower quartile of the seconds of a call: other programs disturb many calls of a few microseconds, and never make one
        faster; and how many calls it is of.
    """
    seconds: list[float] = []
    with torch.set_grad_enabled(training), provider.scope():
        end = time.perf_counter() + length
        if first:
            timed_call(provider)
        while not seconds or (time.perf_counter() < end and len(seconds) < MAX_CALLS):
            seconds.append(timed_call(provider))
    return sorted(seconds)[(len(seconds) - 1) // 4], len(seconds)


def interleave(
    providers: Mapping[str, Provider],
    training: bool,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 30,
    between: Callable[[float], None] | None = None,
) -> Samples:
    """Time the providers in turn, round by round.

    Args:
        providers: by name; already warmed up.
        training: whether gradients are recorded.
        seconds: stop after the round that ends beyond this, but not before ``min_rounds``.
        between: called after each round with the share of the time that is used up.

    Returns:
        the complete rounds. Ctrl-C ends the measurement and is noted in ``interrupted``.
    """
    samples = Samples({name: [] for name in providers}, calls=dict.fromkeys(providers, 0))
    names = list(providers)
    begin = time.perf_counter()
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(max_rounds):
            first = i % max(len(names), 1)
            # Whoever always followed the same neighbour would inherit the state it leaves the caches in.
            row = {name: turn(providers[name], training) for name in names[first:] + names[:first]}
            for name, (value, calls) in row.items():
                samples.rounds[name].append(value)
                samples.calls[name] += calls
            used = time.perf_counter() - begin
            if between:
                between(min(1.0, max(used / max(seconds, 1e-9), (i + 1) / max_rounds)))
            # A round that would end beyond the time is not begun.
            used = time.perf_counter() - begin
            if i + 1 >= min_rounds and used + used / (i + 1) > seconds:
                break
    except KeyboardInterrupt:
        samples.interrupted = True
    finally:
        if enabled:
            gc.enable()
    return samples
