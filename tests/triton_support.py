"""What a launch of the Triton kernels would compile, recorded without a GPU, and what the compiled code takes of the chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from fused_rnn.data.steps import Steps
from fused_rnn.kernels.triton import recurrence, walk
from fused_rnn.kernels.triton.derived import recurrence_of
from fused_rnn.kernels.triton.heuristic import shared_bytes
from fused_rnn.kernels.triton.plan import PART, Call, Device, Plan

# Bytes of the stack of a thread, where registers did not suffice. Kernels that hold their weights in registers fill all of them
# on purpose, and before the walk they have more in hand: a tile of float32 beside the planes it is cut into. That is paid once.
MOST_SPILLS = 768
# What is spilled inside the loop over time is paid in each step: so many loads and stores. 256 threads with 40 of them move 40
# KiB through the first-level cache, 128 bytes at a time: 0.2 µs, where the steps of those kernels take 1.5 µs and more. Where
# weights are streamed the shortest step takes 5 µs.
MOST_IN_LOOP, MOST_IN_STREAMED_LOOP = 40, 120
# Registers of a multiprocessor.
REGISTERS = 65536

A100 = Device("A100", (8, 0), 108, 163 << 10)
H100 = Device("H100", (9, 0), 132, 227 << 10)
# Little shared memory: what fits here fits every chip.
L40S = Device("L40S", (8, 9), 142, 99 << 10)
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of the chip; and its code.

    Attributes:
        registers: of a thread.
        spills: bytes of the stack of a thread.
        in_loop: loads and stores of the stack in the longest loop, which is that over time.
        shared: bytes of shared memory.
        ttgir: as Triton lowers it.
        ptx: as Triton hands it on.
    """

    registers: int
    spills: int
    in_loop: int
    shared: int
    ttgir: str
    ptx: str


class _Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.kernel: Any = None
        self.arguments: dict[str, Any] = {}
        self.grids: list[tuple[int, ...]] = []
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        self.grids.append(grid)
        return self

    def __call__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.launches.append(arguments)


def record(call: Call, plan: Plan, everything: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """The kernel of a call of one step, and the arguments of its last launch, with every option in use, or none."""
    recorder = _launched(call, plan, everything, monkeypatch)
    return recorder.kernel, recorder.arguments


def record_all(call: Call, plan: Plan, everything: bool, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The same of every launch."""
    recorder = _launched(call, plan, everything, monkeypatch)
    return [(recorder.kernel, arguments) for arguments in recorder.launches]


def grids(call: Call, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The programs of every launch of a call of one step."""
    return _launched(call, plan, False, monkeypatch).grids


def _of_library(call: Call, gates: int) -> torch.Tensor:
    """Weights of so many gates for the library's product."""
    sizes = (gates * call.hidden, call.hidden)
    return torch.zeros(call.directions, *(sizes if call.backward else reversed(sizes)), dtype=call.dtype)


def _launched(call: Call, plan: Plan, everything: bool, monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    """Launch a call as a layer does: states in the dtype of the rows and biases as they are, where the kernels take them."""
    cell, recorder = call.cell, _Recorder()
    rows, d, h = call.batch, call.directions, call.hidden

    def recorded(self: walk.Walk, kernel: Any, *given: Any) -> None:
        recorder.kernel = kernel
        run(self, recorder, *given)

    def buffer(columns: int) -> torch.Tensor:
        return torch.zeros(rows, d, columns, dtype=call.dtype)

    def states() -> tuple[torch.Tensor, ...]:
        dtype = call.dtype if plan.fragments else recurrence.compute_dtype(call.dtype)
        return tuple(torch.zeros(d, rows, h, dtype=dtype) for _ in cell.states)

    steps = Steps.packed(torch.full((1,), rows), rows) if everything else Steps(1, rows)
    tape = buffer(len(cell.tape) * h)
    out = tape if cell.tape_is_out else buffer(h)
    reset = torch.zeros(rows, dtype=torch.bool) if everything else None
    weights = [torch.zeros(1, dtype=call.dtype)] * d
    later: torch.Tensor | None = None
    if plan.regime == "library":
        weights = [_of_library(call, len(cell.first))]
        later = _of_library(call, len(cell.later)) if cell.later else None
    packed = recurrence.Packed(plan, weights, None, later)
    reverse = (False, True)[:d]
    ours = recurrence_of(cell)
    with monkeypatch.context() as patch:
        run = walk.Walk.run
        patch.setattr(walk.Walk, "run", recorded)
        if call.backward:
            d_cells = buffer(h) if everything and cell.cell_state is not None else None
            d_out, d_gates = buffer(h) if everything or not plan.fragments else None, buffer(len(cell.d_gates) * h)
            d_n, d_0 = states(), states()
            given = d_n if everything or not plan.fragments else (None,) * len(d_n)
            ours.backward(d_gates, given, d_0, d_out, d_cells, tape, out, states(), packed, steps, 0, 1, reverse, reset)
        else:
            bias: Any = None
            if everything and plan.fragments:
                bias = [(torch.zeros(cell.num_gates * h, dtype=call.dtype),) * 2] * d
            elif everything:
                bias = torch.zeros(d, len(cell.bias) * h, dtype=recurrence.compute_dtype(call.dtype))
            ours.forward(tape, out, states(), states(), packed, bias, steps, reverse, reset, True)
    return recorder


def build(kernel: Any, arguments: dict[str, Any], capability: int) -> Usage:
    """Compile a kernel for a chip that need not be there, for the arguments of a launch."""
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in arguments}
    extra = set(arguments) - {parameter.name for parameter in kernel.params} - {"launch_cooperative_grid"}
    assert extra == set(options), "Triton refuses arguments that it does not know"
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value == 1 and not parameter.do_not_specialize:
            # As at run time: what is one is known to be.
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if not parameter.do_not_specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills, in_loop = _resources(compiled.asm["cubin"])
    return Usage(registers, spills, in_loop, compiled.metadata.shared, compiled.asm["ttgir"], compiled.asm["ptx"])


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and the uses of the stack in the longest loop, as the tool inside Triton's package reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told[:2000]
    code = [(int(at, 16), what) for at, what in _INSTRUCTION.findall(told)]
    # A loop ends in a branch back to its begin. Beside the walk there are only the short loops that wait.
    loops = [(at - int(branch[1], 16), at) for at, what in code if (branch := _BRANCH.search(what)) and int(branch[1], 16) < at]
    length, end = max(loops, default=(0, 0))
    in_loop = sum(1 for at, what in code if end - length <= at <= end and re.search(r"\b(LDL|STL)\b", what))
    return int(found[1]), int(found[2]), in_loop


@dataclass(frozen=True)
class Configuration:
    """One kernel as the plan would launch it. everything: with every option of the kernel in use, or with none."""

    call: Call
    plan: Plan
    chip: Device
    everything: bool = True

    def __str__(self) -> str:
        call, plan = self.call, self.plan
        walk = "backward" if call.backward else "forward"
        dtype = str(call.dtype).removeprefix("torch.") + ("-tf32" if call.tf32 else "")
        options = "" if self.everything else "-plain"
        return f"{self.chip.name}-{call.cell.name}-{walk}-{dtype}-H{call.hidden}-N{call.batch}-{plan.regime}{options}"


_built: dict[Configuration, Usage] = {}


def usage(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> Usage:
    """Compile a configuration for its chip, once in this process."""
    if configuration not in _built:
        kernel, arguments = record(configuration.call, configuration.plan, configuration.everything, monkeypatch)
        major, minor = configuration.chip.capability
        _built[configuration] = build(kernel, arguments, 10 * major + minor)
    return _built[configuration]


def products(call: Call, plan: Plan) -> int:
    """Matrix instructions in the code of the kernels with weights in registers, as the plan's numbers say."""
    # K is taken in pieces of 16, sequences in pieces of 8; planes are multiplied as far as they matter.
    tiles = call.cell.num_gates * (plan.units // 16) if plan.alone else plan.piles * plan.parts * (PART // 16)
    return tiles * (plan.batch // 8) * (plan.planes * (plan.planes + 1) // 2)


def check_resources(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold a configuration to the stated limits."""
    found = usage(configuration, monkeypatch)
    plan, call, chip = configuration.plan, configuration.call, configuration.chip
    of_loop = MOST_IN_LOOP if plan.fragments else MOST_IN_STREAMED_LOOP
    assert found.in_loop <= of_loop, f"the stack is used {found.in_loop} times in each step, {found.spills} bytes: {plan}"
    assert found.spills <= MOST_SPILLS, f"{found.spills} bytes spilled, {found.registers} registers: {plan}"
    assert found.registers <= 255
    # Registers are given out eight at a time.
    beside = 2 if plan.regime == "cooperative" and plan.warps <= 4 else 1
    assert -(-found.registers // 8) * 8 * 32 * plan.warps * beside <= REGISTERS
    # Where nothing else fits the library serves, so its launches have to fit the smallest chip.
    assert found.shared <= (L40S if plan.regime == "library" else chip).shared_bytes
    if plan.regime == "library":
        return
    estimate = shared_bytes(call, plan)
    assert found.shared <= estimate, f"{found.shared} bytes of shared memory, estimated {estimate}: {plan}"
    if plan.fragments:
        made, expected = found.ptx.count("mma.sync"), products(call, plan)
        assert made == expected, f"{made} matrix instructions, expected {expected}: {plan}"
        # What the others have written is read 16 bytes at a time, past the first-level cache, where it would not be seen.
        of_others = len(re.findall(r"ld\.global[.\w:]*\.cg\b|ld\.global\.cg", found.ptx))
        wide = len(re.findall(r"ld\.global\.cg\.v4", found.ptx))
        # A part is half of what a thread's eight numbers in a row fill of an operand; Triton 3.6 loads the half twice.
        copies = 2 if triton.__version__.startswith("3.6.") else 1
        loads = 0 if plan.alone else plan.parts * plan.planes * (plan.batch // 8) * copies
        assert (of_others, wide) == (loads, loads), f"{of_others} loads of others, {wide} of 16 bytes, expected {loads}"
        return
    # Products are those of the tensor cores: wgmma where there is one and the weights fill the 64 rows of its tile.
    assert re.search(r"tt\.dot |warp_group_dot ", found.ttgir)
    for line in re.findall(r"(?:tt\.dot|warp_group_dot) [^\n]*", found.ttgir):
        assert re.search(r"-> tensor<[^>]*#mma", line), f"a product without tensor cores: {line}"
    rows = plan.units * (4 if plan.stacked else 1)
    if chip.capability >= (9, 0) and plan.planes == 1:
        assert ("wgmma.mma_async" in found.ptx) == (rows >= 64)
    if chip.capability < (9, 0) or rows < 64:
        assert "mma.sync" in found.ptx
