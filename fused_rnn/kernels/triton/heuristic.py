"""Which regime and tiles a call gets: from sizes, dtype and the device, or from the table of measured choices.

What fits is known: shared memory and registers were read from compiled code. What is faster is a model of a step's time whose
numbers were measured on an H100; rows of the tuned table overrule it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch

from fused_rnn.kernels.triton import tuned
from fused_rnn.kernels.triton.plan import PART, PILE, REGIMES, Call, Device, Plan, forced, power_of_two

# Columns of a matrix instruction.
_LEAST_BATCH = 8
# Registers of a thread that may hold weights: if they hold all of them, and if not, alone and shared, where more addresses are
# kept. And those that a plane of one tile of (16, 32) takes in each thread of a warp.
_WEIGHT_REGISTERS, _PART_OF_THEM, _TILE_REGISTERS = 128, (64, 96), 8
# Shared memory that the compiler takes beside what the kernels ask for: room to change layouts in.
_SCRATCH_BYTES, _LITTLE_SCRATCH_BYTES = 10 << 10, 2 << 10
# Units of a resident program: a warp has 16 of them, and 8 warps have all registers of a chip.
_MOST_RESIDENT_UNITS = 128
# Batch tiles that a program walks side by side, at most.
_MOST_TILES = 16
# Units times sequences of a program that streams its weights: more addresses in rows that are not aligned, and more products of
# one factor, leave room for fewer. Read from compiled code.
_MOST_ELEMENTS = 4096
# Programs of a launch along the batch: CUDA's limit of a grid's second dimension.
_MOST_PROGRAMS = 65535
# Multiprocessors of the chip that the model of a step's time was fitted to.
_PROCESSORS = 132


def choose(call: Call, device: Device) -> Plan:
    """Plan a call.

    Raises:
        ValueError: if a regime that was forced does not fit; the message says why.
    """
    asked = forced()
    if asked:
        plan = _attempt(call, device, str(asked.get("regime", "")) or None, asked)
        if isinstance(plan, str):
            raise ValueError(f"force({', '.join(f'{k}={v!r}' for k, v in asked.items())}): {plan}")
        return dataclasses.replace(plan, reason="it was forced")
    row = tuned.find(
        device.name,
        call.cell.name,
        call.backward,
        str(call.dtype).removeprefix("torch."),
        call.hidden,
        call.batch,
        call.directions,
    )
    if row is not None:
        fields = {"regime": row["regime"], "units": row["units"], "batch": row["tile"], "warps": row["warps"]}
        # Measured for these sizes or larger ones: units that are more than H has make no sense in a smaller layer.
        if row["regime"] == "resident":
            fields.pop("units")
            fields.pop("warps")
        plan = _attempt(call, device, row["regime"], fields)
        if not isinstance(plan, str):
            near = f"H={row['hidden']}, N={row['batch']}"
            return dataclasses.replace(plan, reason=f"it was fastest for {near} on this device when that was measured")
    plan = _attempt(call, device, None, {})
    assert not isinstance(plan, str)
    return plan


def _attempt(call: Call, device: Device, regime: str | None, fields: dict[str, object]) -> Plan | str:
    """A plan of one regime, or of the best that fits; or a sentence that says why there is none."""
    for name, least, most in (("units", 8, 128), ("batch", 8, 128), ("warps", 1, 16)):
        asked = fields.get(name)
        if isinstance(asked, int) and not (least <= asked <= most and power_of_two(asked) == asked):
            return f"{name}: expected a power of two from {least} to {most}, got {asked}"
    if regime is not None:
        return _MAKERS[regime](call, device, fields)
    reasons: list[str] = []
    made: list[Plan] = []
    for name in REGIMES:
        plan = _MAKERS[name](call, device, fields)
        if isinstance(plan, str):
            reasons.append(f"not {name}: {plan}")
        elif name == "library" and made:
            break
        else:
            made.append(plan)
    if not made:
        return "; ".join(reasons)
    best = min(made, key=lambda plan: microseconds(call, plan))
    others = [f"not {plan.regime}: {_estimate(call, plan)} a step" for plan in made if plan is not best]
    return dataclasses.replace(best, reason="; ".join([*reasons, *others, best.reason]))


def _estimate(call: Call, plan: Plan) -> str:
    rounds = plan.launches * math.ceil(call.directions / plan.directions_at_once)
    return f"about {microseconds(call, plan):.1f} µs{f' in {rounds} launches' if rounds > 1 else ''}"


def microseconds(call: Call, plan: Plan) -> float:
    """What a step of the whole batch takes: a model with numbers that were fitted to an H100, right to some 20 %."""
    rounds = plan.launches * math.ceil(call.directions / plan.directions_at_once)
    backward, gates, products = call.backward, call.cell.num_gates, plan.planes * (plan.planes + 1) // 2
    if plan.regime == "streamed":
        rows, columns = (plan.units, gates) if backward else ((4 if plan.stacked else gates) * plan.units, 1)
        kilobytes = (rows + plan.batch) * columns * call.hidden * call.dtype.itemsize / 1024
        elements = plan.units * plan.batch
        time = (3.5 if backward else 1.0) + (0.0175 if backward else 0.021) * kilobytes + 0.0008 * elements
        # Without whole rows of an instruction the products are those of a warp; exact ones are several each.
        return rounds * time * (1.3 if backward and plan.units < 64 else 1.0) * (3.5 if products > 3 else 1.0)
    if plan.alone:
        rounds = math.ceil(plan.tiles * call.directions / _PROCESSORS)
        return rounds * (0.15 + 0.22 * gates * plan.units / 128 * (0.4 + 0.6 * products)) * (1.3 if backward else 1.0)
    each = plan.tiles_each
    work = gates * call.hidden * (0.4 + 0.6 * products) * (0.00037 if backward else 0.00016)
    more = 0.0 if plan.batch <= 16 else (2.5 if backward else 1.4) * (plan.batch - 16) / 16
    work = work * (1.0 if plan.batch <= 8 else 1.4) + more
    # Two programs of a processor hide some of each other's waits, and get in each other's way.
    beside = math.ceil(plan.slices * plan.tiles / plan.tiles_each * call.directions / _PROCESSORS) if plan.warps <= 4 else 1
    shared = 1.0 if plan.warps > 4 else 1.05 if beside <= 1 else 1.6
    return rounds * shared * each * ((1.2 if backward else 1.45) + work)


def _own_product(call: Call) -> str | None:
    """Why the kernels' own product does not serve, or None where it does."""
    if call.projected:
        return "the projection of h is a second product in each step"
    if call.cell.later:
        return f"the product of {', '.join(call.cell.later)} is a second one in each step"
    if call.dtype == torch.float64:
        return "float64 is left to the library's product"
    return None


def _asked(fields: dict[str, object], name: str, default: int) -> int:
    asked = fields.get(name)
    return asked if isinstance(asked, int) else default


def _choices(fields: dict[str, object], name: str, choices: tuple[int, ...]) -> tuple[int, ...]:
    return (_asked(fields, name, 0),) if name in fields else choices


def _kibibytes(number: int) -> str:
    return f"{number / 1024:.0f} KiB"


def shared_bytes(call: Call, plan: Plan) -> int:
    """Shared memory that one program takes, at most."""
    if not plan.fragments:
        rows = plan.units if call.backward else (4 if plan.stacked else call.cell.num_gates) * plan.units
        moving = (rows + plan.batch) * plan.chunk * call.dtype.itemsize * STREAM_STAGES
        return moving + max(_SCRATCH_BYTES, 4 * rows * plan.batch)
    tiles = plan.piles * plan.parts * plan.planes
    if plan.alone:
        tail = (call.cell.num_gates * plan.planes - plan.held) * plan.units * plan.units * 2
        exchanged = (call.cell.num_gates if call.backward else 1) * plan.planes * plan.units * plan.batch * 2
        # What the compiler transposes a tile of the weights in.
        turned = plan.units * 128 if call.backward else 0
        return tail + max(exchanged, turned) + _LITTLE_SCRATCH_BYTES
    tail = (tiles - plan.held) * plan.warps * PILE * PART * 2
    turned = plan.warps * PILE * PART * call.dtype.itemsize if call.backward else 0
    carried = 0 if plan.tiles_each == 1 else power_of_two(plan.tiles_each) * plan.units * plan.batch * 4
    if call.backward:
        carried *= len(call.cell.states)
    return tail + plan.piles * plan.warps * PILE * plan.batch * 4 + carried + turned + _SCRATCH_BYTES


# Chunks of K under way in the streamed regime.
STREAM_STAGES = 4


def _held(tiles: int, registers: int, alone: bool) -> int:
    """How many of the weights' tiles a program keeps in registers, of which each takes so many in a thread."""
    return tiles if tiles * registers <= _WEIGHT_REGISTERS else _PART_OF_THEM[not alone] // registers


def _resident(call: Call, device: Device, fields: dict[str, object]) -> Plan | str:
    reason = _own_product(call)
    if reason is not None:
        return reason
    units = max(PILE, power_of_two(call.hidden))
    most = _MOST_RESIDENT_UNITS * (2 if call.cell.num_gates == 1 else 1)
    if units > most:
        return f"H={call.hidden} is more than the {most} units whose weights one program has room for"
    # A warp has all gates of 16 units, of all columns; 16 warps have half the registers each that 8 have.
    tile = max(4, units // PART * _TILE_REGISTERS) * (1 if units <= _MOST_RESIDENT_UNITS else 2)
    held = _held(call.planes * call.cell.num_gates, tile, alone=True)
    batch = _asked(fields, "batch", _LEAST_BATCH)
    plan = Plan(
        "resident",
        units,
        batch,
        max(1, units // PILE),
        slices=1,
        tiles=math.ceil(call.batch / batch),
        tiles_at_once=max(1, min(_MOST_PROGRAMS, math.ceil(call.batch / batch))),
        directions_at_once=call.directions,
        planes=call.planes,
        held=held,
        reason="one program holds all weights in its registers",
    )
    needed = shared_bytes(call, plan)
    if needed > device.shared_bytes:
        return f"all weights take {_kibibytes(needed)} of shared memory beside the registers, a program has " + _kibibytes(
            device.shared_bytes
        )
    return plan


def _cooperative(call: Call, device: Device, fields: dict[str, object]) -> Plan | str:
    reason = _own_product(call)
    if reason is not None:
        return reason
    units = _asked(fields, "units", PILE)
    if units > PILE:
        return f"a program has up to {PILE} units, not {units}"
    slices = math.ceil(call.hidden / units)
    best: Plan | None = None
    why = ""
    sizes = itertools.product(_choices(fields, "warps", (8, 4)), _choices(fields, "batch", (8, 16, 32)))
    for warps, batch in sizes:
        # Two programs of four warps have the registers of one of eight. That many are sure to run at once.
        beside = 2 if warps <= 4 else 1
        room = 1 if device.interpreted else device.processors * beside
        if slices > room:
            why = f"{slices} programs must run at once, and {device.name} runs {room}"
            continue
        plan = _cooperative_plan(call, device, units, batch, warps, room)
        if 2 * plan.planes * call.directions * plan.tiles * plan.batch * plan.columns >= 1 << 31:
            why = f"what {call.batch} sequences exchange is more than 32 bits can count"
            continue
        # Tiles of 32 take more registers than are left beside many weights: read from compiled code.
        crowded = plan.held < plan.piles * plan.parts * plan.planes or (call.backward and plan.parts * plan.planes > 8)
        if batch > 16 and "batch" not in fields and (warps <= 4 or crowded):
            continue
        # A processor keeps a KiB to itself for each program, and has that much more than one program may take.
        needed, most = shared_bytes(call, plan), (device.shared_bytes + 1024) // beside - 1024
        if needed > most:
            why = (
                f"a slice of {units} units takes {_kibibytes(needed)} of shared memory beside the registers, "
                f"a program has {_kibibytes(most)}"
            )
        elif best is None or microseconds(call, plan) < microseconds(call, best):
            best = plan
    return best or why


def _cooperative_plan(call: Call, device: Device, units: int, batch: int, warps: int, room: int) -> Plan:
    gates, blocks = call.cell.num_gates, math.ceil(call.hidden / PART)
    slices = math.ceil(call.hidden / units)
    piles = 1 if call.backward else math.ceil(gates * units / PILE)
    parts = math.ceil(blocks * (gates if call.backward else 1) / warps)
    tiles = math.ceil(call.batch / batch)
    directions = min(call.directions, room // slices)
    groups = max(1, room // (slices * directions))
    # The interpreter runs one program after another.
    if device.interpreted:
        directions, groups = call.directions, max(1, tiles)
    each = min(_MOST_TILES, max(1, math.ceil(tiles / groups)))
    return Plan(
        "cooperative",
        units,
        batch,
        warps,
        slices,
        tiles,
        tiles_at_once=groups * each,
        directions_at_once=directions,
        tiles_each=each,
        planes=call.planes,
        piles=piles,
        parts=parts,
        held=_held(piles * parts * call.planes, _TILE_REGISTERS * max(1, warps // 8), alone=False),
        reason=f"{slices} programs hold a slice of {units} units each",
    )


def _streamed(call: Call, device: Device, fields: dict[str, object]) -> Plan | str:
    reason = _own_product(call)
    if reason is not None:
        return reason
    best: Plan | None = None
    why = ""
    for units, batch in _streamed_tiles(call, fields):
        slices, tiles = math.ceil(call.hidden / units), math.ceil(call.batch / batch)
        room = 1 if device.interpreted else device.processors
        if slices > room:
            why = f"{slices} programs must run at once, and {device.name} runs {room}"
            continue
        directions = min(call.directions, room // slices)
        at_once = max(1, min(tiles, room // (slices * directions)))
        if device.interpreted:
            directions, at_once = call.directions, max(1, tiles)
        chunk = (128 if call.backward else 64) * 2 // call.dtype.itemsize
        plan = Plan(
            "streamed",
            units,
            batch,
            _asked(fields, "warps", 8 if units * batch >= 1024 else 4),
            slices,
            tiles,
            at_once,
            directions,
            planes=call.planes,
            chunk=chunk,
            stacked=not call.backward and call.cell.num_gates > 1,
            reason="weights beyond registers are read again in each step, by programs that meet",
        )
        needed = shared_bytes(call, plan)
        if needed > device.shared_bytes:
            why = f"its tiles take {_kibibytes(needed)} of shared memory, a program has {_kibibytes(device.shared_bytes)}"
        elif best is None or microseconds(call, plan) < microseconds(call, best):
            best = plan
    return best or why


def _streamed_tiles(call: Call, fields: dict[str, object]) -> Iterator[tuple[int, int]]:
    """Units and sequences of a program; smaller ones first. No more than the registers of 8 warps have room for."""
    most = _MOST_ELEMENTS >> (call.hidden % 16 != 0) >> (2 if call.planes > 2 else 0)
    for units in _choices(fields, "units", (16, 32, 64)):
        for batch in _choices(fields, "batch", (16, 32, 64, 128)):
            if units * batch <= most or fields:
                yield units, batch


def _library(call: Call, device: Device, fields: dict[str, object]) -> Plan | str:
    units, batch = _asked(fields, "units", 32), _asked(fields, "batch", 16)
    tiles = math.ceil(call.batch / batch)
    return Plan(
        "library",
        units,
        batch,
        _asked(fields, "warps", 4),
        math.ceil(call.hidden / units),
        tiles,
        max(1, min(_MOST_PROGRAMS, tiles)),
        call.directions,
        reason="torch.matmul and one pointwise launch a step",
    )


_MAKERS = {"resident": _resident, "cooperative": _cooperative, "streamed": _streamed, "library": _library}
