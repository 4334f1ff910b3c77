"""What torch.ao.quantization is told of the fused modules: what they become where it is asked for, and what to ask."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

_told = False


class Quantizable(nn.Module):
    """A module that says so once where torch.ao.quantization passes it by.

    torch's functions go by the exact class: the defaults of quantize_dynamic name torch.nn.LSTM and its like. All modules that
    their set does not name get the qconfig None from them.
    """

    @property
    def qconfig(self) -> Any:
        """The qconfig that torch.ao.quantization, or a user of it, gave the module."""
        if "qconfig" not in vars(self):
            raise AttributeError("qconfig")
        return vars(self)["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        vars(self)["qconfig"] = value
        if value is None:
            _tell(type(self).__name__)

    @qconfig.deleter
    def qconfig(self) -> None:
        vars(self).pop("qconfig", None)


def _tell(name: str) -> None:
    global _told
    if _told:
        return
    _told = True
    warnings.warn(
        f"torch.ao.quantization leaves fused_rnn.{name} in floating point unless its set names the class: call "
        f"fused_rnn.quantize_dynamic(model), or torch's with {{torch.nn.Linear, fused_rnn.{name}}} and what else is to be "
        "quantized",
        stacklevel=3,
    )
