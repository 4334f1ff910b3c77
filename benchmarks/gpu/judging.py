"""The gate's problems in processes of their own, before anything is timed.

Most of the time goes into compiling; so there is a process for each core, and what they compile is in Triton's cache on disk
when the timing process asks for it. A problem at a time goes to each, through a pipe: where a process dies or does not answer,
it is known which problem it had, that one has failed, and a new process takes its place.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from benchmarks.gpu.gate import Job, Verdict, failed

Answer = Callable[[Job], Verdict]

# A problem is given up after so many seconds: kernels that wait for one another may do so for ever.
LIMIT = 150.0
# And a process has so many seconds to end by itself.
_PATIENCE = 5.0


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None
    until: float = 0.0


def run(
    answer: Answer, jobs: Sequence[Job], workers: int, seconds: float, limit: float = LIMIT
) -> Iterator[tuple[Job, Verdict]]:
    """Judge problems, about in the order given, until the time is up.

    Args:
        answer: makes a verdict of a problem and raises nothing; it must pickle.
        workers: processes; 0 for this one.
        seconds: no answer is waited for after so many.
        limit: seconds for one problem.

    Yields:
        each problem with its verdict. Those that the time did not suffice for are missing.
    """
    end = time.monotonic() + seconds
    if workers == 0:
        for job in jobs:
            if time.monotonic() >= end:
                return
            yield job, answer(job)
        return
    pending = list(jobs)
    live = [_start(answer) for _ in range(min(workers, len(pending)))]
    try:
        while time.monotonic() < end and (pending or any(worker.job for worker in live)):
            for i, worker in enumerate(live):
                if worker.job is None and pending:
                    job = pending.pop(_next(pending, live))
                    if not worker.process.is_alive():
                        _end(worker)
                        worker = live[i] = _start(answer)
                    _give(worker, job, limit)
            busy = [worker for worker in live if worker.job]
            first = min([end, *(worker.until for worker in busy)])
            ready = wait([worker.connection for worker in busy], timeout=max(0.0, first - time.monotonic()))
            for i, worker in enumerate(live):
                job = worker.job
                if job is None:
                    continue
                if worker.connection in ready:
                    verdict, usable = _take(worker, job)
                elif time.monotonic() > worker.until:
                    verdict, usable = failed(job, f"no verdict within {limit:.0f} s"), False
                else:
                    continue
                worker.job = None
                if not usable:
                    _end(worker)
                    live[i] = _start(answer) if pending else worker
                yield job, verdict
    finally:
        _end_all(live)


def _next(pending: Sequence[Job], live: Sequence[_Worker]) -> int:
    """The first problem whose kernels nobody else compiles just now, or the first of all."""
    taken = {_kernels(worker.job) for worker in live if worker.job}
    return next((i for i, job in enumerate(pending) if _kernels(job) not in taken), 0)


def _kernels(job: Job) -> tuple[object, ...]:
    """What problems have in common that share compiled code."""
    return job.case.cell, job.case.hidden, job.case.dtype, job.case.extra, job.regime


def _start(answer: Answer) -> _Worker:
    # Not forked: CUDA does not survive that.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, answer), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _give(worker: _Worker, job: Job, limit: float) -> None:
    worker.job, worker.until = job, time.monotonic() + limit
    # An error: its process has ended. Reading the answer will say so.
    with contextlib.suppress(OSError):
        worker.connection.send(job)


def _take(worker: _Worker, job: Job) -> tuple[Verdict, bool]:
    """The answer, and whether the process can go on."""
    try:
        verdict, usable = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(_PATIENCE)
        return failed(job, f"its process ended with exit code {worker.process.exitcode}"), False
    return verdict, usable


def _end(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join(_PATIENCE)


def _end_all(live: Sequence[_Worker]) -> None:
    """Idle processes see their pipe close and end; the others are killed."""
    for worker in live:
        if not worker.connection.closed:
            worker.connection.close()
        if worker.job:
            worker.process.kill()
    end = time.monotonic() + _PATIENCE
    for worker in live:
        worker.process.join(max(0.0, end - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(_PATIENCE)


def _serve(connection: Connection, answer: Answer) -> None:
    """What a process does: answer until the pipe closes, or until its device is of no more use."""
    torch.set_num_threads(1)
    usable = True
    while usable:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        verdict = answer(job)
        usable = device_usable()
        connection.send((verdict, usable))


def device_usable() -> bool:
    """Whether this process can still use its CUDA device, if it does: after an illegal access it never can."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
