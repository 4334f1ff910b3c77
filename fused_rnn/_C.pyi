# The extension of csrc/module.cpp, for type checkers.
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

_Array = NDArray[Any]

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def kept_bytes() -> int: ...
def release_kept() -> None: ...
def project(input: _Array, weight: _Array, out: _Array, threads: int) -> None: ...
def weight_gradient(
    d_gates: _Array, inputs: Sequence[_Array], d_weight: _Array, d_bias: _Array | None, add: bool, threads: int
) -> None: ...
def step(
    cell: str,
    input: _Array,
    states: Sequence[_Array],
    new_states: Sequence[_Array],
    out: _Array,
    weight_ih: _Array,
    weight_hh: _Array,
    bias_ih: _Array | None,
    bias_hh: _Array | None,
    threads: int,
) -> None: ...

class Memory:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Packed:
    def __init__(
        self, cell: str, weights: Sequence[_Array], backward: bool, product: str, as_columns: bool, threads: int
    ) -> None: ...

def forward(
    cell: str,
    input: _Array | None,
    tape: _Array | None,
    out: _Array,
    states: Sequence[_Array],
    weight_ih: Packed | None,
    weight_hh: Packed,
    weight_hr: Packed | None,
    bias: _Array | None,
    length: int,
    batch: int,
    batch_sizes: _Array | None,
    offsets: _Array | None,
    reverse: Sequence[bool],
    reset: _Array | None,
    keep: bool,
    threads: int,
    sharing: str = "auto",
) -> None: ...
def backward(
    cell: str,
    d_gates: _Array,
    d_states: Sequence[_Array],
    d_out: _Array | None,
    d_cells: _Array | None,
    tape: _Array,
    out: _Array,
    states_0: Sequence[_Array],
    weight_ih: Packed | None,
    weight_hh: Packed,
    weight_hr: Packed | None,
    length: int,
    batch: int,
    batch_sizes: _Array | None,
    offsets: _Array | None,
    t_begin: int,
    t_end: int,
    reverse: Sequence[bool],
    reset: _Array | None,
    d_input: _Array | None,
    threads: int,
    sharing: str = "auto",
) -> None: ...
