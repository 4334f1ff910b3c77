"""What only the Numba backend has: threads of Python's, vectors of any width, code kept in memory only."""

from __future__ import annotations

import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import BACKENDS, every_cell
from walks_support import Case, check

import fused_rnn
from fused_rnn.cells import GRU, LSTM
from fused_rnn.cells.definition import DEFINED
from fused_rnn.data.steps import Steps

pytestmark = pytest.mark.skipif("numba" not in BACKENDS, reason="Numba cannot run here")


@every_cell
def test_numba_without_openmp(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no GNU OpenMP, Python threads make up the team."""
    from fused_rnn.kernels.numba import team

    monkeypatch.setattr(team, "_gomp", lambda: None)
    monkeypatch.setattr(team, "team_size_address", lambda: 0)
    check("numba", cell, Case(batch=1, hidden=200), torch.float32)
    check("numba", cell, Case(batch=40, hidden=64, reverse=(False, True)), torch.float32)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")
@pytest.mark.parametrize(("cpu", "features", "bits"), [("haswell", "+avx2,+fma", 256), ("x86-64", "+sse2", 128)])
def test_numba_with_narrower_vectors(cpu: str, features: str, bits: int) -> None:
    """CPUs with smaller registers take other tiles."""
    program = (
        "import torch, fused_rnn; from walks_support import Case, check\n"
        f"assert '{bits}-bit' in fused_rnn.backends()['numba'].detail\n"
        "check('numba', 'lstm', Case(batch=21, hidden=33, projection=9, steps=4, reset=True), torch.float32)"
    )
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "PYTHONPATH": str(tests.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tests,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_describe_names_version_and_vectors() -> None:
    """``backends()`` says what the kernels were compiled for."""
    detail = fused_rnn.backends()["numba"].detail
    assert detail.startswith("numba ")
    assert "-bit vectors" in detail


def test_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no directory to write to, kernels are compiled in memory."""
    from numba.core.caching import FunctionCache

    from fused_rnn.kernels.numba.compiled import compiled
    from fused_rnn.kernels.numba.derived import module_of

    def no_place(self: FunctionCache, function: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(FunctionCache, "__init__", no_place)
    assert compiled.__wrapped__(module_of(DEFINED["rnn_relu"].derived)._backward_kernel, torch.float32).address != 0


def test_other_dtypes_are_refused() -> None:
    """The error names what is allowed and what came."""
    from fused_rnn.kernels.numba.derived import walk_of

    with pytest.raises(TypeError, match=r"expected float32 or float64 buffers, got torch\.bfloat16"):
        walk_of(GRU).pack([torch.zeros(12, 4, dtype=torch.bfloat16)], None, Steps(9, 3), False)


def _lstm_call(**changed: object) -> dict[str, object]:
    """Arguments of both walks of an LSTM: two directions, three rows, H = 5, P = 2."""
    d, n, h, p, steps = 2, 3, 5, 2, Steps(4, 3)
    rows = 12
    return {
        "weight_hh": [torch.randn(4 * h, p) for _ in range(d)],
        "weight_hr": [torch.randn(p, h) for _ in range(d)],
        "steps": steps,
        "tape": torch.randn(rows, d, 5 * h),
        "out": torch.zeros(rows, d, p),
        "states": (torch.zeros(d, n, p), torch.zeros(d, n, h)),
        "bias": torch.zeros(d, 4 * h),
        "reverse": (False, True),
        "reset": torch.zeros(rows, dtype=torch.bool),
        "d_gates": torch.zeros(6, d, 4 * h + p),
        "d_states": (torch.zeros(d, n, p), torch.zeros(d, n, h)),
        "d_out": torch.zeros(rows, d, p),
        "t_begin": 1,
        "t_end": 3,
        **changed,
    }


def _run_lstm(call: dict[str, Any]) -> None:
    from fused_rnn.kernels.numba.derived import walk_of

    lstm = walk_of(LSTM)
    steps, reverse, reset = call["steps"], call["reverse"], call["reset"]
    # What a caller packed for other sizes, dtypes or the other walk.
    packed = [call.get(name) or lstm.pack(call["weight_hh"], call["weight_hr"], steps, name == "backward")
              for name in ("forward", "backward")]  # fmt: skip
    lstm.forward(call["tape"], call["out"], call["states"], packed[0], call["bias"], steps, reverse, reset, True)
    arguments = {
        "d_gates": call["d_gates"],
        "d_states": call["d_states"],
        "d_out": call["d_out"],
        "d_cells": None,
        "tape": call["tape"],
        "out": call["out"],
        "states_0": call["states"],
        "packed": packed[1],
        "steps": steps,
        "t_begin": call["t_begin"],
        "t_end": call["t_end"],
        "reverse": reverse,
        "reset": reset,
    }
    taken = inspect.signature(lstm.backward).parameters
    lstm.backward(**{name: value for name, value in arguments.items() if name in taken})


def _packed_lstm(backward: bool, dtype: torch.dtype = torch.float32, hidden: int = 5) -> object:
    from fused_rnn.kernels.numba.derived import walk_of

    lstm = walk_of(LSTM)
    weight_hh = [torch.randn(4 * hidden, 2, dtype=dtype) for _ in range(2)]
    return lstm.pack(weight_hh, [torch.randn(2, hidden, dtype=dtype) for _ in range(2)], Steps(4, 3), backward)


BAD_CALLS: dict[str, tuple[Callable[[], dict[str, object]], str]] = {
    "tape rows": (lambda: {"tape": torch.zeros(11, 2, 25)}, r"tape: expected shape \(12, 2, 25\), got \(11, 2, 25\)"),
    "out rows": (lambda: {"out": torch.zeros(13, 2, 2)}, r"out: expected shape \(12, 2, 2\), got \(13, 2, 2\)"),
    "directions": (lambda: {"out": torch.zeros(12, 1, 2)}, r"out: expected shape \(12, 2, 2\), got \(12, 1, 2\)"),
    "columns": (lambda: {"out": torch.zeros(12, 2, 4)[..., ::2]}, "out: expected contiguous columns"),
    "overlap": (lambda: {"d_out": torch.zeros(1, 2, 2).expand(12, 2, 2)}, "d_out: expected rows that do not overlap"),
    "dtype": (
        lambda: {"out": torch.zeros(12, 2, 2).double()},
        r"out: expected plain torch\.float32 on the CPU, got torch\.float64",
    ),
    "device": (lambda: {"out": torch.zeros(12, 2, 2, device="meta")}, "out: expected plain .* got .* on meta"),
    "negated": (lambda: {"d_out": torch._neg_view(torch.zeros(12, 2, 2))}, "d_out: expected plain"),
    "states": (lambda: {"states": (torch.zeros(2, 3, 2),)}, "state_h: expected 2 states, got 1"),
    "state": (lambda: {"states": (torch.zeros(2, 3, 2), torch.zeros(2, 3, 4))}, r"state_c: expected shape \(2, 3, 5\)"),
    "state strides": (
        lambda: {"states": (torch.zeros(2, 2, 3).mT, torch.zeros(2, 3, 5))},
        "state_h: expected a contiguous tensor, got strides",
    ),
    "bias": (lambda: {"bias": torch.zeros(2, 19)}, r"bias: expected shape \(2, 20\), got \(2, 19\)"),
    "bias of one": (lambda: {"bias": torch.zeros(20)}, r"bias: expected shape \(2, 20\), got \(20,\)"),
    "reset": (lambda: {"reset": torch.zeros(11, dtype=torch.bool)}, r"reset: expected shape \(12,\), got \(11,\)"),
    "reset dtype": (lambda: {"reset": torch.zeros(12)}, r"reset: expected plain torch\.bool on the CPU, got torch\.float32"),
    "no direction": (lambda: {"reverse": ()}, "reverse: expected one flag for each recurrence, got none"),
    "d_gates rows": (lambda: {"d_gates": torch.zeros(12, 2, 22)}, r"d_gates: expected shape \(6, 2, 22\), got \(12, 2, 22\)"),
    "t_end": (lambda: {"t_end": 5}, "t_begin, t_end: expected 0 <= t_begin <= t_end <= 4, got 1, 5"),
    "t_begin": (lambda: {"t_begin": -1}, "t_begin, t_end: expected .*, got -1, 3"),
    "weight_hr missing": (lambda: {"weight_hr": None}, "weight_hr: expected weights, as P = 2 is not H = 5, got None"),
    "weight_hr": (lambda: {"weight_hr": [torch.randn(2, 4)] * 2}, r"weight_hr: expected plain tensors of shape \(2, 5\)"),
    "weight_hh": (
        lambda: {"weight_hh": [torch.randn(20, 2), torch.randn(19, 2)]},
        r"weight_hh: expected plain tensors of shape \(20, 2\), got \(19, 2\)",
    ),
    "packed for other sizes": (
        lambda: {"forward": _packed_lstm(False, hidden=4)},
        r"packed: expected weights of \(D, H, P\) = \(2, 5, 2\), got \(2, 4, 2\)",
    ),
    "packed in float64": (lambda: {"forward": _packed_lstm(False, torch.float64)}, "packed: expected weights of torch.float32"),
    "packed for the backward": (lambda: {"forward": _packed_lstm(True)}, "packed: expected weights packed with backward=False"),
    "packed for the forward": (lambda: {"backward": _packed_lstm(False)}, "packed: expected weights packed with backward=True"),
    "growing batch": (
        lambda: {"steps": Steps(4, 3, torch.tensor([2, 3, 1, 1]), torch.tensor([0, 2, 5, 6]))},
        "batch_sizes: expected 0 to 2, got 3",
    ),
    "overlapping steps": (
        lambda: {"steps": Steps(4, 3, torch.tensor([3, 3, 3, 3]), torch.tensor([0, 3, 5, 9]))},
        "offsets: expected 6 or more, got 5",
    ),
    "short offsets": (
        lambda: {"steps": Steps(4, 3, torch.tensor([3, 3, 3, 3]), torch.tensor([0, 3]))},
        r"offsets: expected shape \(4,\) of int64, got \(2,\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(case: str) -> None:
    """The checks of the extension, at the entry of these kernels: no address is computed from a wrong shape."""
    changed, message = BAD_CALLS[case]
    _run_lstm(_lstm_call())
    with pytest.raises(ValueError, match=message):
        _run_lstm(_lstm_call(**changed()))


def test_too_many_gates_are_refused() -> None:
    """A tile has registers for so many vectors; a walk that took others would compute something else."""
    from fused_rnn.data.cell import Cell
    from fused_rnn.kernels.numba.walk import forward

    gates = tuple("abcde")
    cell = Cell("five", "FIVE", gates, ("h",), gates, gates, reads_before=None, direct=False)
    with pytest.raises(ValueError, match="cell five: gates: expected at most 4 for Numba's kernels, got 5"):
        forward(cell, None)
