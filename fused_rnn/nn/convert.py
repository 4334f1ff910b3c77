"""Swap the recurrent modules of an existing model for fused ones, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.rnn import RNNCellBase
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_rnn.nn import cells as cell_modules
from fused_rnn.nn import layers as modules
from fused_rnn.nn.checks import DTYPES
from fused_rnn.nn.initialisation import OPTIONS, Initialised

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


# Classes that torch makes at run time for a module that it has parametrized or sharded; the last base is the one it had.
_WRAPPED_IN = ("torch.nn.utils.parametrize", "torch.distributed.")
# What torch.nn's forward calls, so that a replacement on the instance takes part in it. flatten_parameters computes nothing.
_METHODS = (
    "forward",
    "check_input",
    "check_forward_args",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
)


@dataclass(frozen=True)
class Conversion:
    """What happened to one recurrent module.

    Attributes:
        name: its path in the model, empty for the model itself.
        before: its class before.
        after: its class after; the same as ``before`` where it was left alone.
        reason: why it was left alone, or None where it was swapped.
        also: its other paths, where it is in the model more than once.
    """

    name: str
    before: type[nn.Module]
    after: type[nn.Module]
    reason: str | None = None
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        path = " = ".join((self.name or "(the model)", *self.also))
        before = f"{self.before.__module__}.{self.before.__qualname__}"
        if self.reason is not None:
            return f"{path}: {before} left alone: {self.reason}"
        return f"{path}: {before} -> {self.after.__module__}.{self.after.__qualname__}"


def convert(model: Model, report: list[Conversion] | None = None) -> Model:
    """Replace every torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell in ``model`` by the fused module of the same name.

    The module objects stay the same and change their class. So parameters, buffers, hooks, the training flag, attributes and
    every reference to them (an optimizer's, a second parent's, that of DistributedDataParallel or torch.compile around the
    model) hold as before, and ``model`` may itself be one of the six. Weights under ``torch.nn.utils.parametrize``,
    ``weight_norm``, ``spectral_norm`` or ``prune`` stay so; modules under ``fully_shard`` stay sharded. Afterwards
    ``isinstance(module, torch.nn.LSTM)`` is false; ``isinstance(module, torch.nn.RNNBase)`` still holds.

    Left alone, each with its reason in the report: subclasses and other modules derived from ``torch.nn.RNNBase`` or
    ``RNNCellBase``, which may compute anything; modules of which ``forward``, or a method that it calls, was replaced on the
    instance; scripted and traced modules; modules quantized or prepared for it; parameters of a dtype that the kernels do not
    compute in, or of a tensor subclass.

    torch.jit.script compiles no kernel of this package: revert before it. torch.fx.symbolic_trace takes modules of torch.nn
    whole, but not others: use a Tracer whose ``is_leaf_module`` names these.

    Args:
        model: the model, changed in place.
        report: a list to which one ``Conversion`` is appended for every recurrent module that was swapped or left alone.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module, or ``report`` no list.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 8))
    >>> report = []
    >>> print(convert(model, report)[1], *report)
    LSTM(4, 8) 1: torch.nn.modules.rnn.LSTM -> fused_rnn.nn.layers.LSTM
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
        TypeError: if ``model`` is no module, or ``report`` no list.
    """
    return _swap(model, _PLAIN, report, "fused_rnn.revert")


def _swap(
    model: Model, classes: dict[type[nn.Module], type[nn.Module]], report: list[Conversion] | None, function: str
) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")
    if report is not None and not isinstance(report, list):
        raise TypeError(f"{function}: report: expected a list or None, got {type(report).__name__}")
    # `named_modules` names a shared module once.
    found = list(model.named_modules())
    paths: dict[int, list[str]] = {}
    for parent, module in found:
        for key, child in module._modules.items():
            if child is not None:
                paths.setdefault(id(child), []).append(f"{parent}.{key}" if parent else key)
    for name, module in found:
        before = type(module)
        plain = _plain(before)
        if plain in classes:
            reason = _obstacle(module)
            if reason is None and not getattr(module, "reset_after", True):
                reason = "torch.nn has no GRU with reset_after=False"
            if reason is None:
                _change_class(module, classes[plain])
        else:
            reason = _kinship(module, plain, classes)
            if reason is None:
                continue
        if report is not None:
            also = tuple(path for path in paths.get(id(module), ()) if path != name)
            report.append(Conversion(name, before, type(module), reason, also))
    return model


def _plain(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before torch wrapped it in classes made at run time."""
    while cls.__module__.startswith(_WRAPPED_IN) and issubclass(cls.__bases__[-1], nn.Module):
        cls = cls.__bases__[-1]
    return cls


def _wrapped(cls: type[nn.Module], plain: type[nn.Module], target: type[nn.Module]) -> type[nn.Module]:
    """``cls`` made anew, with ``target`` in place of ``plain`` at its root."""
    if cls is plain:
        return target
    base = _wrapped(cls.__bases__[-1], plain, target)
    members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__", "__doc__")}
    return type(cls.__name__.removesuffix(plain.__name__) + target.__name__, (*cls.__bases__[:-1], base), members)


def _obstacle(module: nn.Module) -> str | None:
    """Why a module of a class that can be swapped should not be."""
    for name in _METHODS:
        if name in vars(module):
            return f"its {name} was replaced on the instance"
    if getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantization"
    parameters: list[Any] = list(module.parameters())
    for parameter in parameters:
        if parameter.dtype not in DTYPES:
            return f"its parameters are {parameter.dtype}"
        # Such a tensor has no memory that a kernel could read. Of DTensors, fully_shard shows the modules plain ones.
        if is_traceable_wrapper_subclass(parameter) and not type(parameter).__module__.startswith("torch.distributed."):
            return f"its parameters are of the tensor subclass {type(parameter).__qualname__}"
    return None


def _kinship(module: nn.Module, plain: type[nn.Module], classes: dict[type[nn.Module], type[nn.Module]]) -> str | None:
    """Why a module that looks like one of ``classes`` is none of them; None where it does not look so."""
    for known in classes:
        if isinstance(module, known):
            return f"a subclass of {known.__module__}.{known.__qualname__} may have changed anything"
    if isinstance(module, torch.jit.ScriptModule) and module.original_name in _NAMES:
        return "it is scripted or traced"
    if plain.__name__ in _NAMES and plain.__module__.startswith(("torch.ao.", "torch.nn.quantized")):
        return "it is quantized or prepared for quantization"
    if isinstance(module, (nn.RNNBase, RNNCellBase)) and plain not in _FUSED and not plain.__module__.startswith("fused_rnn."):
        return "a recurrent module of its own, none of torch.nn's six"
    return None


def _change_class(module: nn.Module, target: type[nn.Module]) -> None:
    # torch.nn keeps this list, the fused modules compute it.
    state: dict[str, Any] = vars(module)
    state.pop("_flat_weights", None)
    if not issubclass(target, Initialised):
        for option in OPTIONS:
            state.pop(option, None)
    module.__class__ = _wrapped(type(module), _plain(type(module)), target)
    if target in _FUSED and isinstance(module, nn.RNNBase):
        # It reads the weights. Reading a parametrized one in training may change it: a power iteration, a dropout mask.
        parametrizations = getattr(module, "parametrizations", None)
        training = [part for part in parametrizations.modules() if part.training] if parametrizations is not None else []
        for part in training:
            part.training = False
        module._init_flat_weights()
        for part in training:
            part.training = True
