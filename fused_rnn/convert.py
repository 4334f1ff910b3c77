"""Swap the recurrent modules of an existing model for fused ones, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fused_rnn import cell_modules, modules
from fused_rnn.checks import DTYPES

__all__ = ["Conversion", "convert", "revert"]

Model = TypeVar("Model", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: cell_modules.RNNCell,
    nn.LSTMCell: cell_modules.LSTMCell,
    nn.GRUCell: cell_modules.GRUCell,
}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}
_NAMES = frozenset(plain.__name__ for plain in _FUSED)


@dataclass(frozen=True)
class Conversion:
    """What happened to one recurrent module.

    Attributes:
        name: its path in the model, empty for the model itself.
        before: its class before.
        after: its class after; the same as ``before`` where it was left alone.
        reason: why it was left alone, or None where it was swapped.
    """

    name: str
    before: type[nn.Module]
    after: type[nn.Module]
    reason: str | None = None

    def __str__(self) -> str:
        path = self.name or "(the model)"
        before = f"{self.before.__module__}.{self.before.__qualname__}"
        if self.reason is not None:
            return f"{path}: {before} left alone: {self.reason}"
        return f"{path}: {before} -> {self.after.__module__}.{self.after.__qualname__}"


def convert(model: Model, report: list[Conversion] | None = None) -> Model:
    """Replace every torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell in ``model`` by the fused module of the same name.

    The module objects stay the same and change their class. So parameters, buffers, hooks, the training flag and every
    reference to them (an optimizer's, a second parent's) hold as before, and ``model`` may itself be one of the six. Weights
    under ``torch.nn.utils.parametrize`` stay parametrized.

    Left alone: subclasses, which may have changed anything; modules whose ``forward`` was replaced on the instance; scripted
    and quantized modules; parameters of a dtype that the kernels do not compute in.

    Args:
        model: the model, changed in place.
        report: a list to which one ``Conversion`` is appended for every recurrent module that was swapped or left alone.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 8))
    >>> report = []
    >>> print(convert(model, report)[1], *report)
    LSTM(4, 8) 1: torch.nn.modules.rnn.LSTM -> fused_rnn.modules.LSTM
    """
    return _swap(model, _FUSED, report, "fused_rnn.convert")


def revert(model: Model, report: list[Conversion] | None = None) -> Model:
    """Undo ``convert``: give every fused module in ``model`` the class of torch.nn of the same name.

    Args:
        model: the model, changed in place.
        report: as in ``convert``.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.
    """
    return _swap(model, _PLAIN, report, "fused_rnn.revert")


def _swap(
    model: Model, classes: dict[type[nn.Module], type[nn.Module]], report: list[Conversion] | None, function: str
) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")
    # `named_modules` names a shared module once.
    for name, module in list(model.named_modules()):
        before = type(module)
        plain = before.__bases__[0] if _parametrized(module) else before
        if plain in classes:
            reason = _obstacle(module)
            if reason is None:
                _change_class(module, classes[plain])
        else:
            reason = _kinship(module, plain, classes)
            if reason is None:
                continue
        if report is not None:
            report.append(Conversion(name, before, type(module), reason))
    return model


def _parametrized(module: nn.Module) -> bool:
    # Such a module has a class of its own, with the one it was made from as its only base.
    return torch.nn.utils.parametrize.is_parametrized(module) and type(module).__name__.startswith("Parametrized")


def _obstacle(module: nn.Module) -> str | None:
    """Why a module of a class that can be swapped should not be."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for parameter in module.parameters():
        if parameter.dtype not in DTYPES:
            return f"its parameters are {parameter.dtype}"
    return None


def _kinship(module: nn.Module, plain: type[nn.Module], classes: dict[type[nn.Module], type[nn.Module]]) -> str | None:
    """Why a module that looks like one of ``classes`` is none of them; None where it does not look so."""
    for known in classes:
        if isinstance(module, known):
            return f"a subclass of {known.__module__}.{known.__qualname__} may have changed anything"
    if isinstance(module, torch.jit.ScriptModule) and module.original_name in _NAMES:
        return "it is scripted"
    if plain.__name__ in _NAMES and plain.__module__.startswith(("torch.ao.", "torch.nn.quantized")):
        return "it is quantized or prepared for quantization"
    return None


def _change_class(module: nn.Module, target: type[nn.Module]) -> None:
    state: dict[str, Any] = vars(module)
    # torch.nn keeps this list, the fused modules compute it.
    state.pop("_flat_weights", None)
    if _parametrized(module):
        old = type(module)
        members = {key: value for key, value in vars(old).items() if key not in ("__dict__", "__weakref__", "__doc__")}
        target = type(f"Parametrized{target.__name__}", (target,), members)
    module.__class__ = target
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
