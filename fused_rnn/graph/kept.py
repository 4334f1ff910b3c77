"""What a backward keeps of its forward besides the tensors that torch saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.data.cell import Cell, Weights

# Places of the biases in Weights.
_BIAS_IH, _BIAS_HH = Weights._fields.index("bias_ih"), Weights._fields.index("bias_hh")
_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")

# Elements of an output whose memory is not worth being freed early.
_SMALL = 4096


class Kept:
    """What a backward needs besides the saved tensors: whether something changed since the forward that it may not read then.

    torch refuses to hand out a saved tensor that was changed in place. Two kinds are not refused here:

    - The output, which torch.nn's users do change in place (a residual, a relu). The backward then computes it once more.
    - Biases, which no first gradient reads. Second gradients do, and so does a backward after a changed output.

    Attributes:
        changes: a tensor that counts the changes of the output. It has no elements where that is large: its memory belongs to
            the saved tensors alone, which hooks may have moved elsewhere.
        whole: whether it has them, which are those of the output.
        biases: (place among the tensors, bias, its version). The parameters outlive the graph anyway.
        inside_transform: whether the forward ran inside of one, whose wrappers the saved tensors may be.
    """

    __slots__ = ("biases", "changes", "inside_transform", "version", "whole")

    def __init__(self, out: Tensor, cell: Cell, tensors: Sequence[Tensor | None], inside_transform: bool) -> None:
        self.version = out._version
        self.changes = out.detach()
        self.biases: list[tuple[int, Tensor, int]] = []
        self.inside_transform = inside_transform
        self.whole = True
        if inside_transform:
            # No hooks there, and no tensor may be kept but by torch: a transform's wrappers end with it.
            return
        if out.numel() > _SMALL:
            self.changes.data = _NOTHING
            self.whole = False
        first, each = 1 + len(cell.states), len(Weights._fields)
        for i in range(first, len(tensors), each):
            for place in (i + _BIAS_IH, i + _BIAS_HH):
                bias = tensors[place]
                # torch says what is wrong with one from torch.inference_mode, which counts no versions.
                if bias is not None and not bias.is_inference():
                    self.biases.append((place, bias, bias._version))

    def output_changed(self) -> bool:
        """Whether the output was changed in place since the forward."""
        return self.changes._version != self.version

    def put_biases(self, tensors: list[Any]) -> None:
        """Put the biases where they were among ``tensors``."""
        for place, bias, version in self.biases:
            if bias._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: a bias of "
                    f"shape {tuple(bias.shape)} is at version {bias._version}; expected version {version} instead. A second "
                    "gradient reads it, and so does a backward whose output was changed in place"
                )
            tensors[place] = bias
