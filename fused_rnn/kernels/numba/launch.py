"""From torch tensors to a running kernel: compiles, packs the weights, lays out the arguments, starts the team."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_rnn.data.cell import Cell
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.numba import team
from fused_rnn.kernels.numba.arguments import Arg
from fused_rnn.kernels.numba.compiled import Compiled, compiled
from fused_rnn.kernels.numba.pack import Panels
from fused_rnn.kernels.numba.pack import pack as pack_panels
from fused_rnn.kernels.numba.product import PLAIN_VECTORS, max_rows, panel_vectors
from fused_rnn.kernels.numba.share import COUNTER_BYTES
from fused_rnn.kernels.numba.vector import REGISTER_BYTES

# A kernel whose threads share fewer multiply-adds than this per step loses more by meeting than it gains by sharing.
_MIN_SHARED_STEP = 16_000
# Fewer in all do not pay for waking the team.
_MIN_SHARED_CALL = 100_000
# Sharing by row beats sharing by unit where every thread has so many rows and its cache holds all weights of a recurrence,
# so many bytes. Measured with 2 MiB of second-level cache per core.
_MIN_ROWS, _MAX_ROW_WEIGHTS = 8, 3 << 19
# Up to so many rows and steps, packing costs more than dot products with the weights as they are.
_MAX_STORED_BATCH, _MAX_STORED_STEPS = 2, 8
_SUMS_BYTES = 32 * REGISTER_BYTES


@dataclass(frozen=True)
class Packed:
    """The weights of a call: panels, or for a call too short to pay for packing the tensors as they are.

    Attributes:
        weights: those that meet h; as they are, with the rows of later gates behind them.
        later: those of the second stage.
        shape: D, H and P.
        backward: for which of the two walks.
    """

    weights: Panels | list[Tensor]
    later: Panels | None
    projection: Panels | None
    shape: tuple[int, int, int]
    dtype: torch.dtype
    backward: bool


def _lanes(dtype: torch.dtype) -> int:
    return REGISTER_BYTES // dtype.itemsize


def _threads(steps: Steps, length: int, work: int) -> int:
    """How many threads to ask for. work: multiply-adds of one row, all recurrences."""
    if steps.batch * work < _MIN_SHARED_STEP or steps.batch * work * length < _MIN_SHARED_CALL:
        return 1
    return team.num_threads()


def _checked_rows(steps: Steps) -> int:
    """How many rows all steps have; raises where a step's rows lie outside the buffers or over another step's."""
    if steps.length < 0 or steps.batch < 0:
        raise ValueError(f"steps: expected 0 or more steps and sequences, got {steps.length}, {steps.batch}")
    if steps.batch_sizes is None or steps.offsets is None:
        return steps.length * steps.batch
    for name, tensor in (("batch_sizes", steps.batch_sizes), ("offsets", steps.offsets)):
        if tensor.shape != (steps.length,) or tensor.dtype != torch.int64:
            raise ValueError(f"{name}: expected shape ({steps.length},) of int64, got {tuple(tensor.shape)} of {tensor.dtype}")
    most, end = steps.batch, 0
    for size, offset in zip(steps.batch_sizes.tolist(), steps.offsets.tolist(), strict=True):
        if not 0 <= size <= most:
            raise ValueError(f"batch_sizes: expected 0 to {most}, got {size}")
        if offset < end:
            raise ValueError(f"offsets: expected {end} or more, got {offset}")
        most, end = size, offset + size
    return end


def _check_weights(weight_hh: list[Tensor], weight_hr: list[Tensor] | None, gates: int, shape: tuple[int, int, int]) -> None:
    number, units, size = shape
    if weight_hr is None and units != size:
        raise ValueError(f"weight_hr: expected weights, as P = {size} is not H = {units}, got None")
    for name, tensors, expected in (("weight_hh", weight_hh, (gates * units, size)), ("weight_hr", weight_hr, (size, units))):
        if tensors is None:
            continue
        if len(tensors) != number:
            raise ValueError(f"{name}: expected {number} tensors, got {len(tensors)}")
        for tensor in tensors:
            if tensor.shape != expected or tensor.is_neg():
                raise ValueError(f"{name}: expected plain tensors of shape {expected}, got {tuple(tensor.shape)}")
            if tensor.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"expected float32 or float64 buffers, got {tensor.dtype}")
            if tensor.dtype != weight_hh[0].dtype:
                raise ValueError(f"{name}: expected {weight_hh[0].dtype}, got {tensor.dtype}")


class _Arguments:
    """The block of arguments and all memory that it points to."""

    def __init__(
        self, like: Tensor, cell: Cell, units: int, size: int, steps: Steps, reverse: Any, reset: Tensor | None
    ) -> None:
        self.values = np.zeros(len(Arg), np.int64)
        self._keep: list[Any] = []
        self.dtype = like.dtype
        self.units, self.size = units, size
        self.count, self.state_count = _checked_rows(steps), len(cell.states)
        self.set(Arg.GIVE_WAY, team.give_way_address())
        self.set(Arg.LENGTH, steps.length)
        self.set(Arg.BATCH, steps.batch)
        self.set(Arg.DIRECTIONS, len(reverse))
        if steps.batch_sizes is not None and steps.offsets is not None:
            self.set(Arg.SIZES, self.keep(steps.batch_sizes.contiguous()))
            self.set(Arg.OFFSETS, self.keep(steps.offsets.contiguous()))
        if not reverse:
            raise ValueError("reverse: expected one flag for each recurrence, got none")
        self.set(Arg.REVERSE, self.keep(np.array(reverse, np.uint8)))
        if reset is not None:
            self._check(Arg.RESET, reset, (self.count,), torch.bool)
            self.set(Arg.RESET, self.keep(reset.contiguous()))
        self.set(Arg.GATES, cell.num_gates)
        if cell.cell_state is not None:
            self.set(Arg.CELL_STATE, cell.tape.index(cell.cell_state) * units * like.dtype.itemsize)
        self.set(Arg.UNITS, units)
        self.set(Arg.STATE_SIZE, size)
        self.set(Arg.ITEM, like.dtype.itemsize)
        self.set(Arg.LANES, _lanes(like.dtype))
        self.set(Arg.ZEROS, self.keep(like.new_zeros(max(len(cell.bias) * units, size))))

    def set(self, arg: Arg, value: int) -> None:
        self.values[arg] = value

    def keep(self, owner: Any) -> int:
        """Keep memory alive and return its address."""
        self._keep.append(owner)
        address: int = owner.data_ptr() if isinstance(owner, Tensor) else owner.ctypes.data
        return address

    def rows(self, arg: Arg, buffer: Tensor, columns: int, count: int | None = None) -> None:
        """Set the address and the strides of a row buffer (count, D, columns); count None for the rows of all steps."""
        shape = (self.count if count is None else count, int(self.values[Arg.DIRECTIONS]), columns)
        self._check(arg, buffer, shape)
        row, direction, column = buffer.stride()
        if buffer.numel() and columns > 1 and column != 1:
            raise ValueError(f"{arg.name.lower()}: expected contiguous columns, got strides {buffer.stride()}")
        if buffer.numel() and ((shape[0] > 1 and row < columns) or (shape[1] > 1 and direction < columns)):
            raise ValueError(f"{arg.name.lower()}: expected rows that do not overlap, got strides {buffer.stride()}")
        self.set(arg, buffer.data_ptr())
        self.set(Arg(arg + 1), row * buffer.itemsize)
        self.set(Arg(arg + 2), direction * buffer.itemsize)

    def states(self, h: Arg, c: Arg, states: tuple[Tensor, ...]) -> None:
        """Set the addresses of the states."""
        if len(states) != self.state_count:
            raise ValueError(f"{h.name.lower()}: expected {self.state_count} states, got {len(states)}")
        first = (int(self.values[Arg.DIRECTIONS]), int(self.values[Arg.BATCH]))
        for arg, state, width in zip((h, c), states, (self.size, self.units), strict=False):
            self.contiguous(arg, state, (*first, width))

    def contiguous(self, arg: Arg, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """Set the address of a contiguous tensor."""
        self._check(arg, tensor, shape)
        if not tensor.is_contiguous():
            raise ValueError(f"{arg.name.lower()}: expected a contiguous tensor, got strides {tensor.stride()}")
        self.set(arg, tensor.data_ptr())

    def _check(self, arg: Arg, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        dtype = self.dtype if dtype is None else dtype
        if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.is_neg():
            raise ValueError(f"{arg.name.lower()}: expected plain {dtype} on the CPU, got {tensor.dtype} on {tensor.device}")
        if tensor.shape != shape:
            raise ValueError(f"{arg.name.lower()}: expected shape {shape}, got {tuple(tensor.shape)}")

    def run(self, kernel: Compiled, threads: int) -> None:
        """Run the kernel on a team and wait for it."""
        batch = int(self.values[Arg.BATCH])
        per_thread = _SUMS_BYTES + 6 * 8 * batch
        per_thread += -per_thread % COUNTER_BYTES
        scratch = np.empty(threads * per_thread + COUNTER_BYTES, np.uint8)
        counters = np.zeros((threads + 1) * COUNTER_BYTES, np.uint8)
        self.set(Arg.SCRATCH, self.keep(scratch) + -scratch.ctypes.data % COUNTER_BYTES)
        self.set(Arg.SCRATCH_THREAD, per_thread)
        self.set(Arg.SCRATCH_ROWS, _SUMS_BYTES)
        self.set(Arg.COUNTERS, self.keep(counters) + -counters.ctypes.data % COUNTER_BYTES)
        self.set(Arg.TEAM_SIZE, threads)
        self.set(Arg.TEAM_SIZE_FUNCTION, team.team_size_address() if threads > 1 else 0)
        weights = int(self.values[Arg.GATES]) * self.units * self.size * self.dtype.itemsize
        self.set(Arg.ROW_MAJOR, batch >= threads * _MIN_ROWS and weights <= _MAX_ROW_WEIGHTS)
        team.run(kernel.call, kernel.address, self.values.ctypes.data, threads)


def make_functions(cell: Cell, forward_kernel: Any, backward_kernel: Any) -> tuple[Any, Any, Any]:
    """Make a cell's ``pack``, ``forward`` and ``backward`` (``fused_rnn.kernels.by_walk.walk``).

    Args:
        cell: which cell.
        forward_kernel: (like, version) -> the function to compile for the forward.
        backward_kernel: the same for the backward.
    """
    gates, first, vectors = cell.num_gates, len(cell.first), PLAIN_VECTORS
    later_blocks = range(first, gates)

    def pack(weight_hh: list[Tensor], weight_hr: list[Tensor] | None, steps: Steps, backward: bool) -> Packed:
        shape = (len(weight_hh), weight_hh[0].shape[0] // gates, weight_hh[0].shape[1])
        _check_weights(weight_hh, weight_hr, gates, shape)
        if not backward and weight_hr is None and steps.batch <= _MAX_STORED_BATCH and steps.length <= _MAX_STORED_STEPS:
            return Packed([weight.contiguous() for weight in weight_hh], None, None, shape, weight_hh[0].dtype, backward)
        split = [weight.reshape(gates, -1, weight.shape[1]).unbind() for weight in weight_hh]
        later = None
        if backward:
            weights = pack_panels(
                [[blocks[index].T for index in cell.weight_blocks] for blocks in split], vectors, stacked=True
            )
            if cell.later:
                later = pack_panels([[blocks[index].T for index in later_blocks] for blocks in split], vectors, stacked=True)
        else:
            weights = pack_panels([blocks[:first] for blocks in split], panel_vectors(first), stacked=False)
            if cell.later:
                vectors_of_later = panel_vectors(len(cell.later))
                later = pack_panels([blocks[first:] for blocks in split], vectors_of_later, stacked=False)
        projection = None
        if weight_hr is not None:
            projection = pack_panels([[weight.T if backward else weight] for weight in weight_hr], vectors, stacked=False)
        return Packed(weights, later, projection, shape, weight_hh[0].dtype, backward)

    def set_weights(arguments: _Arguments, packed: Packed, backward: bool) -> None:
        shape = (int(arguments.values[Arg.DIRECTIONS]), arguments.units, arguments.size)
        if packed.shape != shape:
            raise ValueError(f"packed: expected weights of (D, H, P) = {shape}, got {packed.shape}")
        if packed.dtype != arguments.dtype:
            raise ValueError(f"packed: expected weights of {arguments.dtype}, got {packed.dtype}")
        if packed.backward != backward:
            raise ValueError(f"packed: expected weights packed with backward={backward}, got backward={packed.backward}")
        if isinstance(packed.weights, Panels):
            arguments.set(Arg.WEIGHTS, packed.weights.address)
            arguments.set(Arg.WEIGHTS_DIRECTION, packed.weights.stride)
        else:
            addresses = np.array([weight.data_ptr() for weight in packed.weights], np.int64)
            arguments.set(Arg.STORED, arguments.keep(addresses))
        if packed.later is not None:
            arguments.set(Arg.LATER, packed.later.address)
            arguments.set(Arg.LATER_DIRECTION, packed.later.stride)
        if packed.projection is not None:
            arguments.set(Arg.PROJECTION, packed.projection.address)
            arguments.set(Arg.PROJECTION_DIRECTION, packed.projection.stride)
        arguments.set(Arg.PLAIN_VECTORS, vectors)
        arguments.set(Arg.PLAIN_ROWS, max_rows(vectors))

    def forward(
        tape: Tensor,
        out: Tensor,
        states: tuple[Tensor, ...],
        packed: Packed,
        bias: Tensor | None,
        steps: Steps,
        reverse: Any,
        reset: Tensor | None,
        keep: bool,
    ) -> None:
        if steps.batch == 0 or steps.length == 0:
            return
        units, size = tape.shape[2] // len(cell.tape), out.shape[2]
        arguments = _Arguments(tape, cell, units, size, steps, reverse, reset)
        arguments.rows(Arg.TAPE, tape, len(cell.tape) * units)
        arguments.rows(Arg.OUT, out, size)
        arguments.states(Arg.STATE_H, Arg.STATE_C, states)
        set_weights(arguments, packed, backward=False)
        if bias is None:
            arguments.set(Arg.BIAS, int(arguments.values[Arg.ZEROS]))
        else:
            bias = bias.contiguous()
            arguments.keep(bias)
            arguments.contiguous(Arg.BIAS, bias, (len(reverse), len(cell.bias) * units))
            arguments.set(Arg.BIAS_DIRECTION, len(cell.bias) * units * tape.itemsize)
        if packed.projection is not None:
            arguments.set(Arg.HIDDEN, arguments.keep(tape.new_empty((len(reverse), steps.batch, units))))
        threads = _threads(steps, steps.length, len(reverse) * gates * units * size)
        arguments.run(compiled(forward_kernel, tape.dtype), threads)

    def backward(
        d_gates: Tensor,
        d_states: tuple[Tensor, ...],
        d_out: Tensor | None,
        d_cells: Tensor | None,
        tape: Tensor,
        out: Tensor,
        states_0: tuple[Tensor, ...],
        packed: Packed,
        steps: Steps,
        t_begin: int,
        t_end: int,
        reverse: Any,
        reset: Tensor | None,
    ) -> None:
        if not 0 <= t_begin <= t_end <= steps.length:
            raise ValueError(f"t_begin, t_end: expected 0 <= t_begin <= t_end <= {steps.length}, got {t_begin}, {t_end}")
        if steps.batch == 0 or t_begin == t_end:
            return
        units, size = tape.shape[2] // len(cell.tape), out.shape[2]
        arguments = _Arguments(tape, cell, units, size, steps, reverse, reset)
        arguments.rows(Arg.TAPE, tape, len(cell.tape) * units)
        arguments.rows(Arg.OUT, out, size)
        walked = steps.rows(t_begin, t_end)
        columns = len(cell.d_gates) * units + (0 if packed.projection is None else size)
        arguments.set(Arg.D_PROJECTED, len(cell.d_gates) * units * tape.itemsize)
        arguments.rows(Arg.D_GATES, d_gates, columns, walked.stop - walked.start)
        if d_out is None:
            arguments.set(Arg.D_OUT, int(arguments.values[Arg.ZEROS]))
        else:
            arguments.rows(Arg.D_OUT, d_out, size)
        if d_cells is None:
            arguments.set(Arg.D_CELLS, int(arguments.values[Arg.ZEROS]))
        else:
            if cell.cell_state is None:
                raise ValueError(f"d_cells: expected None for {cell.name}, which has no cell state, got a tensor")
            arguments.rows(Arg.D_CELLS, d_cells, units)
        arguments.states(Arg.STATE_H, Arg.STATE_C, d_states)
        arguments.states(Arg.FIRST_H, Arg.FIRST_C, states_0)
        arguments.set(Arg.BEGIN, t_begin)
        arguments.set(Arg.END, t_end)
        set_weights(arguments, packed, backward=True)
        threads = _threads(steps, t_end - t_begin, len(reverse) * gates * units * size)
        arguments.run(compiled(backward_kernel, tape.dtype), threads)

    module = sys._getframe(1).f_globals["__name__"]
    for function, suffix in ((pack, "pack"), (forward, "forward"), (backward, "backward")):
        function.__name__ = function.__qualname__ = f"{cell.name}_{suffix}"
        function.__module__ = module
    return pack, forward, backward
