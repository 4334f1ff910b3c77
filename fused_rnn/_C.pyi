# The extension of csrc/bind/module.cpp, for type checkers.
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_rnn.data.cell import Weights
from fused_rnn.kernels.protocol import LayerResult

def cells() -> list[dict[str, Any]]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def kept_bytes() -> int: ...
def release_kept() -> None: ...

class Memory:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def layer_forward(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Weights],
    length: int,
    batch: int,
    batch_sizes: Tensor | None,
    reverse: Sequence[bool],
    reset: Tensor | None,
    keep: bool,
    cell_states: bool,
    step: bool,
    threads: int,
    batch_first: bool = False,
    sharing: str = "auto",
) -> LayerResult: ...
def plain_forward(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Weights,
    step: bool,
    threads: int,
    batch_first: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]] | None: ...
def has_vnni() -> bool: ...
def int8_forward(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    hidden: int,
    weights: Sequence[Sequence[Tensor | None]],
    length: int,
    batch: int,
    batch_sizes: Tensor | None,
    reverse: Sequence[bool],
    reset: Tensor | None,
    cell_states: bool,
    step: bool,
    threads: int,
    batch_first: bool = False,
    sharing: str = "auto",
    vnni: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]: ...
def layer_backward(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Weights],
    length: int,
    batch: int,
    batch_sizes: Tensor | None,
    reverse: Sequence[bool],
    reset: Tensor | None,
    out: Tensor,
    tape: Tensor | None,
    d_out: Tensor | None,
    d_cells: Tensor | None,
    d_states: Sequence[Tensor | None],
    wanted: Sequence[bool],
    gates_wanted: bool,
    step: bool,
    threads: int,
    sharing: str = "auto",
) -> tuple[Tensor | None, ...]: ...
def loop_gradients(
    cell: str,
    steps: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]],
    wanted: Sequence[bool],
    threads: int,
) -> tuple[Tensor | None, ...]: ...
