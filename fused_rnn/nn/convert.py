"""Swap the recurrent modules of an existing model for fused ones, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_rnn.nn import cells as cell_modules
from fused_rnn.nn import kept_classes
from fused_rnn.nn import layers as modules
from fused_rnn.nn.checks import DTYPES, check_flag
from fused_rnn.nn.flat_weights import FlatWeights
from fused_rnn.nn.initialisation import OPTIONS, Initialised
from fused_rnn.nn.stack_options import ATTRIBUTES, StackOptions

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
_PLAIN = {fused: plain for plain, fused in _FUSED.items()} | kept_classes.PLAIN
_NAMES = frozenset(plain.__name__ for plain in _FUSED)


# Classes that torch makes at run time for a module that it has parametrized or sharded; the last base is the one it had.
_WRAPPED_IN = ("torch.nn.utils.parametrize", "torch.distributed.")


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


def convert(model: Model, report: list[Conversion] | None = None, *, keep_class: bool = False) -> Model:
    """Replace every torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell in ``model`` by the fused module of the same name.

    The module objects stay the same and change their class. So parameters, buffers, hooks, the training flag, attributes and
    every reference to them (an optimizer's, a second parent's, that of DistributedDataParallel or torch.compile around the
    model) hold as before, and ``model`` may itself be one of the six. Weights under ``torch.nn.utils.parametrize``,
    ``weight_norm``, ``spectral_norm`` or ``prune`` stay so; modules under ``fully_shard`` stay sharded.

    Cells are instances of torch.nn's classes afterwards. Of a layer, ``isinstance(module, torch.nn.LSTM)`` is false, because
    torch.compile breaks the graph at such an instance; ``isinstance(module, torch.nn.RNNBase)`` holds. With ``keep_class`` both
    hold, for code that asks: loops that initialise, wrappers, summaries. The price is that Dynamo is told to trace these
    modules through a function that torch does not document. Where a version of torch lacks it (before 2.7), a compiled model
    breaks its graph at them.

    A subclass that only adds to torch.nn's class, and replaces nothing that its results come from, is swapped as well, for a
    class of its own: its instances are those of the subclass, as with ``keep_class``.

    Left alone, each with its reason in the report: other subclasses and modules derived from ``torch.nn.RNNBase`` or
    ``RNNCellBase``, which may compute anything; modules of which ``forward``, or a method that it calls, was replaced on the
    instance; scripted and traced modules; modules quantized or prepared for it; parameters of a dtype that the kernels do not
    compute in, or of a tensor subclass; modules with an attribute that has the name of an option here (``connections``,
    ``weight_dropout``, ``num_heads``).

    torch.jit.script compiles no kernel of this package: revert before it. torch.fx.symbolic_trace takes the modules whole, as
    those of torch.nn.

    Args:
        model: the model, changed in place.
        report: a list to which one ``Conversion`` is appended for every recurrent module that was swapped or left alone.
        keep_class: whether layers stay instances of torch.nn's classes.

    Returns:
        ``model``. Warns if most of its recurrent modules were left alone, unless a report is asked for.

    Raises:
        TypeError: if ``model`` is no module, ``report`` no list, or ``keep_class`` no bool.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 8))
    >>> report = []
    >>> print(convert(model, report)[1], *report)
    LSTM(4, 8) 1: torch.nn.modules.rnn.LSTM -> fused_rnn.nn.layers.LSTM
    """
    check_flag("keep_class", keep_class)

    def target(cls: type[nn.Module]) -> type[nn.Module] | str | None:
        if cls in _FUSED:
            return (kept_classes.kept(cls) if keep_class else None) or _FUSED[cls]
        known = next((base for base in cls.__mro__ if base in _FUSED), None)
        if known is None or cls in _PLAIN or issubclass(cls, Initialised):
            return None
        replaced = kept_classes.replaced(cls, known, _FUSED[known])
        if replaced is None:
            return kept_classes.made_of(cls, _FUSED[known])
        return f"a subclass of {known.__module__}.{known.__qualname__} that replaces {replaced} may have changed anything"

    rows: list[Conversion] = []
    _swap(model, target, rows if report is None else report, "fused_rnn.convert")
    left = [row for row in rows if row.reason is not None]
    if report is None and 2 * len(left) > len(rows):
        warnings.warn(
            f"fused_rnn.convert left {len(left)} of {len(rows)} recurrent modules as they were, first of all {left[0]}",
            stacklevel=2,
        )
    return model


def revert(model: Model, report: list[Conversion] | None = None) -> Model:
    """Undo ``convert``: give every fused module in ``model`` the class of torch.nn of the same name.

    Left alone, each with its reason in the report: what torch.nn has not (``reset_after=False``, ``coupled``,
    ``connections``, ``weight_dropout``, ``num_heads``), and subclasses, which may compute anything.

    Args:
        model: the model, changed in place.
        report: as in ``convert``.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module, or ``report`` no list.
    """

    def target(cls: type[nn.Module]) -> type[nn.Module] | str | None:
        plain = _PLAIN.get(cls) or vars(cls).get("_converted_from")
        if plain is None:
            for known in _PLAIN:
                if issubclass(cls, known):
                    return f"a subclass of {known.__module__}.{known.__qualname__} may have changed anything"
        return plain

    return _swap(model, target, report, "fused_rnn.revert")


def _swap(
    model: Model,
    target_of: Callable[[type[nn.Module]], type[nn.Module] | str | None],
    report: list[Conversion] | None,
    function: str,
) -> Model:
    """Swap modules.

    Args:
        target_of: what the modules of a class become: a class, or why they stay, or None for nothing of the kind.
    """
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
        plain = plain_class(before)
        target = target_of(plain)
        reason = target if isinstance(target, str) else kinship(module, plain) if target is None else obstacle(module)
        if reason is None and target is not None:
            reason = _without_counterpart(module)
        if reason is None:
            if target is None:
                continue
            _change_class(module, target)  # type: ignore[arg-type]
        if report is not None:
            also = tuple(path for path in paths.get(id(module), ()) if path != name)
            report.append(Conversion(name, before, type(module), reason, also))
    return model


def _without_counterpart(module: nn.Module) -> str | None:
    """What a module of either kind has and the other kind has not, so that it cannot become one."""
    if not getattr(module, "reset_after", True):
        return "torch.nn has no GRU with reset_after=False"
    if getattr(module, "coupled", False):
        return "torch.nn has no LSTM with coupled=True"
    for name, usual in ATTRIBUTES.items():
        if isinstance(module, StackOptions):
            if getattr(module, name) != usual:
                return f"torch.nn has no {name}" + (": set it to 0 first" if name == "weight_dropout" else "")
        elif isinstance(module, nn.RNNBase) and name in vars(module):
            return f"its attribute {name} would be hidden by the option of that name"
    return None


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
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


def obstacle(module: nn.Module) -> str | None:
    """Why a module of a class that can be swapped should not be."""
    for name in kept_classes.METHODS:
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


def kinship(module: nn.Module, plain: type[nn.Module]) -> str | None:
    """Why a module that looks like a recurrent one of torch.nn is none; None where it does not look so."""
    if isinstance(module, torch.jit.ScriptModule) and module.original_name in _NAMES:
        return "it is scripted or traced"
    if plain.__name__ in _NAMES and plain.__module__.startswith(("torch.ao.", "torch.nn.quantized")):
        return "it is quantized or prepared for quantization"
    if isinstance(module, (nn.RNNBase, RNNCellBase)) and plain not in _FUSED and not issubclass(plain, Initialised):
        return "a recurrent module of its own, none of torch.nn's six"
    return None


def _change_class(module: nn.Module, target: type[nn.Module]) -> None:
    given = given_weights(module)
    state: dict[str, Any] = vars(module)
    if isinstance(module, FlatWeights):
        module._forget_given()
    else:
        # torch.nn keeps this list, the fused modules do not.
        state.pop("_flat_weights", None)
    if not issubclass(target, Initialised):
        for option in OPTIONS:
            state.pop(option, None)
    module.__class__ = _wrapped(type(module), plain_class(type(module)), target)
    if not issubclass(target, Initialised) and isinstance(module, nn.RNNBase):
        # It reads the weights. Reading a parametrized one in training may change it: a power iteration, a dropout mask.
        parametrizations = getattr(module, "parametrizations", None)
        training = [part for part in parametrizations.modules() if part.training] if parametrizations is not None else []
        for part in training:
            part.training = False
        module._init_flat_weights()
        for part in training:
            part.training = True
    if given is not None:
        setattr(module, "_flat_weights", given)  # noqa: B010


def given_weights(module: nn.Module) -> list[Any] | None:
    """The list ``_flat_weights`` where the module computes with other tensors than its attributes; else None."""
    if not isinstance(module, nn.RNNBase) or parametrize.is_parametrized(module):
        return None
    if isinstance(module, FlatWeights):
        return module.overriding()
    given, refs = vars(module).get("_flat_weights"), getattr(module, "_flat_weight_refs", ())
    names = module._flat_weights_names
    if given is None or not len(given) == len(refs) == len(names) or module._weights_have_changed():  # type: ignore[no-untyped-call]
        return None
    return None if all(one is getattr(module, name, None) for one, name in zip(given, names, strict=True)) else given
