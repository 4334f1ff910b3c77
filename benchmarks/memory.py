"""Memory: what a forward holds for its backward, the peak of a call, and how inference's peak grows with T.

What is counted, and why it can be trusted:

*Held between forward and backward* is the difference in bytes that the C library's allocator has given out
(``mallinfo2``: heap in use plus mapped blocks). torch, NumPy, oneDNN and plain C++ all take their memory there, so it makes
no difference whether a tensor was saved by ``save_for_backward``, hung on the context, kept as oneDNN's workspace, or
is no tensor at all. Hooks on saved tensors see only the first kind. The results (out, h_n, c_n) are alive too and are
counted, the same for everybody; parameters, input and initial states exist before and are not. Three graphs are held at
once and the growth from the first to the third is halved: a provider that kept its buffers in a pool between calls would
otherwise seem to need nothing.

*Peaks*, and so the *growth of inference*, are not recorded by the allocator but by the kernel: writing 5 to
``/proc/self/clear_refs`` resets ``VmHWM``, the largest resident size. Memory that the allocator keeps and hands out again
would not show, so the measurement runs in a process of its own whose allocator maps every block above 16 KiB afresh. The
kernel counts in batches of pages per thread, hence ``PEAK_NOISE``. The peak of a case is that of the first call of its size,
results included, so that what a provider keeps for later calls counts; a call of a small size before it loads libraries.

Both need Linux, the first also glibc 2.33; elsewhere the rows say that they were not measured.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import fused_rnn
from benchmarks.cases import CELLS, Case, Shape
from benchmarks.peers import Provider, peers
from benchmarks.problem import Problem

MIB = 1 << 20
PEAK_NOISE = 1 * MIB

# Nodes of the graph and the allocator's small bins differ by this much between two measurements of the same module.
HELD_NOISE = 4096

# T and 4T: the input projection of T steps alone is 4 to 16 MiB, far above the noise and above any sensible chunk.
GROWTH_SHAPE = Shape(32, 128, 256, 256, "growth of inference memory")
GROWTH_FACTOR = 4

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_GRAPHS = 3

# (key of the case, peer) -> fields of its row.
Peaks = dict[tuple[str, str], dict[str, Any]]


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int:
    """Bytes that malloc has given out in this process.

    Raises:
        RuntimeError: where the C library cannot tell.
    """
    reason = unavailable()
    if reason:
        raise RuntimeError(reason)
    info = _mallinfo2()()
    return int(info.uordblks + info.hblkhd)


@functools.cache
def _mallinfo2() -> Any:
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _Mallinfo2
    return function


@functools.cache
def unavailable() -> str | None:
    """Why ``allocated`` cannot be trusted here, or None."""
    try:
        function = _mallinfo2()
    except (AttributeError, OSError):
        return "not measured: needs glibc 2.33 or later (mallinfo2)"
    before = function()
    block = torch.empty(8 * MIB, dtype=torch.uint8)
    after = function()
    grown = after.uordblks + after.hblkhd - before.uordblks - before.hblkhd
    # Another allocator (jemalloc, tcmalloc by LD_PRELOAD) serves torch: mallinfo2 would report zero for everything.
    return None if abs(int(grown) - block.numel()) < MIB else "not measured: torch's memory does not come from glibc's malloc"


def held(provider: Provider) -> int:
    """Bytes alive after a training forward that were not before it; module docstring.

    Args:
        provider: with a ``forward``; warmed up here by one whole step.

    Raises:
        ValueError: if the provider has no forward of its own.
        RuntimeError: where it cannot be measured.
    """
    if provider.forward is None:
        raise ValueError("this provider has no forward of its own")
    graphs: list[Any] = []
    marks = []
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.enable_grad(), provider.scope():
            provider.step()
            # What earlier calls left for later ones would hide what this one needs.
            fused_rnn.empty_cache()
            for _ in range(_GRAPHS):
                graphs.append(provider.forward())
                marks.append(allocated())
    finally:
        if enabled:
            gc.enable()
    return (marks[-1] - marks[0]) // (_GRAPHS - 1)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"not measured: {_STATUS} has no {field}")


def peak(provider: Provider, training: bool = False) -> int:
    """Bytes by which resident memory rises at most during one call, results included."""
    gc.collect()
    with torch.set_grad_enabled(training), provider.scope():
        _CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
        result = provider.step()
        after = _resident("VmHWM")
        del result
    return max(0, after - before)


def peak_beyond_results(provider: Provider, results_bytes: int) -> int:
    """The peak of a second call, without its results. The first call is not counted: library buffers come into being."""
    with torch.no_grad(), provider.scope():
        provider.step()
    return max(0, peak(provider) - results_bytes)


def growth_row(peer_name: str, backend: str | None, cell: str, threads: int, shape: Shape = GROWTH_SHAPE) -> dict[str, Any]:
    """Measure one peer and cell at T and 4T in this process.

    At 4T only the call itself is measured, and nothing of that size ran before: a buffer that is kept between calls and
    grows with T counts.
    """
    row: dict[str, Any] = {"cell": cell, "provider": peer_name, "T": shape.T, "factor": GROWTH_FACTOR, "noise": PEAK_NOISE}
    peer = peers(backend)[peer_name]
    peaks = []
    for factor in (1, GROWTH_FACTOR):
        case = Case(cell, Shape(shape.B, shape.T * factor, shape.I, shape.H, shape.origin), "inference")
        reason = peer.reason(case)
        if reason:
            return row | {"status": "missing", "reason": reason}
        problem = Problem(case)
        provider = peer.prepare(problem, case, threads)
        states = case.shape.B * case.shape.H * len(problem.states)
        results_bytes = (case.shape.B * case.shape.T * case.shape.H + states) * problem.input.element_size()
        if factor == 1:
            peaks.append(peak_beyond_results(provider, results_bytes))
        else:
            peaks.append(max(0, peak(provider) - results_bytes))
    return row | {"status": "ok", "peak_bytes": peaks[0], "peak_bytes_long": peaks[1], "growth_bytes": peaks[1] - peaks[0]}


def growth(peer_names: Sequence[str], cells: Sequence[str], backend: str | None, threads: int) -> list[dict[str, Any]]:
    """Measure in a process of its own; module docstring.

    Returns:
        one row per peer and cell; a row whose measurement failed has ``status`` "missing" and the reason.
    """
    rows, reason = _in_a_process(["--cells", ",".join(cells)], peer_names, backend, threads, "")
    measured = {(row["provider"], row["cell"]) for row in rows}
    for name in peer_names:
        for cell in cells:
            if (name, cell) not in measured:
                rows.append({"cell": cell, "provider": name, "status": "missing", "reason": reason})
    return rows


def peaks(peer_names: Sequence[str], cases: Sequence[Case], backend: str | None, threads: int, seconds: float) -> Peaks:
    """Measure the peak of every peer in every case, in a process of its own; module docstring. Small cases come first.

    Args:
        seconds: no case is begun after so long.

    Returns:
        (key of the case, peer) -> ``peak_bytes``, or ``peak_reason`` where it was not measured. Peers that cannot run a case
        have no entry.
    """
    if not peer_names:
        return {}
    ordered = sorted(cases, key=lambda case: case.flops)
    text = json.dumps([asdict(case) for case in ordered])
    rows, reason = _in_a_process(["--seconds", str(seconds)], peer_names, backend, threads, text)
    found = {(row.pop("case"), row.pop("provider")): row for row in rows}
    for case in cases:
        for name in peer_names:
            found.setdefault((case.key, name), {"peak_reason": reason})
    return {key: row for key, row in found.items() if row}


def _in_a_process(
    options: Sequence[str], peer_names: Sequence[str], backend: str | None, threads: int, text: str
) -> tuple[list[dict[str, Any]], str]:
    """The rows that a measuring process prints, and why there are no more."""
    command = [sys.executable, "-m", "benchmarks.memory", "--threads", str(threads), "--peers", ",".join(peer_names)]
    command += [*options, *(["--backend", backend] if backend else [])]
    # Below the 32 KiB that one step of GROWTH_SHAPE takes.
    tunables = "glibc.malloc.mmap_threshold=16384:glibc.malloc.mmap_max=1048576"
    environment = os.environ | {"GLIBC_TUNABLES": tunables}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, input=text, env=environment, cwd=root, check=False)
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lines = done.stderr.strip().splitlines()
    why = lines[-1] if lines else "no time left" if done.returncode == 0 else f"exit code {done.returncode}"
    return rows, f"not measured: {why}"


def _peak_rows(peer_names: Sequence[str], cases: Sequence[Case], backend: str | None, threads: int, seconds: float) -> None:
    """Print a row per case and peer until the time is over."""
    table = peers(backend)
    deadline = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > deadline:
            return
        used = case.threads or threads
        torch.set_num_threads(used)
        small = replace(case, shape=Shape(2, min(2, case.shape.T), 16, 16, "warm-up"))
        problem = Problem(case)
        for name in peer_names:
            peer = table[name]
            row: dict[str, Any] = {"case": case.key, "provider": name}
            if peer.reason(replace(case, threads=used)) is None:
                try:
                    with torch.set_grad_enabled(case.training):
                        warm = peer.prepare(Problem(small), small, used)
                        with warm.scope():
                            warm.step()
                    provider = peer.prepare(problem, case, used)
                    fused_rnn.empty_cache()
                    row["peak_bytes"] = peak(provider, case.training)
                except Exception as error:  # the gate's row says more
                    row["peak_reason"] = f"not measured: raised {type(error).__name__}"
            print(json.dumps(row), flush=True)


def main() -> None:
    """The measuring process: one JSON row per line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=growth.__doc__)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--backend")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="measure the peaks of the cases on standard input for so long")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.seconds is not None:
        read = json.load(sys.stdin)
        shapes = [Shape(**(fields["shape"] | {"modes": tuple(fields["shape"]["modes"])})) for fields in read]
        cases = [Case(**(fields | {"shape": shape})) for fields, shape in zip(read, shapes, strict=True)]
        _peak_rows(options.peers.split(","), cases, options.backend, options.threads, options.seconds)
        return
    for cell in options.cells.split(","):
        for name in options.peers.split(","):
            print(json.dumps(growth_row(name, options.backend, cell, options.threads)), flush=True)


if __name__ == "__main__":
    main()
