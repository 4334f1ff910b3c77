"""What a case is: a cell at a shape in a mode, with options. ``benchmarks.sets`` holds the ones that are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.lengths import lengths


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


# The shapes that goals are set for, and what a run without options measures.
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

# What is called once a step.
LOOPS = ("layer", "cell")

# Dtype -> bytes of an element.
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def parse_shape(text: str) -> Shape:
    """The shape that ``BxTxH`` or ``BxTxIxH`` names.

    Raises:
        ValueError: if it names none.
    """
    parts = text.split("x")
    if len(parts) not in (3, 4) or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"expected BxTxH or BxTxIxH, got {text!r}")
    B, T, *rest = (int(part) for part in parts)
    modes = ("streaming",) if T == 1 else ("training", "inference")
    return Shape(B, T, rest[0], rest[-1], "asked for on the command line", modes=modes)


@dataclass(frozen=True)
class Case:
    """One row group of the table. Options that a peer cannot serve are its reason to refuse.

    Attributes:
        cell, shape, mode, dtype: what is computed.
        num_layers, bidirectional, dropout: as in torch.nn.
        ragged: the sequences are as long as sentences are (``benchmarks.lengths``), T being the longest.
        resets: mean number of steps after which a sequence's state is set to zero, as at the end of an episode; 0 for never.
        proj_size: as in torch.nn, LSTM only.
        padded: as ragged, but in any order and padded to T: ``lengths=``, which torch.nn does by packing and padding again.
        summed: called as most code does: no initial states, and in training the gradients of the output's sum, those of the
            parameters alone.
        loop: "layer" or "cell": every step is a call of its own, of a layer with T = 1 or of the cell module, which hands its
            state to the next; in training one backward through all of them, gradients of the parameters alone.
        threads: of every provider, or None for the run's.
    """

    cell: str
    shape: Shape
    mode: str
    dtype: str = "float32"
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    ragged: bool = False
    resets: int = 0
    proj_size: int = 0
    padded: bool = False
    summed: bool = False
    loop: str = ""
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.resets and (self.bidirectional or self.ragged or self.padded):
            raise ValueError("a case with resets is of one direction and not ragged")
        if self.ragged and self.padded:
            raise ValueError("a case is ragged or padded, not both")
        if self.proj_size and self.cell != "lstm":
            raise ValueError(f"a case with a projection is an LSTM, got {self.cell}")
        if self.loop not in ("", *LOOPS):
            raise ValueError(f"a case's loop is one of {','.join(LOOPS)}, got {self.loop!r}")
        if self.loop and (self.num_layers > 1 or self.bidirectional or self.dropout or self.proj_size):
            raise ValueError("a case that loops is one plain layer of one direction")
        if self.loop and (self.ragged or self.padded or self.resets or self.summed):
            raise ValueError("a case that loops is dense, and has its own loss")

    @property
    def options(self) -> tuple[str, ...]:
        """What sets the case apart from one dense layer of one direction, in words."""
        return (
            *((f"layers={self.num_layers}",) if self.num_layers > 1 else ()),
            *(("bidirectional",) if self.bidirectional else ()),
            *((f"dropout={self.dropout:g}",) if self.dropout else ()),
            *(("ragged",) if self.ragged else ()),
            *((f"resets={self.resets}",) if self.resets else ()),
            *((f"proj_size={self.proj_size}",) if self.proj_size else ()),
            *(("lengths",) if self.padded else ()),
            *(("summed",) if self.summed else ()),
            *((f"loop={self.loop}",) if self.loop else ()),
            *((f"threads={self.threads}",) if self.threads else ()),
        )

    @property
    def plain(self) -> bool:
        """Whether it is one dense layer of one direction."""
        return not replace(self, threads=None).options

    @property
    def key(self) -> str:
        """A name that no other case has."""
        return "/".join((self.mode, self.cell, self.shape.name, self.dtype, *self.options))

    @property
    def data(self) -> Case:
        """What decides weights and data: the case without its mode and threads."""
        return replace(self, mode="training", threads=None)

    @property
    def training(self) -> bool:
        """Whether gradients are wanted."""
        return self.mode == "training"

    @property
    def class_name(self) -> str:
        """The name of the module, in torch.nn and in fused_rnn."""
        return CELLS[self.cell][0]

    @property
    def directions(self) -> int:
        """1, or 2 when bidirectional."""
        return 2 if self.bidirectional else 1

    @property
    def features(self) -> int:
        """Features of one direction's h."""
        return self.proj_size or self.shape.H

    @property
    def parameters_only(self) -> bool:
        """Whether a training step takes the gradients of the parameters alone."""
        return self.summed or bool(self.loop)

    @property
    def unusual(self) -> bool:
        """Whether only what has torch.nn's modules and arguments can serve it: a projection, padding, another call or loss."""
        return bool(self.proj_size or self.padded or self.summed or self.loop)

    @property
    def rows(self) -> int:
        """Steps of all sequences together."""
        B, T = self.shape.B, self.shape.T
        return sum(lengths(B, T)) if self.ragged or self.padded else B * T

    @property
    def num_weights(self) -> int:
        """Elements of all weight matrices."""
        I, H = self.shape.I, self.shape.H  # noqa: E741
        P = self.features
        columns = sum((I if layer == 0 else self.directions * P) + P for layer in range(self.num_layers))
        projections = H * self.proj_size * self.num_layers
        return (CELLS[self.cell][1] * H * columns + projections) * self.directions

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products.

        Forward: the input projection and the recurrence. Training: these two, and for each the product for its data
        gradient and that for its weight gradient, six in all.
        """
        forward = 2.0 * self.rows * self.num_weights
        return 3 * forward if self.training else forward

    @property
    def traffic(self) -> float:
        """Bytes that must cross the memory bus at least: input, weights, states and output once.

        In training their gradients too. What is kept for the backward, and weights that no cache holds from step to step, come
        on top.
        """
        B, _, I, H = self.shape.sizes  # noqa: E741
        states = 2 * (2 if self.cell == "lstm" else 1) * self.num_layers * self.directions * B * H
        elements = self.rows * (I + self.directions * self.features) + self.num_weights + states
        return float(elements * ITEM_BYTES[self.dtype] * (2 if self.training else 1))

    @property
    def weight(self) -> float:
        """The share of the run's time that the case gets, relative to the others: a fixed part and one for the size."""
        return 2.0 + self.flops / 7e9
