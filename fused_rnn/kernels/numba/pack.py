"""Weights in the order in which the products read them: panels as wide as a tile, (depth, vectors, blocks, LANES) each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from fused_rnn.kernels.numba import team
from fused_rnn.kernels.numba.compiled import compiled
from fused_rnn.kernels.numba.memory import call_int, fetch_add, read_int64
from fused_rnn.kernels.numba.vector import REGISTER_BYTES, gather, load, splat, store

# A pack kernel's arguments: the head, then _JOB int64 for each block to pack.
_HEAD = 7
_JOB = 5
# Fewer floats do not pay for waking the team.
_MIN_SHARED = 20_000


@dataclass(frozen=True)
class Panels:
    """D packed matrices.

    Attributes:
        data: the panels, as bytes.
        address: where they start, aligned to a vector.
        stride: bytes from one matrix to the next.
    """

    data: Any
    address: int
    stride: int


@njit(error_model="numpy")
def _pack(p: int, like: Any, version: int) -> None:
    """Called by every thread of the team; each packs some vectors of the width of every job.

    p: address of [ticket, team size, function that tells the team size or 0, jobs, width, vectors of a panel, bytes of a
    float], then for each job [source, stride of the width, stride of the depth, depth, target], then the target's strides:
    [panel, vector, depth].
    """
    function = read_int64(p + 16)
    threads = read_int64(p + 8) if function == 0 else call_int(function)
    thread = fetch_add(p, 1)
    jobs, width, vectors, item = read_int64(p + 24), read_int64(p + 32), read_int64(p + 40), read_int64(p + 48)
    strides = p + 8 * (_HEAD + _JOB * jobs)
    of_panel, of_vector, of_depth = read_int64(strides), read_int64(strides + 8), read_int64(strides + 16)
    lanes = REGISTER_BYTES // item
    every = (width + lanes * vectors - 1) // (lanes * vectors) * vectors
    for number in range(every * thread // threads, every * (thread + 1) // threads):
        for index in range(jobs):
            job = p + 8 * (_HEAD + _JOB * index)
            step, down, depth = read_int64(job + 8), read_int64(job + 16), read_int64(job + 24)
            source = read_int64(job) + number * lanes * step
            target = read_int64(job + 32) + number // vectors * of_panel + number % vectors * of_vector
            count = width - number * lanes
            if count <= 0:
                for k in range(depth):
                    store(target + k * of_depth, splat(like), None)
            elif count < lanes:
                for k in range(depth):
                    store(target + k * of_depth, gather(like, source + k * down, step, count), None)
            elif step == item:
                for k in range(depth):
                    store(target + k * of_depth, load(like, source + k * down, None), None)
            else:
                for k in range(depth):
                    store(target + k * of_depth, gather(like, source + k * down, step, None), None)


def _pack_kernel(like: Any, version: int) -> Any:
    def pack(p: int) -> None:
        _pack(p, like, version)

    return pack


def pack(blocks: Sequence[Sequence[Tensor]], vectors: int, stacked: bool) -> Panels:
    """Pack D matrices.

    Args:
        blocks: for each of D matrices its blocks, (width, depth) each, any strides.
        vectors: vectors of the width in a panel.
        stacked: whether the blocks follow each other in depth (one long product) or lie side by side (one product each).
    """
    width, depth = blocks[0][0].shape
    dtype = blocks[0][0].dtype
    item = dtype.itemsize
    panel_width = vectors * REGISTER_BYTES // item
    panels = -(-width // panel_width)
    number = len(blocks[0])
    beside = 1 if stacked else number
    of_depth = vectors * beside * REGISTER_BYTES
    of_panel = of_depth * depth * (number if stacked else 1)
    stride = of_panel * panels
    # Not a torch tensor: filling one, as torch's deterministic mode does, takes threads that a forked child has not.
    data = np.empty(stride * len(blocks) + REGISTER_BYTES, np.uint8)
    address = data.ctypes.data + -data.ctypes.data % REGISTER_BYTES
    threads = team.num_threads() if width * depth * number * len(blocks) >= _MIN_SHARED else 1
    values = [0, threads, team.team_size_address() if threads > 1 else 0, len(blocks) * number, width, vectors, item]
    for d, matrix in enumerate(blocks):
        for index, block in enumerate(matrix):
            offset = index * (depth * of_depth if stacked else REGISTER_BYTES)
            strides = block.stride(0) * item, block.stride(1) * item
            values += [block.data_ptr(), *strides, depth, address + d * stride + offset]
    values += [of_panel, beside * REGISTER_BYTES, of_depth]
    arguments = np.array(values, np.int64)
    kernel = compiled(_pack_kernel, dtype)
    team.run(kernel.call, kernel.address, arguments.ctypes.data, threads)
    return Panels(data, address, stride)
