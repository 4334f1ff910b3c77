"""The C++ extension: every instruction set of this machine, every way to share the work, and calls that it must refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close_to_reference

import fused_rnn

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

CELLS = {"rnn_tanh": (1, 1, 1, 1), "rnn_relu": (1, 1, 1, 1), "lstm": (4, 5, 4, 4), "gru": (3, 4, 4, 4)}


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 50, 200])
@pytest.mark.parametrize("batch", [1, 2, 3, 13, 50])
def test_instruction_sets(isa: str, name: str, dtype: torch.dtype, hidden: int, batch: int) -> None:
    """Outputs and all gradients; units and rows at, below and above the lanes and the register tiles."""
    theirs = getattr(torch.nn, name)(7, hidden, bidirectional=True, dtype=dtype)
    ours = getattr(fused_rnn, name)(7, hidden, bidirectional=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = getattr(torch.nn, name)(7, hidden, bidirectional=True, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(4, batch, 7, dtype=dtype)

    def results(module: torch.nn.Module) -> list[torch.Tensor]:
        kind = next(module.parameters()).dtype
        input = x.to(kind, copy=True).requires_grad_()
        out, states = module(input)
        state = torch.cat(states, -1) if isinstance(states, tuple) else states
        loss = out.square().sum() + state.square().sum()
        return [out, state, *torch.autograd.grad(loss, [input, *module.parameters()])]

    for actual, expected, reference in zip(results(ours), results(theirs), results(exact), strict=True):
        assert_close_to_reference(actual, expected, reference)


def make_call(cell: str, dtype: type = np.float32, length: int = 6, batch: int = 9, hidden: int = 37) -> dict[str, Any]:
    gates, tape, _, bias = CELLS[cell]
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(dtype) / 4

    rows = draw(length * batch, 2, tape * hidden)
    states = [draw(2, batch, hidden) for _ in range(2 if cell == "lstm" else 1)]
    weights = [draw(gates * hidden, hidden) for _ in range(2)]
    return {
        "cell": cell,
        "input": None,
        "tape": rows,
        "out": rows if tape == 1 else np.empty((length * batch, 2, hidden), dtype),
        "states": states,
        "weight_ih": None,
        "weight_hh": _C.Packed(cell, weights, False, "hidden", False, 1),
        "weight_hr": None,
        "bias": draw(2, bias * hidden),
        "length": length,
        "batch": batch,
        "batch_sizes": None,
        "offsets": None,
        "reverse": [False, True],
        "reset": random.random(length * batch) < 0.2,
        "keep": True,
        "threads": 1,
    }


def make_backward(cell: str) -> dict[str, Any]:
    forward = make_call(cell)
    states_0 = [state.copy() for state in forward["states"]]
    _C.forward(**forward)
    random = np.random.default_rng(1)
    gates, _, gradients, _ = CELLS[cell]
    rows, directions, hidden = forward["out"].shape
    weights = [random.standard_normal((gates * hidden, hidden)).astype(np.float32) / 4 for _ in range(2)]
    shared = "cell tape out length batch batch_sizes offsets reverse reset threads weight_ih weight_hr".split()
    return {name: forward[name] for name in shared} | {
        "d_gates": np.full((rows, directions, gradients * hidden), np.nan, np.float32),
        "d_states": [random.standard_normal(state.shape).astype(np.float32) for state in states_0],
        "d_out": random.standard_normal((rows, directions, hidden)).astype(np.float32),
        "d_cells": random.standard_normal((rows, directions, hidden)).astype(np.float32) if cell == "lstm" else None,
        "states_0": states_0,
        "weight_hh": _C.Packed(cell, weights, True, "hidden", False, 1),
        "t_begin": 0,
        "t_end": forward["length"],
        "d_input": None,
    }


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("make", [make_call, make_backward], ids=["forward", "backward"])
def test_sharing_changes_no_bit(isa: str, cell: str, make: Callable[[str], dict[str, Any]]) -> None:
    """A row's sums are added in the same order, whoever adds them."""
    run = _C.forward if make is make_call else _C.backward
    written = ("tape", "out", "states") if make is make_call else ("d_gates", "d_states")

    def results(threads: int, sharing: str) -> list[np.ndarray]:
        call = make(cell)
        run(**call | {"threads": threads, "sharing": sharing})
        return [array for name in written for array in (call[name] if isinstance(call[name], list) else [call[name]])]

    expected = results(1, "auto")
    assert all(np.isfinite(array).all() for array in expected)
    for threads in (1, 2, 3, 5):
        for sharing in ("auto", "batch", "units"):
            for actual, wanted in zip(results(threads, sharing), expected, strict=True):
                np.testing.assert_array_equal(actual, wanted, err_msg=f"{threads} threads, {sharing}")


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


WRONG_FORWARD = {
    "unknown cell": lambda call: {"cell": "lstn"},
    "other cell's weights": lambda call: {"cell": "gru"},
    "too few rows in tape": lambda call: {"tape": call["tape"][:-1]},
    "too many rows in tape": lambda call: {"tape": np.concatenate([call["tape"], call["tape"]])},
    "too few columns in tape": lambda call: {"tape": call["tape"][:, :, :-1]},
    "dtype of tape": lambda call: {"tape": call["tape"].astype(np.float64)},
    "integers in tape": lambda call: {"tape": call["tape"].astype(np.int32)},
    "strided columns in tape": lambda call: {"tape": np.repeat(call["tape"], 2, axis=2)[:, :, ::2]},
    "backward strides in tape": lambda call: {"tape": call["tape"][::-1]},
    "overlapping rows in tape": lambda call: {
        "tape": np.lib.stride_tricks.as_strided(call["tape"], call["tape"].shape, (4, *call["tape"].strides[1:]))
    },
    "read-only tape": lambda call: {"tape": read_only(call["tape"])},
    "read-only out": lambda call: {"out": read_only(call["out"])},
    "out within tape": lambda call: {"out": call["tape"][:, :, : call["out"].shape[2]]},
    "shape of out": lambda call: {"out": call["out"][:, :1]},
    "one state missing": lambda call: {"states": call["states"][:1]},
    "states of another batch": lambda call: {"states": [state[:, :-1].copy() for state in call["states"]]},
    "states not contiguous": lambda call: {"states": [np.repeat(state, 2, axis=2)[:, :, ::2] for state in call["states"]]},
    "dtype of states": lambda call: {"states": [state.astype(np.float64) for state in call["states"]]},
    "shape of bias": lambda call: {"bias": call["bias"][:, :-1]},
    "weights of one direction": lambda call: {"reverse": [False]},
    "no direction": lambda call: {"reverse": []},
    "weights of the backward": lambda call: {"weight_hh": make_backward("lstm")["weight_hh"]},
    "projection in place of W_hh": lambda call: {"weight_hr": call["weight_hh"]},
    "longer": lambda call: {"length": call["length"] + 1},
    "negative length": lambda call: {"length": -1},
    "negative batch": lambda call: {"batch": -1},
    "overflowing sizes": lambda call: {"length": 2**62, "batch": 4},
    "shape of reset": lambda call: {"reset": call["reset"][:-1]},
    "dtype of reset": lambda call: {"reset": call["reset"].astype(np.int8)},
    "batch_sizes alone": lambda call: {"batch_sizes": np.full(6, 9)},
    "growing batch_sizes": lambda call: {"batch_sizes": np.array([8, 9, 9, 9, 9, 9]), "offsets": np.arange(6) * 9},
    "batch_sizes beyond the batch": lambda call: {"batch_sizes": np.array([10, 9, 9, 9, 9, 8]), "offsets": np.arange(6) * 9},
    "negative batch_sizes": lambda call: {"batch_sizes": np.array([9, 9, 9, 9, 9, -1]), "offsets": np.arange(6) * 9},
    "overlapping offsets": lambda call: {"batch_sizes": np.full(6, 9), "offsets": np.arange(6) * 8},
    "offsets beyond the rows": lambda call: {"batch_sizes": np.full(6, 9), "offsets": np.arange(6) * 9 + 1},
    "overflowing offsets": lambda call: {"batch_sizes": np.full(6, 9), "offsets": np.array([0, 9, 18, 27, 36, 2**63 - 1])},
    "int32 batch_sizes": lambda call: {"batch_sizes": np.full(6, 9, np.int32), "offsets": np.arange(6, dtype=np.int32) * 9},
    "no threads": lambda call: {"threads": 0},
    "unknown sharing": lambda call: {"sharing": "rows"},
}


@pytest.mark.parametrize("case", WRONG_FORWARD)
def test_wrong_forward_calls_raise(case: str) -> None:
    call = make_call("lstm")
    with pytest.raises(ValueError, match=r"expected|overflows"):
        _C.forward(**call | WRONG_FORWARD[case](call))


WRONG_BACKWARD = {
    "rows of d_gates": lambda call: {"d_gates": call["d_gates"][:-1]},
    "columns of d_gates": lambda call: {"d_gates": call["d_gates"][:, :, :-1]},
    "d_gates within tape": lambda call: {"d_gates": call["tape"][:, :, : call["d_gates"].shape[2]]},
    "d_out is d_gates": lambda call: {"d_out": call["d_gates"][:, :, : call["d_out"].shape[2]]},
    "shape of d_out": lambda call: {"d_out": call["d_out"][:-1]},
    "d_cells is d_gates": lambda call: {"d_cells": call["d_gates"][:, :, : call["d_cells"].shape[2]]},
    "rows of d_cells": lambda call: {"d_cells": call["d_cells"][:-1]},
    "columns of d_cells": lambda call: {"d_cells": call["d_cells"][:, :, :-1]},
    "dtype of d_cells": lambda call: {"d_cells": call["d_cells"].astype(np.float64)},
    "strided columns of d_cells": lambda call: {"d_cells": np.repeat(call["d_cells"], 2, axis=2)[:, :, ::2]},
    "backward strides in d_cells": lambda call: {"d_cells": call["d_cells"][::-1]},
    "d_states are states_0": lambda call: {"d_states": call["states_0"]},
    "shape of states_0": lambda call: {"states_0": [state[:, :, :-1].copy() for state in call["states_0"]]},
    "steps out of order": lambda call: {"t_begin": 3, "t_end": 2},
    "steps beyond the last": lambda call: {"t_end": call["length"] + 1},
    "steps before the first": lambda call: {"t_begin": -1},
    "rows of fewer steps": lambda call: {"t_begin": 1},
    "weights of the forward": lambda call: {"weight_hh": make_call("lstm")["weight_hh"]},
}


@pytest.mark.parametrize("case", WRONG_BACKWARD)
def test_wrong_backward_calls_raise(case: str) -> None:
    call = make_backward("lstm")
    with pytest.raises(ValueError, match="expected"):
        _C.backward(**call | WRONG_BACKWARD[case](call))


def test_gradient_of_c_of_a_cell_without_raises() -> None:
    call = make_backward("gru")
    with pytest.raises(ValueError, match="d_cells: expected None for a cell without c"):
        _C.backward(**call | {"d_cells": call["d_out"]})


@pytest.mark.parametrize(
    "weights",
    [
        [],
        [np.zeros((8, 2), np.float32), np.zeros((8, 3), np.float32)],
        [np.zeros(8, np.float32)],
        [np.zeros((7, 2), np.float32)],
        [np.zeros((8, 2), np.int64)],
        [np.zeros((8, 4), np.float32)[:, ::2]],
        [np.zeros((0, 0), np.float32)],
        [np.zeros((8, 2), np.float32), np.zeros((8, 2))],
    ],
    ids=["none", "two shapes", "1D", "rows", "integers", "strides", "empty", "two dtypes"],
)
def test_wrong_weights_raise(weights: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="expected"):
        _C.Packed("lstm", weights, False, "hidden", False, 1)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_inference_leaves_the_same_outputs(isa: str, cell: str) -> None:
    kept, dropped = make_call(cell), make_call(cell) | {"keep": False}
    _C.forward(**kept)
    _C.forward(**dropped)
    for actual, expected in zip([dropped["out"], *dropped["states"]], [kept["out"], *kept["states"]], strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 33, 17), (3, 200, 65), (4, 512, 1024)])
def test_projection_of_a_few_rows(isa: str, dtype: type, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    random = np.random.default_rng(0)
    input, weight = random.standard_normal((rows, inner)).astype(dtype), random.standard_normal((columns, inner)).astype(dtype)
    wide = np.full((rows, columns + 3), np.nan, dtype)
    _C.project(input, weight, wide[:, :columns], 2)
    expected = input.astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(wide[:, :columns], expected, atol=20 * np.finfo(dtype).eps * inner**0.5, rtol=0)
    assert np.isnan(wide[:, columns:]).all()


def test_wrong_projections_raise() -> None:
    x, w, out = np.ones((2, 5), np.float32), np.ones((7, 5), np.float32), np.empty((2, 7), np.float32)
    for wrong in [(x[:, :4], w, out), (x, w, out[:1]), (x.astype(np.float64), w, out), (x, w, read_only(out)), (x[0], w, out)]:
        with pytest.raises(ValueError, match="expected"):
            _C.project(*wrong, 1)
    with pytest.raises(ValueError, match="expected"):
        _C.project(x, w, np.repeat(out, 2, axis=1)[:, ::2], 1)
    with pytest.raises(ValueError, match="expected"):
        _C.project(w, w, w[:, :7], 1)
    with pytest.raises(ValueError, match="expected"):
        _C.project(x, w, out, 0)


def make_step(cell: str, dtype: type = np.float32, rows: int = 3, inputs: int = 21, hidden: int = 37) -> dict[str, Any]:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / 4).astype(dtype)

    gates = CELLS[cell][0] * hidden
    states = [draw(rows, hidden) for _ in range(2 if cell == "lstm" else 1)]
    return {
        "cell": cell,
        "input": draw(rows, inputs),
        "states": states,
        "new_states": [np.full_like(state, np.nan) for state in states],
        "out": np.full((rows, hidden), np.nan, dtype),
        "weight_ih": draw(gates, inputs),
        "weight_hh": draw(gates, hidden),
        "bias_ih": draw(gates),
        "bias_hh": draw(gates),
        "threads": 2,
    }


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (1, 512), (2, 37), (4, 64), (5, 64)])
def test_streaming_steps(isa: str, name: str, dtype: torch.dtype, bias: bool, rows: int, hidden: int) -> None:
    """Step by step without a graph, against torch.nn over the whole sequence."""
    theirs = getattr(torch.nn, name)(21, hidden, bias=bias, dtype=dtype)
    ours = getattr(fused_rnn, name)(21, hidden, bias=bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = getattr(torch.nn, name)(21, hidden, bias=bias, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(6, rows, 21, dtype=dtype)
    with torch.no_grad():
        state, steps = None, []
        for one in x:
            before = None if state is None else [part.clone() for part in (state if isinstance(state, tuple) else (state,))]
            out, after = ours(one[None], state)
            if before is not None:
                for part, kept in zip(state if isinstance(state, tuple) else (state,), before, strict=True):
                    assert torch.equal(part, kept)
            steps.append(out)
            state = after
            assert out.data_ptr() != (after[0] if isinstance(after, tuple) else after).data_ptr()
        expected, end = theirs(x)
        reference, reference_end = exact(x.double())
    assert_close_to_reference(torch.cat(steps), expected, reference)
    last = (state, end, reference_end) if name == "LSTM" else ((state,), (end,), (reference_end,))
    for actual, wanted, true in zip(*last, strict=True):
        assert_close_to_reference(actual, wanted, true)


WRONG_STEP = {
    "unknown cell": lambda call: {"cell": "lstn"},
    "features": lambda call: {"input": call["input"][:, :-1]},
    "dtype of input": lambda call: {"input": call["input"].astype(np.float64)},
    "1D input": lambda call: {"input": call["input"][0]},
    "rows of states": lambda call: {"states": [state[:-1].copy() for state in call["states"]]},
    "one state": lambda call: {"states": call["states"][:1]},
    "states in place": lambda call: {"new_states": call["states"]},
    "out is a state": lambda call: {"out": call["new_states"][0]},
    "read-only out": lambda call: {"out": read_only(call["out"])},
    "rows of weight_ih": lambda call: {"weight_ih": call["weight_ih"][:-1]},
    "columns of weight_hh": lambda call: {"weight_hh": call["weight_hh"][:, :-1]},
    "strides of weight_hh": lambda call: {"weight_hh": np.repeat(call["weight_hh"], 2, axis=1)[:, ::2]},
    "length of bias": lambda call: {"bias_hh": call["bias_hh"][:-1]},
    "no threads": lambda call: {"threads": 0},
}


@pytest.mark.parametrize("case", WRONG_STEP)
def test_wrong_steps_raise(case: str) -> None:
    call = make_step("lstm")
    _C.step(**call)
    assert np.isfinite(call["out"]).all()
    with pytest.raises(ValueError, match="expected"):
        _C.step(**call | WRONG_STEP[case](call))


def test_memory_is_kept_and_released() -> None:
    _C.release_kept()
    first = np.frombuffer(_C.Memory(3 << 20), np.uint8)
    address = first.ctypes.data
    assert len(first) == 3 << 20
    first = None
    kept = _C.kept_bytes()
    assert kept >= 3 << 20
    second = np.frombuffer(_C.Memory((3 << 20) - 5), np.uint8)
    assert second.ctypes.data == address
    assert _C.kept_bytes() == 0
    second = None
    _C.release_kept()
    assert _C.kept_bytes() == 0
    with pytest.raises(MemoryError):
        _C.Memory(2**63)


def test_unknown_instruction_set_raises() -> None:
    with pytest.raises(ValueError, match=r"isa: expected .*baseline, got sse9"):
        _C.set_isa("sse9")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import torch, fused_rnn, os\n" + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_environment_forces_an_instruction_set() -> None:
    for name in _C.isas():
        done = python("print(fused_rnn.backends()['cpp'].detail.split()[0])", FUSED_RNN_ISA=name)
        assert done.stdout.strip() == name, done.stderr
    refused = python("fused_rnn.LSTM(2, 2)(torch.zeros(1, 1, 2))", FUSED_RNN_ISA="sse9")
    assert "ValueError: FUSED_RNN_ISA=sse9: expected one" in refused.stderr


def test_number_of_threads_is_obeyed() -> None:
    """One thread starts none; three use three, whatever OpenMP's own default is."""
    code = """
torch.set_num_threads({n})
before = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    fused_rnn._C.forward(**call)
print(len(os.listdir("/proc/self/task")) - before)
"""
    setup = """
import numpy as np
H = 64
call = dict(cell="rnn_tanh", input=None, weight_ih=None,
            tape=(rows := np.zeros((64 * 50, 1, H), np.float32)), out=rows, bias=None, length=50, batch=64,
            states=[np.zeros((1, 64, H), np.float32)], weight_hr=None, batch_sizes=None, offsets=None, reverse=[False],
            reset=None, keep=True, threads={n},
            weight_hh=fused_rnn._C.Packed("rnn_tanh", [np.zeros((H, H), np.float32)], False, "hidden", False, 1))
"""
    for n, started in ((1, "0"), (3, "2")):
        done = python((setup + code).format(n=n), OMP_NUM_THREADS="2")
        assert done.stdout.strip() == started, done.stdout + done.stderr
