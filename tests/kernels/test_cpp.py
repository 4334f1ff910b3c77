"""The C++ extension: every instruction set of this machine, every way to share the work, and the memory that it keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close_to_reference

import fused_rnn

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

from cpp_support import (  # noqa: E402 (after the check for what it imports)
    CELLS,
    backward_results,
    forward_results,
    make_backward,
    make_forward,
    make_step,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 50, 200])
@pytest.mark.parametrize("batch", [1, 2, 3, 13, 50])
def test_instruction_sets(isa: str, name: str, dtype: torch.dtype, hidden: int, batch: int) -> None:
    """Outputs and all gradients; units and rows at, below and above the lanes and the register tiles."""
    check(name, dtype, hidden, 4, batch)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("hidden", "length"), [(16, 63), (16, 64), (37, 15), (37, 16), (150, 66)])
@pytest.mark.parametrize("batch", [1, 2])
def test_few_sequences(isa: str, name: str, dtype: torch.dtype, hidden: int, length: int, batch: int) -> None:
    """With so few, the forward packs its weights for many steps only."""
    check(name, dtype, hidden, length, batch)


def check(name: str, dtype: torch.dtype, hidden: int, length: int, batch: int) -> None:
    """Outputs and all gradients in two directions, with the sum of squares for the loss."""
    theirs = getattr(torch.nn, name)(7, hidden, bidirectional=True, dtype=dtype)
    ours = getattr(fused_rnn, name)(7, hidden, bidirectional=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = getattr(torch.nn, name)(7, hidden, bidirectional=True, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(length, batch, 7, dtype=dtype)

    def results(module: torch.nn.Module) -> list[torch.Tensor]:
        kind = next(module.parameters()).dtype
        input = x.to(kind, copy=True).requires_grad_()
        out, states = module(input)
        state = torch.cat(states, -1) if isinstance(states, tuple) else states
        loss = out.square().sum() + state.square().sum()
        return [out, state, *torch.autograd.grad(loss, [input, *module.parameters()])]

    for actual, expected, reference in zip(results(ours), results(theirs), results(exact), strict=True):
        assert_close_to_reference(actual, expected, reference)


# The last three have more inputs than gates and rows enough for the gradient of weight_ih to be summed as its transpose, the
# last but one that of weight_hr too.
SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"batch_sizes": torch.tensor([8, 8, 5, 2, 1, 1])},
    "one direction": {"reverse": (True,), "batch": 50, "length": 3},
    "four": {"reverse": (False, True, True, False), "batch": 2},
    "single": {"length": 1, "batch": 60},
    "single of few": {"length": 1, "batch": 3, "inputs": 300, "hidden": 130},
    "wide": {"length": 20, "batch": 11, "inputs": 170, "hidden": 9},
    "wide projected": {"length": 20, "batch": 20, "inputs": 600, "hidden": 110, "projection": 9},
    "wide in one direction": {"length": 20, "batch": 11, "inputs": 170, "hidden": 9, "reverse": (False,)},
}


def check_sharing(run: Any, call: dict[str, Any]) -> None:
    expected = run(call)
    assert all(tensor.isfinite().all() for tensor in expected)
    for threads in (1, 2, 3, 5):
        for sharing in ("auto", "batch", "units"):
            for actual, wanted in zip(run(call | {"threads": threads, "sharing": sharing}), expected, strict=True):
                assert torch.equal(actual, wanted), f"{threads} threads, {sharing}"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", SHARED)
def test_sharing_changes_no_bit(isa: str, cell: str, kind: str) -> None:
    """A row's sums are added in the same order, whoever adds them; those of the weights' gradients too."""
    options = dict(SHARED[kind])
    if CELLS[cell].projected is None and options.pop("projection", None):
        options["hidden"] = 37
    forward = make_forward(cell, **options)
    check_sharing(forward_results, forward)
    backward = make_backward(forward)
    check_sharing(backward_results, backward)
    check_sharing(backward_results, backward | {"gates_wanted": True})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sharing_changes_no_bit_of_other_dtypes(isa: str, cell: str, dtype: torch.dtype) -> None:
    forward = make_forward(cell, dtype)
    check_sharing(forward_results, forward)
    check_sharing(backward_results, make_backward(forward))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rows", [1, 4, 5, 49, 100])
def test_sharing_changes_no_bit_of_a_step(isa: str, cell: str, rows: int) -> None:
    forward = make_step(cell, rows=rows, inputs=150, hidden=130)
    check_sharing(forward_results, forward)
    check_sharing(backward_results, make_backward(forward))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_leaves_the_same_outputs(isa: str, cell: str, dtype: torch.dtype) -> None:
    """Bit for bit, with c of every step and without; what no backward will read is not made."""
    calls = [make_forward(cell, dtype, **SHARED[kind]) for kind in ("plain", "packed", "four", "single", "one direction")]
    calls += [make_step(cell, dtype, rows) for rows in (1, 5)]
    if CELLS[cell].projected is not None:
        calls.append(make_forward(cell, dtype, projection=11))
    for call in calls:
        for cell_states in (call["cell_states"], False):
            kept, dropped = (_C.layer_forward(**call | {"keep": keep, "cell_states": cell_states}) for keep in (True, False))
            assert dropped[3] is None
            for actual, expected in zip([dropped[0], *dropped[1]], [kept[0], *kept[1]], strict=True):
                assert torch.equal(actual, expected)
            assert cell_states or (kept[2] is None and dropped[2] is None)
            assert not cell_states or torch.equal(kept[2], dropped[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 33, 17), (3, 200, 65), (4, 512, 1024), (5, 200, 65), (49, 300, 40)])
@pytest.mark.parametrize("length", [1, 2])
def test_projection_of_a_few_rows(isa: str, dtype: torch.dtype, shape: tuple[int, int, int], length: int) -> None:
    """The input's product, which a cell that hears nothing of the step before lets through."""
    rows, inner, columns = shape
    torch.manual_seed(0)
    input, weight = torch.randn(length, rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    call = make_forward("rnn_relu", dtype, length, rows, inner, columns, (False,), reset=False, bias=False) | {"threads": 2}
    call |= {"input": input, "states": None}
    hh = torch.zeros(columns, columns, dtype=dtype)
    positive, negative = (
        _C.layer_forward(**call | {"weights": [(each, hh, None, None, None)]})[0] for each in (weight, -weight)
    )
    # A float64 product is no judge of one: torch's own errs by up to three times as much as ours here.
    exact = input.numpy().astype(np.longdouble) @ weight.numpy().astype(np.longdouble).T
    bound = 20 * torch.finfo(dtype).eps * inner**0.5
    assert np.abs((positive - negative).numpy() - exact).max() <= bound


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


def test_memory_is_kept_and_released() -> None:
    _C.release_kept()
    first = torch.frombuffer(_C.Memory(3 << 20), dtype=torch.uint8)
    address = first.data_ptr()
    assert len(first) == 3 << 20
    del first
    kept = _C.kept_bytes()
    assert kept >= 3 << 20
    second = torch.frombuffer(_C.Memory((3 << 20) - 5), dtype=torch.uint8)
    assert second.data_ptr() == address
    assert _C.kept_bytes() == 0
    del second
    _C.release_kept()
    assert _C.kept_bytes() == 0
    with pytest.raises(MemoryError):
        _C.Memory(2**63)


def test_memory_of_a_layer_is_kept_and_released() -> None:
    """What a call needs for itself alone goes back for the next one, which takes it."""
    call = make_backward(make_forward("lstm", length=60, batch=64, hidden=64))
    _C.release_kept()
    first = _C.layer_backward(**call)
    kept = _C.kept_bytes()
    assert kept > 60 * 64 * 4 * 64 * 4
    second = _C.layer_backward(**call)
    assert _C.kept_bytes() == kept
    del first, second
    _C.release_kept()
    assert _C.kept_bytes() == 0


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
    program = """
torch.set_num_threads(1)  # what follows starts no thread yet
H = 64
weights = (torch.zeros(H, H), torch.zeros(H, H), None, None, None)
call = dict(cell="rnn_tanh", input=torch.zeros(50, 64, H), states=None, weights=[weights], length=50,
            batch=64, batch_sizes=None, reverse=[False], reset=None, step=False, threads={n})
torch.set_num_threads({n})
before = len(os.listdir("/proc/self/task"))
out = fused_rnn._C.layer_forward(**call, keep=True, cell_states=False)[0]
between = len(os.listdir("/proc/self/task"))
fused_rnn._C.layer_backward(**call, out=out, tape=None, d_out=out, d_cells=None, d_states=(None,),
                            wanted=[True] * 4 + [False] * 3, gates_wanted=False)
print(between - before, len(os.listdir("/proc/self/task")) - between)
"""
    for n, started in ((1, "0 0"), (3, "2 0")):
        done = python(program.format(n=n), OMP_NUM_THREADS="2")
        assert done.stdout.strip() == started, done.stdout + done.stderr
