"""The process of one version: makes cases ready, judges them and times slices, as it is told on standard input.

A request and its answer are a line of JSON each. Nothing runs between them: the other version has the machine to itself.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]

# Threads of an OpenMP team spin for some milliseconds after a call. The process is quiet when its threads together used less
# than this share of a core's time for so long; a turn is not handed over before, nor kept for longer than the last figure.
QUIET_SHARE, QUIET_LOOK, QUIET_LIMIT = 0.2, 0.002, 0.1


# The truth of a case below this is found on one thread.
_FEW_FLOPS = 1e9

# Seconds; from here on a call is not warmed up.
LONG = 0.05


def wait_until_quiet() -> None:
    """Return when no thread of this process is running any more."""
    end = time.perf_counter() + QUIET_LIMIT
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(QUIET_LOOK)
        now = time.perf_counter()
        if time.process_time() - cpu < QUIET_SHARE * (now - wall) or now > end:
            return


class Worker:
    """The cases of one version, one after the other."""

    def __init__(self, folder: Path) -> None:
        # The version first, whatever else is installed; then the benchmarks of this tree, not those that lie beside it.
        sys.path.insert(0, str(folder))
        import fused_rnn

        found = Path(fused_rnn.__file__).resolve().parent
        if found.parent != folder.resolve():
            raise ImportError(f"fused_rnn came from {found}, not from {folder}")
        sys.path.insert(0, str(_ROOT))
        from benchmarks.problem import Problem

        self._problem: Problem | None = None
        self._providers: dict[str, Any] = {}
        self._training = False
        # Whether a call is so long that the one before it makes no difference.
        self._long: dict[str, bool] = {}

    def about(self, threads: int) -> dict[str, Any]:
        """What this process runs: version, backends, commit."""
        import torch

        import fused_rnn

        torch.set_num_threads(threads)
        listed = fused_rnn.backends()
        return {
            "version": str(fused_rnn.__version__),
            "torch": torch.__version__,
            "backends": {k: {"available": v.available, "detail": str(v.detail)} for k, v in listed.items()},
        }

    def prepare(self, case: dict[str, Any], threads: int, names: list[str], backend: str | None) -> dict[str, Any]:
        """Make a case ready and judge everybody's results; only who is right is timed.

        Returns:
            by name, "gate" and where it is red "reason".
        """
        import torch

        from benchmarks.cases import Case, Shape
        from benchmarks.gate import Gate
        from benchmarks.peers import peers
        from benchmarks.problem import Problem
        from benchmarks.suite import judge_peer

        made = Case(**(case | {"shape": Shape(**(case["shape"] | {"modes": tuple(case["shape"]["modes"])}))}))
        # Two threads that share a core with other programs take a hundred times as long for what one does at once.
        torch.set_num_threads(threads if made.flops > _FEW_FLOPS else 1)
        self._providers = {}
        self._training = made.training
        if self._problem is None or self._problem.case.data != made.data:
            self._problem = None
            self._problem = Problem(made)
        gate = Gate(self._problem, made.training)
        torch.set_num_threads(threads)
        known = peers(backend)
        answer = {}
        for name in names:
            provider, fields = judge_peer(known[name], gate, self._problem, made, threads)
            answer[name] = fields
            if provider is not None:
                self._providers[name] = provider
        self._long = dict.fromkeys(self._providers, False)
        gc.collect()
        gc.disable()
        wait_until_quiet()
        return answer

    def slice(self, names: list[str], length: float) -> dict[str, Any]:
        """One slice of each in turn: name -> (median seconds of a call, calls)."""
        from benchmarks.timing import short_turn

        found = {}
        for name in names:
            found[name] = short_turn(self._providers[name], self._training, length, not self._long[name])
            self._long[name] = found[name][0] > LONG
            wait_until_quiet()
        return found

    def files(self, interpreted: bool) -> dict[str, dict[str, int]]:
        """The files of the package that calls enter; under Triton's interpreter, or those of the CPU."""
        from benchmarks import entered

        return entered.count(entered.INTERPRETED, "triton") if interpreted else entered.count(entered.CALLS)


def main() -> None:
    """Answer requests until standard input ends."""
    # Ctrl-C is for the process that leads; this one ends when its input does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    # Said once by the process that leads; here they would only be lines of the log.
    warnings.simplefilter("ignore")
    # This file's folder: its modules are found as parts of the package.
    sys.path.pop(0)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        worker = Worker(Path(sys.argv[1]))
    except Exception as error:  # the process that leads says it
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({})
    methods: dict[str, Callable[..., Any]] = {
        "about": worker.about,
        "prepare": worker.prepare,
        "slice": worker.slice,
        "files": worker.files,
    }
    for line in sys.stdin:
        request = json.loads(line)
        method = methods[request.pop("do")]
        try:
            answer({"answer": method(**request)})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
