"""What is measured, as data: shapes, cells, modes. A new case is one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One problem size.

    Attributes:
        B, T, I, H: sequences, steps, input features, hidden units.
        origin: where such a size is met.
        quick: whether ``--quick`` measures it. The two largest would use up that time alone.
        modes: the modes that the shape takes part in.
    """

    B: int
    T: int
    I: int  # noqa: E741, the name that the legend gives it
    H: int
    origin: str
    quick: bool = False
    modes: tuple[str, ...] = ("training", "inference")

    @property
    def name(self) -> str:
        """What ``--shapes`` takes: BxTxH, or BxTxIxH where I and H differ."""
        return "x".join(str(size) for size in ((self.B, self.T, self.H) if self.I == self.H else self.sizes))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, T, I, H)."""
        return self.B, self.T, self.I, self.H


SHAPES = (
    Shape(1, 100, 128, 128, "one short sequence", quick=True),
    Shape(16, 64, 128, 128, "small tagger", quick=True),
    Shape(32, 100, 256, 256, "character language model", quick=True),
    Shape(64, 100, 512, 512, "pytorch benchmarks/fastrnns defaults"),
    Shape(32, 50, 1024, 1024, "large language model"),
    Shape(20, 35, 650, 650, "PTB medium, Zaremba et al. 2014", quick=True),
    Shape(128, 35, 200, 200, "PTB small, large batch"),
    Shape(256, 20, 64, 64, "reinforcement learning, many environments", quick=True),
    Shape(1, 1000, 256, 256, "speech, one utterance"),
    Shape(1, 50, 1024, 1024, "one sequence, wide", quick=True),
    Shape(1, 1, 512, 512, "streaming, one step", quick=True, modes=("streaming",)),
)

# Cell -> (torch.nn class, gates). "rnn" is the tanh cell.
CELLS: dict[str, tuple[str, int]] = {"lstm": ("LSTM", 4), "gru": ("GRU", 3), "rnn": ("RNN", 1)}

# Mode -> what one timed call is.
MODES: dict[str, str] = {
    "training": "forward and backward, gradients of the input, the initial states and all parameters",
    "inference": "forward under no_grad",
    "streaming": "one time step under no_grad",
}


@dataclass(frozen=True)
class Case:
    """One row group of the table: a cell at a shape in a mode. Options that a peer cannot serve are its reason to refuse."""

    cell: str
    shape: Shape
    mode: str
    dtype: str = "float32"
    num_layers: int = 1
    bidirectional: bool = False

    @property
    def key(self) -> str:
        """A name that no other case has."""
        options = f"/layers={self.num_layers}" if self.num_layers > 1 else ""
        options += "/bidirectional" if self.bidirectional else ""
        return f"{self.mode}/{self.cell}/{self.shape.name}/{self.dtype}{options}"

    @property
    def training(self) -> bool:
        """Whether gradients are wanted."""
        return self.mode == "training"

    @property
    def class_name(self) -> str:
        """The name of the module, in torch.nn and in fused_rnn."""
        return CELLS[self.cell][0]

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products.

        Forward: the input projection and the recurrence. Training: these two, and for each the product for its data
        gradient and that for its weight gradient, six in all.
        """
        B, T, I, H = self.shape.sizes  # noqa: E741
        directions = 2 if self.bidirectional else 1
        columns = sum((I if layer == 0 else directions * H) + H for layer in range(self.num_layers))
        forward = 2.0 * T * B * CELLS[self.cell][1] * H * columns * directions
        return 3 * forward if self.training else forward

    @property
    def weight(self) -> float:
        """The share of the run's time that the case gets, relative to the others: a fixed part and one for the size."""
        return 2.0 + self.flops / 7e9


def select(
    cells: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Case]:
    """The cases that the filters leave, those of one cell and shape next to each other.

    Args:
        cells, shapes, modes: names to keep, or None for all.
        quick: without ``shapes``, keep only those marked ``quick``.

    Raises:
        ValueError: if a filter holds an unknown name, or nothing is left.
    """
    _check("cells", cells, CELLS)
    _check("shapes", shapes, [shape.name for shape in SHAPES])
    _check("modes", modes, MODES)
    cases = [
        Case(cell, shape, mode)
        for cell in CELLS
        for shape in SHAPES
        for mode in shape.modes
        if (cells is None or cell in cells)
        and (modes is None or mode in modes)
        and (shape.name in shapes if shapes is not None else shape.quick or not quick)
    ]
    if not cases:
        raise ValueError("these values of --cells, --shapes and --modes leave no case")
    return cases


def _check(option: str, names: Sequence[str] | None, known: Iterable[str]) -> None:
    known = list(known)
    for name in names or ():
        if name not in known:
            raise ValueError(f"--{option}: expected some of {','.join(known)}, got {name!r}")
