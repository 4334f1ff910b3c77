"""Fused layers that are instances of torch.nn's classes, or of subclasses of these, for code that asks.

The classes of ``fused_rnn.nn.layers`` are not, because Dynamo stops tracing at an instance of torch.nn's LSTM, GRU and RNN. It
is told here that these can be traced.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fused_rnn.data.when_imported import when_imported
from fused_rnn.nn import layers
from fused_rnn.nn.flat_weights import FlatWeights

_BUILDER = "torch._dynamo.variables.builder"


class _Kept(FlatWeights):
    def __setstate__(self, state: dict[str, Any]) -> None:
        # In the process that it was unpickled in.
        _tell_dynamo()
        super().__setstate__(state)


class RNN(_Kept, layers.RNN, nn.RNN):
    """A fused RNN that is an instance of torch.nn.RNN."""


class GRU(_Kept, layers.GRU, nn.GRU):
    """A fused GRU that is an instance of torch.nn.GRU."""


class LSTM(_Kept, layers.LSTM, nn.LSTM):
    """A fused LSTM that is an instance of torch.nn.LSTM."""


# What a subclass may replace: its constructor, and what it says of itself, are its own also when it is fused.
_OWN = ("__init__", "extra_repr", "reset_parameters")
# What torch.nn's forward calls or reads.
METHODS = (
    "forward",
    "check_input",
    "check_forward_args",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
)
_READ = frozenset((*METHODS, *nn.RNNBase.__constants__, "nonlinearity", "training", "_update_flat_weights", "all_weights"))
_CALL = frozenset(("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "__class__"))
# Every class has these, and flatten_parameters computes nothing.
_COMMON = frozenset(
    (
        *("__module__", "__doc__", "__annotations__", "__dict__", "__weakref__", "__slots__", "__qualname__"),
        *("__firstlineno__", "__static_attributes__", "__annotate_func__", "__annotations_cache__", "__abstractmethods__"),
        *("__constants__", "flatten_parameters"),
    )
)


def replaced(cls: type[nn.Module], known: type[nn.Module], fused: type[nn.Module]) -> str | None:
    """What a subclass ``cls`` of torch.nn's ``known`` replaces of that which its results come from, or None.

    A method that it adds changes nothing, nor does its constructor by now.

    Args:
        fused: the fused class in place of ``known``, whose own methods must not be replaced either.
    """
    of_fused = {name for base in fused.__mro__ if base.__module__.startswith("fused_rnn.") for name in vars(base)}
    for base in cls.__mro__[: cls.__mro__.index(known)]:
        for name in vars(base):
            if name in _OWN or name in _COMMON:
                continue
            if name in _READ or name in _CALL or name in of_fused or name.startswith(("weight_", "bias_")):
                return name
    return None


def made_of(cls: type[nn.Module], fused: type[nn.Module]) -> type[nn.Module]:
    """The class of fused modules that are instances of a subclass ``cls`` of torch.nn's; the same at every call."""
    for known in cls.__subclasses__():
        if vars(known).get("_converted_from") is cls:
            return known
    _tell_dynamo()
    members: dict[str, Any] = {"_converted_from": cls, "__module__": cls.__module__, "__reduce_ex__": _reduce_ex}
    defining = (base for base in cls.__mro__ if issubclass(base, nn.Module) and not base.__module__.startswith("torch."))
    for base in defining:
        for name in _OWN:
            if name in vars(base):
                members.setdefault(name, vars(base)[name])
    metaclass: Any = type(cls)
    made: type[nn.Module] = _fused_first(metaclass)(f"Fused{cls.__name__}", (cls, fused), members)
    return made


@functools.cache
def _fused_first(metaclass: Any) -> Any:
    """A metaclass of ``made_of``'s classes.

    The subclass is their first base, so that their instances have its layout in memory, and a module can change its class. But
    methods are looked up in the fused classes first.
    """

    def mro(cls: type) -> list[type]:
        order: list[type] = metaclass.mro(cls)
        if "_converted_from" not in vars(cls):
            return order
        ours = [base for base in order[1:] if base.__module__.startswith("fused_rnn.")]
        return [cls, *ours, *(base for base in order[1:] if base not in ours)]

    return type("_FusedFirst", (metaclass,), {"mro": mro})


def _reduce_ex(module: nn.Module, protocol: object) -> tuple[Any, ...]:
    # The class has no name that pickle could find.
    cls: Any = type(module)
    return _again, (cls._converted_from, cls.__bases__[1]), module.__getstate__()  # type: ignore[no-untyped-call]


def _again(cls: type[nn.Module], fused: type[nn.Module]) -> nn.Module:
    made = made_of(cls, fused)
    return made.__new__(made)


def _tell_dynamo() -> None:
    """Have Dynamo trace fused modules whatever they are instances of: now, or once it is imported, which takes seconds."""
    when_imported(_BUILDER, _allow_fused)


def _allow_fused(builder: ModuleType) -> None:
    wrap_module = getattr(builder.VariableBuilder, "wrap_module", None)
    # Without these, as in old versions of torch, a call breaks the graph, as one of torch.nn's module does.
    if wrap_module is None or getattr(wrap_module, "_allows_fused", False) or not hasattr(torch._dynamo.config, "allow_rnn"):
        return

    def allowing(self: Any, value: nn.Module) -> Any:
        if isinstance(value, FlatWeights):
            with torch._dynamo.config.patch(allow_rnn=True):
                return wrap_module(self, value)
        return wrap_module(self, value)

    allowing._allows_fused = True  # type: ignore[attr-defined]
    builder.VariableBuilder.wrap_module = allowing


def kept(plain: type[nn.Module]) -> type[nn.Module] | None:
    """The fused class whose instances are instances of torch.nn's RNN, GRU or LSTM; None for another class."""
    found = _KEPT.get(plain)
    if found is not None:
        _tell_dynamo()
    return found


_KEPT: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: RNN, nn.GRU: GRU, nn.LSTM: LSTM}
PLAIN = {fused: plain for plain, fused in _KEPT.items()}
