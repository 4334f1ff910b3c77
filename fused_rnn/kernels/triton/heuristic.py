"""Which regime and tiles a call gets: from sizes, dtype and the device, or from the table of measured choices.

What fits is known: shared memory and registers were read from compiled code. What is faster is a guess until it is measured,
and rows of the tuned table overrule it.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from fused_rnn.kernels.triton import tuned
from fused_rnn.kernels.triton.plan import REGIMES, Call, Device, Plan, forced

# Shared memory that the compiler takes beside the weights and the chunks of h or d_gates: room to change layouts in, this much
# or one product in float32. The tests hold it to what compiled kernels use.
_SCRATCH_BYTES = 10 << 10
# The least batch tile, and chunk of K: a tensor core's.
_LEAST_TILE = 16
# Units of a program that shares the work, so that 4 gates of them fill the 64 rows of a Hopper tensor core's tile.
_SHARED_UNITS = 16
# Gates of all units of a resident program in the forward: beyond so many, its sums leave no registers for a tile of 32.
_MOST_ROWS_OF_LARGE_TILE = 192
# The same for the least batch tile, forward and backward, by the bytes of a number: where rows are aligned, and where they are
# not and keep more addresses. A product without tensor cores keeps its operands too.
_MOST_ROWS = {2: (512, 384), 4: (256, 192)}
# Units of one gate, in a backward without tensor cores whose rows are not aligned: it keeps operands and addresses both.
_MOST_UNALIGNED_FLOAT32_UNITS = 64
# Without tensor cores a product keeps all its operands in registers: beyond this, code that is slow to compile and spills.
_MOST_FLOAT32_UNITS = 256
# Cooperative launches that follow one another. Beyond so many, every step is better done for the whole batch at once. A guess
# until it is measured; a row of the tuned table overrules it.
_MOST_ROUNDS = 4
# Up to so many rows the kernels' own product, one launch a step, is preferred to the library's; likewise a guess.
_MOST_STEPWISE_ROWS = 64


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
        plan = _attempt(call, device, row["regime"], fields)
        if not isinstance(plan, str):
            near = f"H={row['hidden']}, N={row['batch']}"
            return dataclasses.replace(plan, reason=f"it was fastest for {near} on this device when that was measured")
    plan = _attempt(call, device, None, {})
    assert not isinstance(plan, str)
    return plan


def _attempt(call: Call, device: Device, regime: str | None, fields: dict[str, object]) -> Plan | str:
    """A plan of one regime, or of the first that fits; or a sentence that says why there is none."""
    if regime is not None:
        return _MAKERS[regime](call, device, fields)
    reasons: list[str] = []
    for name in REGIMES:
        plan = _MAKERS[name](call, device, fields)
        if isinstance(plan, Plan):
            return dataclasses.replace(plan, reason="; ".join([*reasons, plan.reason]))
        reasons.append(f"not {name}: {plan}")
    return "; ".join(reasons)


def _own_product(call: Call) -> str | None:
    """Why the kernels' own product does not serve, or None where it does."""
    if call.projected:
        return "the projection of h is a second product in each step"
    if call.dtype == torch.float64:
        return "float64 is left to the library's product"
    return None


def power_of_two(number: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()


def _chunks(call: Call) -> tuple[int, int]:
    """Columns of K in one product, and their number. Fewer in float32: a product without tensor cores keeps them all."""
    most = 128 if call.dtype.itemsize == 2 else 32
    if call.backward and call.dtype.itemsize == 2:
        # Large ones, of which each warp has a part that is worth a product. Only as large as pads K no further.
        most = 512 if math.ceil(call.hidden / 256) % 2 == 0 and _aligned(call) else 256
    chunk = max(_LEAST_TILE, min(most, power_of_two(call.hidden)))
    return chunk, math.ceil(call.hidden / chunk)


def _aligned(call: Call) -> bool:
    """Whether rows begin where a thread can read several numbers at once. If not, each has an address and a mask of its own."""
    return call.hidden % _LEAST_TILE == 0


def _make(call: Call, regime: str, units: int, batch: int, warps: int | None, reason: str) -> Plan:
    """Fill in what follows from the units and the batch tile."""
    chunk, chunks = _chunks(call)
    split = 1 if units >= 64 else max(1, min(8, chunk // 32))
    if warps is None:
        large = (call.backward and split >= 8) or (regime == "resident" and units > _SHARED_UNITS)
        warps = 8 if large or call.dtype.itemsize > 2 else 4
    tiles = math.ceil(call.batch / batch)
    return Plan(
        regime=regime,
        units=units,
        batch=batch,
        chunk=chunk,
        chunks=chunks,
        slices=math.ceil(call.hidden / units),
        tiles=tiles,
        tiles_at_once=max(1, tiles),
        directions_at_once=call.directions,
        split=split,
        stacked=call.cell.num_gates > 1 and units < 64,
        warps=warps,
        reason=reason,
    )


def weight_bytes(call: Call, plan: Plan) -> int:
    """Bytes of the weights of one program."""
    gates = 4 if plan.stacked and not call.backward else call.cell.num_gates
    return gates * plan.units * plan.width * call.dtype.itemsize


def shared_bytes(call: Call, plan: Plan) -> int:
    """Shared memory that one program of a resident or cooperative plan takes, at most."""
    moving = plan.chunk * plan.batch * call.dtype.itemsize * (1 if call.backward else plan.ahead)
    rows = 4 * plan.units if plan.stacked and not call.backward else plan.units
    return weight_bytes(call, plan) + moving + max(_SCRATCH_BYTES, 4 * rows * plan.batch)


def _tile(call: Call, fields: dict[str, object], wanted: int, most: int) -> int:
    """The batch tile: what was asked for, or the smallest that covers ``wanted`` rows."""
    asked = fields.get("batch")
    if isinstance(asked, int):
        return asked
    return max(_LEAST_TILE, min(most, power_of_two(wanted)))


def _warps(fields: dict[str, object]) -> int | None:
    asked = fields.get("warps")
    return asked if isinstance(asked, int) else None


def _units(fields: dict[str, object], default: int) -> int:
    asked = fields.get("units")
    return asked if isinstance(asked, int) else default


def _shared_units(call: Call) -> int:
    """Units of a program that shares the work: the fewest that fill the rows of a tensor core's tile."""
    return _SHARED_UNITS if call.cell.num_gates > 1 or call.backward else 4 * _SHARED_UNITS


def _kibibytes(number: int) -> str:
    return f"{number / 1024:.0f} KiB"


def _resident(call: Call, device: Device, fields: dict[str, object]) -> Plan | str:
    reason = _own_product(call)
    if reason is not None:
        return reason
    units = _units(fields, max(_LEAST_TILE, power_of_two(call.hidden)))
    if units < call.hidden:
        return f"{units} units of a program are fewer than H={call.hidden}"
    if units > 128:
        return f"H={call.hidden} is more than the 128 units of which one program has room for all gates"
    rows = call.cell.num_gates * units
    aligned, not_aligned = _MOST_ROWS[call.dtype.itemsize]
    if rows > (aligned if _aligned(call) else not_aligned) and "regime" not in fields:
        return f"{rows} gates are more than the registers of one program have room for"
    crowded = call.backward and call.dtype == torch.float32 and not _aligned(call) and units > _MOST_UNALIGNED_FLOAT32_UNITS
    if crowded and "regime" not in fields:
        return (
            f"{units} units in float32, in rows that are not aligned, are more than the registers of one program have room for"
        )
    # Small tiles first: they spread the batch over the processors. Larger ones once every processor has one.
    wanted = math.ceil(call.batch * call.directions / device.processors)
    room = _aligned(call) if call.backward else rows <= _MOST_ROWS_OF_LARGE_TILE
    room = room and call.dtype.itemsize == 2
    batch = _tile(call, fields, wanted, most=32 if room else 16)
    plan = _make(call, "resident", units, batch, _warps(fields), "one program holds all weights in its shared memory")
    needed = shared_bytes(call, plan)
    if needed > device.shared_bytes:
        return f"all weights take {_kibibytes(needed)} of shared memory, a program has {_kibibytes(device.shared_bytes)}"
    return plan


def _cooperative(call: Call, device: Device, fields: dict[str, object]) -> Plan | str:
    reason = _own_product(call)
    if reason is not None:
        return reason
    if call.dtype == torch.float32 and call.hidden > _MOST_FLOAT32_UNITS:
        return f"in float32 it is made for H up to {_MOST_FLOAT32_UNITS}"
    best: Plan | None = None
    why = ""
    sizes = [_tile(call, fields, 0, 0)] if "batch" in fields else _cooperative_tiles(call)
    for batch in sizes:
        plan = _make(call, "cooperative", _units(fields, _shared_units(call)), batch, _warps(fields), "")
        needed = shared_bytes(call, plan)
        if needed > device.shared_bytes:
            why = (
                f"a slice of {plan.units} units takes {_kibibytes(needed)} of shared memory, "
                f"a program has {_kibibytes(device.shared_bytes)}"
            )
            continue
        # One program per processor is what is sure to be co-resident. The interpreter runs one after another.
        room = 1 if device.interpreted else device.processors
        if plan.slices > room:
            why = f"{plan.slices} programs must run at once, and {device.name} runs {room}"
            continue
        directions = min(call.directions, room // plan.slices)
        tiles = max(1, min(plan.tiles, room // (plan.slices * directions)))
        if device.interpreted:
            directions, tiles = call.directions, max(1, plan.tiles)
        plan = dataclasses.replace(plan, tiles_at_once=tiles, directions_at_once=directions)
        if best is None or _rounds(call, plan) < _rounds(call, best):
            best = plan
    if best is None:
        return why
    rounds = _rounds(call, best)
    if rounds > _MOST_ROUNDS and "regime" not in fields:
        return f"{rounds} launches would follow one another, each all steps long, for the {best.tiles} batch tiles"
    what = f"{best.slices} programs hold a slice of {best.units} units each"
    return dataclasses.replace(best, reason=f"{what}, in {rounds} launch{'es' if rounds > 1 else ''}")


def _rounds(call: Call, plan: Plan) -> int:
    return plan.launches * math.ceil(call.directions / plan.directions_at_once)


def _cooperative_tiles(call: Call) -> list[int]:
    """Batch tiles for which the registers of a program suffice, smallest first; read from compiled code."""
    if call.dtype.itemsize > 2 or not _aligned(call) or call.hidden > (256 if call.backward else 1024):
        return [16]
    return [16, 32]


def _stepwise(call: Call, device: Device, fields: dict[str, object]) -> Plan | str:
    reason = _own_product(call)
    if reason is not None:
        return reason
    if call.batch > _MOST_STEPWISE_ROWS and "regime" not in fields:
        return f"the library's product is made for {call.batch} rows"
    small = call.dtype.itemsize > 2 or (call.backward and not _aligned(call))
    batch = _tile(call, fields, call.batch, most=16 if small else 32)
    units = _units(fields, _shared_units(call))
    return _make(call, "stepwise", units, batch, _warps(fields), "one launch a step, each of which reads the weights again")


def _library(call: Call, device: Device, fields: dict[str, object]) -> Plan | str:
    batch = _tile(call, fields, 0, 0)
    plan = _make(
        call, "library", _units(fields, 32), batch, _warps(fields) or 4, "torch.matmul and one pointwise launch a step"
    )
    # Without a product of its own the kernel is the same for every H.
    return dataclasses.replace(plan, stacked=False, split=1, chunk=_LEAST_TILE, chunks=1)


_MAKERS = {"resident": _resident, "cooperative": _cooperative, "stepwise": _stepwise, "library": _library}
