"""Initial values that torch.nn has no options for: the forget gate's bias and orthogonal recurrent weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils import parametrize

from fused_rnn.cells import CELLS, LSTM_COUPLED
from fused_rnn.data.cell import Cell

__all__ = ["OPTIONS", "Initialised", "init_", "keep_gates"]

# The attributes that ``Initialised`` adds to a module.
OPTIONS = ("forget_bias", "recurrent_init")

_RECURRENT = (nn.RNNBase, RNNCellBase)
_RECURRENT_INITS = ("orthogonal",)


class Initialised(nn.Module):
    """What the modules and cells share: the options, and ``reset_parameters`` with them.

    Attributes:
        forget_bias: what bias_ih + bias_hh of an LSTM's forget gate start with; None for torch.nn's random values.
        recurrent_init: ``"orthogonal"``, or None for torch.nn's random values.
        reset_after, coupled: which cell it is; a GRU has the first, an LSTM the second.
    """

    # For modules that torch.nn's constructor made or an earlier version pickled.
    forget_bias: float | None = None
    recurrent_init: str | None = None
    reset_after: bool = True
    coupled: bool = False

    def __init__(self, *args: Any, forget_bias: float | None = None, recurrent_init: str | None = None, **kwargs: Any) -> None:
        _check_options(forget_bias, recurrent_init)
        # Before torch's constructor, which calls reset_parameters.
        if forget_bias is not None:
            self.forget_bias = float(forget_bias)
        if recurrent_init is not None:
            self.recurrent_init = recurrent_init
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the constructor did: torch.nn's values, then those that the options ask for."""
        super().reset_parameters()  # type: ignore[misc]
        init_(self, forget_bias=self.forget_bias, recurrent_init=self.recurrent_init)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            "torch.jit.script cannot compile the kernels of fused_rnn: script fused_rnn.revert(model), or use torch.export, "
            "torch.compile or torch.jit.trace"
        )

    def extra_repr(self) -> str:
        """As torch.nn's, and the options that were given."""
        text = super().extra_repr()
        if self.forget_bias is not None:
            text += f", forget_bias={self.forget_bias}"
        if self.recurrent_init is not None:
            text += f", recurrent_init={self.recurrent_init!r}"
        return text + ("" if self.reset_after else ", reset_after=False") + (", coupled=True" if self.coupled else "")


def init_(
    module: nn.Module,
    *,
    forget_bias: float | None = None,
    recurrent_init: str | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Set the initial values of an existing recurrent module, fused or torch.nn's, in place; what is not asked for stays.

    The Parameters stay the same objects, so an optimizer may exist already. Nothing is remembered: a later
    ``reset_parameters()`` of the module draws what its own constructor was told.

    Args:
        module: an RNN, LSTM, GRU or one of their cells, of this package, of torch.nn, or of a subclass.
        forget_bias: a finite number; the forget gate of every layer and direction of an LSTM starts with this bias. There are
            two biases that add up: bias_ih gets the value, bias_hh zero.
        recurrent_init: ``"orthogonal"``: each gate's block of every weight_hh, (H, P), is drawn as a (semi-)orthogonal matrix,
            so that the recurrent product keeps lengths at the start of training.
        generator: where the random numbers come from. None for torch's default.

    Returns:
        ``module``.

    Raises:
        TypeError: if ``module`` is no recurrent module, or an argument has another type.
        ValueError: if a value is not one of those above, if ``forget_bias`` is asked of a module that is no LSTM or has no
            biases, or if a parameter is computed from others by a hook that would undo the change.

    Source: forget bias, Gers et al. 2000 and Jozefowicz et al. 2015; orthogonal matrices, Saxe et al. 2014.

    >>> lstm = init_(nn.LSTM(3, 2), forget_bias=1.0, recurrent_init="orthogonal")
    >>> (lstm.bias_ih_l0 + lstm.bias_hh_l0)[2:4].tolist()
    [1.0, 1.0]
    """
    if not isinstance(module, _RECURRENT):
        raise TypeError(f"module: expected an RNN, LSTM, GRU or one of their cells, got {type(module).__name__}")
    _check_options(forget_bias, recurrent_init)
    if (forget_bias is None and recurrent_init is None) or module.hidden_size == 0:
        return module
    heads = getattr(module, "num_heads", 1)
    hidden = module.hidden_size // heads
    suffixes = [name.removeprefix("weight_hh") for name in _names(module) if name.startswith("weight_hh")]
    forget = 0
    if forget_bias is not None:
        cell = _cell_of(module)
        if cell is None or cell.forget is None:
            raise ValueError(f"forget_bias: expected None for a module without a forget gate, got {forget_bias}")
        if not module.bias:
            raise ValueError(f"forget_bias: expected None for a module with bias=False, got {forget_bias}")
        forget = cell.gates.index(cell.forget)
    with torch.no_grad():
        for suffix in suffixes:
            if recurrent_init is not None:
                _set(module, f"weight_hh{suffix}", lambda value: _orthogonal(value, hidden, generator))
            if forget_bias is not None:
                for name, number in ((f"bias_ih{suffix}", float(forget_bias)), (f"bias_hh{suffix}", 0.0)):
                    _set(module, name, lambda value, number=number: _forget(value, forget, heads, hidden, number))
    return module


def keep_gates(module: nn.Module, names: Iterable[str], cell: Cell) -> None:
    """Leave the parameters of a new module of torch.nn's shapes as many gates as a cell has, whatever they are drawn from."""
    rows = cell.num_gates * module.hidden_size  # type: ignore[operator]
    for name in names:
        parameter = module._parameters.get(name)
        # A projection has no gates.
        if parameter is not None and not name.startswith("weight_hr"):
            module.register_parameter(name, nn.Parameter(parameter.detach()[:rows].clone()))


def _check_options(forget_bias: object, recurrent_init: object) -> None:
    if forget_bias is not None:
        if isinstance(forget_bias, bool) or not isinstance(forget_bias, numbers.Real):
            raise TypeError(f"forget_bias: expected a number or None, got {type(forget_bias).__name__}")
        try:
            finite = math.isfinite(forget_bias)
        except OverflowError:  # an integer beyond the floats
            finite = False
        if not finite:
            raise ValueError(f"forget_bias: expected a finite number, got {forget_bias}")
    if recurrent_init is not None:
        if not isinstance(recurrent_init, str):
            raise TypeError(f"recurrent_init: expected a str or None, got {type(recurrent_init).__name__}")
        if recurrent_init not in _RECURRENT_INITS:
            raise ValueError(f"recurrent_init: expected one of {', '.join(_RECURRENT_INITS)} or None, got {recurrent_init!r}")


def _cell_of(module: nn.Module) -> Cell | None:
    """The row of a module, by torch's name of what it computes; None if the table has none."""
    if getattr(module, "coupled", False):
        return LSTM_COUPLED
    mode = getattr(module, "mode", None)
    if mode is None:
        # A single step: its class, or a base of it, is named after the mode; RNNCell has two.
        names = [base.__name__.removesuffix("Cell") for base in type(module).__mro__]
        mode = next((cell.mode for cell in CELLS.values() if cell.mode in names), None)
    return next((cell for cell in CELLS.values() if cell.mode == mode), None)


def _names(module: nn.Module) -> list[str]:
    """The parameters' names, whether or not something stands in their place by now."""
    if isinstance(module, nn.RNNBase):
        return list(module._flat_weights_names)
    return ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


def _set(module: nn.Module, name: str, values: Any) -> None:
    """Give a parameter the values that ``values`` makes of its old ones."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        parameter.copy_(values(parameter))
    elif parametrize.is_parametrized(module, name):
        # Goes through the parametrization's right_inverse.
        setattr(module, name, values(getattr(module, name)))
    else:
        raise ValueError(f"{name}: expected a parameter, or one under torch.nn.utils.parametrize; it is computed from others")


def _orthogonal(value: Tensor, hidden: int, generator: torch.Generator | None) -> Tensor:
    # No QR decomposition in bfloat16 and float16.
    wide = torch.float32 if value.dtype in (torch.bfloat16, torch.float16) else value.dtype
    blocks = [torch.empty_like(block, dtype=wide) for block in value.reshape(-1, hidden, value.shape[1])]
    return torch.cat([nn.init.orthogonal_(block, generator=generator) for block in blocks]).to(value.dtype)


def _forget(value: Tensor, gate: int, heads: int, hidden: int, number: float) -> Tensor:
    value = value.clone()
    value.view(heads, -1, hidden)[:, gate] = number
    return value
