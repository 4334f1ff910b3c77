"""The C++ extension: every instruction set of this machine, every way to share the work, and the memory that it keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close_to_reference

import fused_rnn

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

from cpp_support import CELLS, make_backward, make_call  # noqa: E402 (after the check for what it imports)


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


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("make", [make_call, make_backward], ids=["forward", "backward"])
def test_sharing_changes_no_bit(isa: str, cell: str, make: Callable[[str], dict[str, Any]]) -> None:
    """A row's sums are added in the same order, whoever adds them."""
    run = _C.forward if make is make_call else _C.backward
    written = ("tape", "out", "states") if make is make_call else ("d_gates", "d_states")

    def results(threads: int, sharing: str) -> list[torch.Tensor]:
        call = make(cell)
        run(**call | {"threads": threads, "sharing": sharing})
        return [tensor for name in written for tensor in (call[name] if isinstance(call[name], list) else [call[name]])]

    expected = results(1, "auto")
    assert all(tensor.isfinite().all() for tensor in expected)
    for threads in (1, 2, 3, 5):
        for sharing in ("auto", "batch", "units"):
            for actual, wanted in zip(results(threads, sharing), expected, strict=True):
                assert torch.equal(actual, wanted), f"{threads} threads, {sharing}"


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_inference_leaves_the_same_outputs(isa: str, cell: str) -> None:
    kept, dropped = make_call(cell), make_call(cell) | {"keep": False}
    _C.forward(**kept)
    _C.forward(**dropped)
    for actual, expected in zip([dropped["out"], *dropped["states"]], [kept["out"], *kept["states"]], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 33, 17), (3, 200, 65), (4, 512, 1024)])
def test_projection_of_a_few_rows(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    torch.manual_seed(0)
    input, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    wide = torch.full((rows, columns + 3), torch.nan, dtype=dtype)
    _C.project(input, weight, wide[:, :columns], 2)
    # A float64 product is no judge of one: torch's own errs by up to three times as much as ours here.
    exact = input.numpy().astype(np.longdouble) @ weight.numpy().astype(np.longdouble).T
    bound = 20 * torch.finfo(dtype).eps * inner**0.5
    assert np.abs(wide[:, :columns].numpy() - exact).max() <= bound
    assert wide[:, columns:].isnan().all()


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
fused_rnn._C.forward(**call)
print(len(os.listdir("/proc/self/task")) - before)
"""
    setup = """
torch.set_num_threads(1)  # what follows starts no thread yet
H = 64
call = dict(cell="rnn_tanh", input=None, weight_ih=None,
            tape=(rows := torch.zeros(64 * 50, 1, H)), out=rows, bias=None, length=50, batch=64,
            states=[torch.zeros(1, 64, H)], weight_hr=None, batch_sizes=None, offsets=None, reverse=[False],
            reset=None, keep=True, threads={n},
            weight_hh=fused_rnn._C.Packed("rnn_tanh", [torch.zeros(H, H)], False, "hidden", False, 1))
"""
    for n, started in ((1, "0"), (3, "2")):
        done = python((setup + code).format(n=n), OMP_NUM_THREADS="2")
        assert done.stdout.strip() == started, done.stdout + done.stderr
