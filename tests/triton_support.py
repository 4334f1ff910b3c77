"""What a launch of the Triton kernels would compile, recorded without a GPU, and what the compiled code takes of the chip."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_rnn.cells import CELLS, Cell
from fused_rnn.kernels.triton import gru, launch, lstm, rnn
from fused_rnn.kernels.triton.heuristic import choose, shared_bytes
from fused_rnn.kernels.triton.plan import Call, Device, Plan
from fused_rnn.kernels.triton.walk_backward import walk_backward
from fused_rnn.kernels.triton.walk_forward import walk_forward
from fused_rnn.steps import Steps

# Bytes of the stack of a thread, where registers did not suffice. The backward keeps more at once, the d_gates of all gates, so
# that their way from memory is waited for once; a few registers spilled once a step cost less than a second wait.
MOST_FORWARD_SPILLS, MOST_BACKWARD_SPILLS = 64, 128
# Triton 3.6 keeps a descriptor for each wgmma of a step in registers, so the widest cooperative forwards spill some of those. A
# launch a step instead would cost more than reading them again.
MOST_WIDE_FORWARD_SPILLS = 400 if triton.__version__.startswith("3.6.") else MOST_FORWARD_SPILLS
_WIDE = 896
# Registers of a multiprocessor.
REGISTERS = 65536

MODULES = {"lstm": lstm, "gru": gru, "rnn_tanh": rnn, "rnn_relu": rnn}
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
    """What one kernel takes: registers of a thread, bytes of its stack (spills), bytes of shared memory; and its code."""

    registers: int
    spills: int
    shared: int
    ttgir: str
    ptx: str


class _Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        self.grids.append(grid)
        return self

    def __call__(self, **arguments: Any) -> None:
        self.arguments = arguments


def _states(cell: Cell, call: Call) -> tuple[torch.Tensor, ...]:
    dtype = launch.compute_dtype(call.dtype)
    return tuple(torch.zeros(call.directions, call.batch, call.hidden, dtype=dtype) for _ in cell.states)


def record(call: Call, plan: Plan, everything: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the last launch of a call of one step, with every option of the kernel in use, or none."""
    return _launched(call, plan, everything, monkeypatch).arguments


def grids(call: Call, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The programs of every launch of a call of one step."""
    return _launched(call, plan, False, monkeypatch).grids


def _launched(call: Call, plan: Plan, everything: bool, monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    cell = call.cell
    recorder = _Recorder()
    monkeypatch.setattr(launch, "walk_backward" if call.backward else "walk_forward", recorder)
    monkeypatch.setattr(launch, "allows_tf32", lambda: call.tf32)
    steps = Steps(1, call.batch)
    if everything:
        steps = Steps.packed(torch.full((1,), call.batch), call.batch)
    rows, d, h = call.batch, call.directions, call.hidden

    def buffer(columns: int) -> torch.Tensor:
        return torch.zeros(rows, d, columns, dtype=call.dtype)

    tape = buffer(len(cell.tape) * h)
    out = tape if cell.tape_is_out else buffer(h)
    reset = torch.zeros(rows, dtype=torch.bool) if everything else None
    k = h if plan.regime == "library" else 1
    packed = launch.Packed(plan, torch.zeros(d, k, cell.num_gates * k, dtype=call.dtype), None)
    reverse = (False, True)[:d]
    module = MODULES[cell.name]
    if call.backward:
        if plan.regime == "library":
            packed = launch.Packed(plan, packed.weights.transpose(1, 2), None)
        d_cells = buffer(h) if everything and "c" in cell.states else None
        d_out, d_gates = buffer(h), buffer(len(cell.d_gates) * h)
        states, states_0 = _states(cell, call), _states(cell, call)
        function = getattr(module, f"{cell.name}_backward")
        function(d_gates, states, d_out, d_cells, tape, out, states_0, packed, steps, 0, 1, reverse, reset)
    else:
        bias = torch.zeros(d, len(cell.bias) * h)
        function = getattr(module, f"{cell.name}_forward")
        function(tape, out, _states(cell, call), packed, bias, steps, reverse, reset, True)
    return recorder


def build(kernel: Any, arguments: dict[str, Any], capability: int) -> Usage:
    """Compile a kernel for a chip that need not be there, for the arguments of a launch."""
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
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
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    return Usage(registers, spills, compiled.metadata.shared, compiled.asm["ttgir"], compiled.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack, as the tool inside Triton's package reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


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
        dtype = str(call.dtype).removeprefix("torch.")
        return f"{self.chip.name}-{call.cell.name}-{walk}-{dtype}-H{call.hidden}-N{call.batch}-{plan.regime}"


# Where the choice, or what is compiled for it, changes: chunks of K in each dtype, units, rows that are aligned or not, sizes
# of one, which the compiler knows. And numbers of sequences, from one to more than any chip walks at once.
_EDGES = [*range(32, 256, 32), *range(256, 2688, 128), 5120]
HIDDEN = sorted({1, 2, 16, 17, *_EDGES, *(edge + more for edge in _EDGES for more in (1, 16))})
BATCH = (1, 17, 33, 65, 129, 257, 513, 1025, 2049, 5000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def key(call: Call, plan: Plan) -> tuple[Any, ...]:
    """What a kernel is compiled for. Two calls with the same key run the same code, but for the options of a call."""
    return (
        call.cell.name,
        call.backward,
        call.dtype,
        plan.regime,
        plan.units,
        plan.batch,
        plan.chunk,
        plan.chunks if plan.unrolled else 1,
        plan.split,
        plan.stacked,
        plan.warps,
        call.hidden % 16 == 0,
        call.hidden == 1,
    )


@functools.cache
def every_configuration(*chips: Device) -> dict[tuple[Any, ...], Configuration]:
    """All that the heuristic can pick on these chips, of any size, by key; what several pick is there for the first of them."""
    found: dict[tuple[Any, ...], Configuration] = {}
    for chip in chips:
        for cell, backward, dtype, h, n in itertools.product(CELLS.values(), (False, True), DTYPES, HIDDEN, BATCH):
            call = Call(cell, backward, h, n, 1, dtype)
            plan = choose(call, chip)
            found.setdefault(key(call, plan), Configuration(call, plan, chip))
    return found


def examples(found: Iterable[Configuration]) -> list[Configuration]:
    """One configuration of each cell, regime and walk."""
    first: dict[tuple[Any, ...], Configuration] = {}
    for each in found:
        first.setdefault((each.call.cell.name, each.plan.regime, each.call.backward), each)
    return list(first.values())


_built: dict[Configuration, Usage] = {}


def usage(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> Usage:
    """Compile a configuration for its chip, once in this process."""
    if configuration not in _built:
        arguments = record(configuration.call, configuration.plan, configuration.everything, monkeypatch)
        kernel = walk_backward if configuration.call.backward else walk_forward
        major, minor = configuration.chip.capability
        _built[configuration] = build(kernel, arguments, 10 * major + minor)
    return _built[configuration]


def check_resources(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold a configuration to the stated limits."""
    found = usage(configuration, monkeypatch)
    plan, call, chip = configuration.plan, configuration.call, configuration.chip
    limit = MOST_BACKWARD_SPILLS if call.backward else MOST_FORWARD_SPILLS
    if not call.backward and plan.regime == "cooperative" and plan.width > _WIDE and chip.capability >= (9, 0):
        limit = MOST_WIDE_FORWARD_SPILLS
    assert found.spills <= limit, f"{found.spills} bytes spilled, {found.registers} registers"
    # A launch a step is what is left where nothing else fits, so it has to fit the smallest chip.
    assert found.shared <= (chip.shared_bytes if plan.unrolled else L40S.shared_bytes)
    assert found.registers * 32 * plan.warps <= REGISTERS
    if plan.unrolled:
        assert found.shared <= shared_bytes(call, plan), "the plan's estimate is too low"
        if call.dtype.itemsize == 2 and plan.width > 16:
            # The weights go to shared memory once, before the walk. Those of one small product may stay in registers.
            before = found.ttgir[: found.ttgir.index("scf.for")]
            piles = 1 if plan.stacked and not call.backward else call.cell.num_gates
            assert before.count("ttg.local_alloc") >= piles * plan.chunks
    if chip.capability >= (9, 0) and plan.unrolled and not call.backward and call.dtype.itemsize == 2 and call.hidden > 1:
        # Weights fill the 64 rows of a Hopper tile, so the products are wgmma however few sequences there are.
        wide = plan.units * (4 if plan.stacked else 1) >= 64
        assert ("wgmma.mma_async" in found.ptx) == wide
        assert ("mma.sync" in found.ptx) != wide
