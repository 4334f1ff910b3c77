"""What the plan picks on chips before Hopper, compiled without one: registers, spills, shared memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from equations_support import coupled, late, linear, nested, rnn_of_n
from triton.backends.compiler import GPUTarget
from triton_choices import BFLOAT16, FLOAT64, FORMS, TWO_PLANES, drawn, representative
from triton_support import A100, L40S, Configuration, build, check_resources, record, record_all

from benchmarks.gpu.barrier import meet
from benchmarks.gpu.floors import BARRIER_OPTIONS
from fused_rnn.cells import GRU, GRU_RESET_BEFORE, LSTM, RNN_RELU, mgu
from fused_rnn.data.cell import Cell
from fused_rnn.kernels.triton.heuristic import choose
from fused_rnn.kernels.triton.plan import Call

CHOSEN = [
    *representative(A100, ("lstm", "gru"), FORMS, ("resident", "cooperative"), aligned=False),
    # The least shared memory.
    *representative(L40S, ("lstm", "gru"), (BFLOAT16, TWO_PLANES), ("streamed",), aligned=False),
    *representative(L40S, ("rnn_relu", "gru"), (TWO_PLANES,), ("cooperative",), aligned=False),
    *representative(L40S, ("lstm",), (FLOAT64,), ("library",), aligned=False),
]


@pytest.mark.parametrize("configuration", CHOSEN, ids=str)
def test_resources(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for all that the heuristic can pick here."""
    check_resources(configuration, monkeypatch)


@pytest.mark.parametrize("configuration", [*drawn(A100), *drawn(L40S)], ids=str)
def test_resources_of_choices_at_random(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many more as ``FUSED_RNN_TRITON_DRAWN`` says; ``make test-extended`` does."""
    check_resources(configuration, monkeypatch)


class _Absent:
    """A driver for a chip that is not there: enough for Triton to compile what a launch would run."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)


@pytest.fixture
def _absent_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", _Absent())


@pytest.mark.usefixtures("_absent_chip")
@pytest.mark.parametrize(
    "call",
    [
        Call(LSTM, False, 512, 16, 2, torch.bfloat16),
        Call(GRU, True, 320, 16, 1, torch.float32, tf32=True),
        Call(RNN_RELU, False, 1, 1, 1, torch.float32),
        Call(GRU, True, 2500, 33, 1, torch.float16),
        Call(LSTM, True, 7, 5, 1, torch.float64),
    ],
    ids=lambda call: f"{call.cell.name}-H{call.hidden}",
)
def test_a_launch_as_at_run_time(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton binds and specialises the arguments of a launch itself, short of running it."""
    plan = choose(call, A100)
    kernel, arguments = record(call, plan, True, monkeypatch)
    made: Any = kernel.warmup(grid=(1, 1, 1), **arguments)
    assert made.metadata.num_warps == plan.warps
    assert made.metadata.launch_cooperative_grid == plan.meets


# Cells of users: other numbers of gates, a block that nobody reads, h after the step read behind the tape.
OF_USERS = [
    Configuration(call, choose(call, A100), A100)
    for call in (
        Call(coupled.row, False, 512, 16, 1, torch.bfloat16),
        Call(nested.row, True, 96, 16, 1, torch.float32, tf32=True),
        Call(linear.row, False, 96, 16, 1, torch.bfloat16),
        Call(rnn_of_n.row, True, 512, 16, 1, torch.bfloat16),
        Call(rnn_of_n.row, True, 1024, 4096, 1, torch.bfloat16),
    )
]


@pytest.mark.parametrize("configuration", OF_USERS, ids=str)
def test_cells_of_users(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resources(configuration, monkeypatch)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", [GRU_RESET_BEFORE, mgu.row, late.row], ids=lambda cell: cell.mode)
def test_both_launches_of_two_stages(cell: Cell, backward: bool, everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with a second product has a launch for each; both fit the chip, and hold nothing on the stack."""
    call = Call(cell, backward, 320, 33, 2, torch.bfloat16)
    plan = choose(call, A100)
    assert plan.regime == "library"
    launches = record_all(call, plan, everything, monkeypatch)
    stages = [arguments["STAGE"] for _, arguments in launches]
    # The backward has one turn more than steps, for the product of the last d_gates.
    assert stages == ([1, 2, 1] if backward else [1, 2])
    for kernel, arguments in launches[:2]:
        found = build(kernel, arguments, 80)
        assert found.spills == 0
        assert found.shared <= L40S.shared_bytes


@pytest.mark.usefixtures("_absent_chip")
def test_the_kernel_that_measures_the_barrier() -> None:
    made = meet.warmup(torch.zeros(8, dtype=torch.int32), 8, grid=(4,), **BARRIER_OPTIONS)
    assert "atom" in made.asm["ptx"] or "red." in made.asm["ptx"]
