# The extension of csrc/module.cpp, for type checkers.
from collections.abc import Sequence
from typing import Any

from torch import Tensor

def cells() -> list[dict[str, Any]]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def kept_bytes() -> int: ...
def release_kept() -> None: ...
def project(input: Tensor, weight: Tensor, out: Tensor, threads: int) -> None: ...
def weight_gradient(
    d_gates: Tensor, inputs: Sequence[Tensor], d_weight: Tensor, d_bias: Tensor | None, add: bool, threads: int
) -> None: ...
def step(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_first: bool,
    threads: int,
) -> tuple[Tensor, tuple[Tensor, ...]] | None: ...
def layer_forward(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor | None],
    keep: bool,
    threads: int,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None] | None: ...
def layer_backward(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor | None],
    out: Tensor,
    tape: Tensor | None,
    d_out: Tensor | None,
    d_states: Sequence[Tensor | None],
    input_wanted: bool,
    states_wanted: bool,
    weights_wanted: bool,
    threads: int,
) -> tuple[Tensor | None, ...] | None: ...

class Memory:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Packed:
    def __init__(
        self, cell: str, weights: Sequence[Tensor], backward: bool, product: str, as_columns: bool, threads: int
    ) -> None: ...

def forward(
    cell: str,
    input: Tensor | None,
    tape: Tensor | None,
    out: Tensor,
    states: Sequence[Tensor],
    weight_ih: Packed | None,
    weight_hh: Packed,
    weight_hr: Packed | None,
    bias: Tensor | None,
    length: int,
    batch: int,
    batch_sizes: Tensor | None,
    offsets: Tensor | None,
    reverse: Sequence[bool],
    reset: Tensor | None,
    keep: bool,
    threads: int,
    sharing: str = "auto",
) -> None: ...
def backward(
    cell: str,
    d_gates: Tensor,
    d_states: Sequence[Tensor],
    d_out: Tensor | None,
    d_cells: Tensor | None,
    tape: Tensor,
    out: Tensor,
    states_0: Sequence[Tensor],
    weight_ih: Packed | None,
    weight_hh: Packed,
    weight_hr: Packed | None,
    length: int,
    batch: int,
    batch_sizes: Tensor | None,
    offsets: Tensor | None,
    t_begin: int,
    t_end: int,
    reverse: Sequence[bool],
    reset: Tensor | None,
    d_input: Tensor | None,
    threads: int,
    sharing: str = "auto",
) -> None: ...
