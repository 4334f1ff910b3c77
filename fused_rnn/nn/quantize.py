"""Replace the recurrent modules of a trained model by ones with int8 weights, and tell torch.ao.quantization of these."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

from torch import nn

from fused_rnn.data.when_imported import when_imported
from fused_rnn.kernels import dispatch
from fused_rnn.nn import cells, convert, kept_classes, layers, quantized, quantized_cells
from fused_rnn.nn.convert import Conversion, Model
from fused_rnn.nn.initialisation import Initialised
from fused_rnn.nn.quantized import Quantized
from fused_rnn.nn.recurrent import Recurrent

__all__ = ["quantize_dynamic"]

# By the name that torch.nn's, the fused and the quantized class have in common.
_QUANTIZED: dict[str, type[Quantized]] = {
    "RNN": quantized.QuantizedRNN,
    "LSTM": quantized.QuantizedLSTM,
    "GRU": quantized.QuantizedGRU,
    "RNNCell": quantized_cells.QuantizedRNNCell,
    "LSTMCell": quantized_cells.QuantizedLSTMCell,
    "GRUCell": quantized_cells.QuantizedGRUCell,
}
_FLOAT: dict[type[nn.Module], type[Quantized]] = {
    getattr(namespace, name): made
    for name, made in _QUANTIZED.items()
    for namespace in (nn, cells if name.endswith("Cell") else layers)
} | {fused: _QUANTIZED[plain.__name__] for fused, plain in kept_classes.PLAIN.items()}
# Where a module keeps what any module has: hooks, flags, tables of parameters.
_ANY = frozenset(vars(nn.Module()))


def quantize_dynamic(
    model: Model, report: list[Conversion] | None = None, *, only: Collection[type[nn.Module] | str] | None = None
) -> Model:
    """Replace the RNN, LSTM, GRU and cell modules of a trained model by modules for inference with int8 weights.

    Each row of a weight is rounded to 8 bits with a scale of its own. A row of the input, and h of a sequence before a step, is
    rounded as it comes, with a scale of its own too. Sums are exact; gates, states, input and output are float32.
    The weights take a quarter of their memory, and a step reads no more than that.

    The modules are torch.nn's or fused ones; ``convert`` before or after is not needed. As with ``convert``, a module object
    stays the same and changes its class, so ``model`` may itself be one, and hooks, attributes and other references hold. Its
    parameters are gone, and buffers are in their place. torch.nn.Linear and others are left alone; they are for
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), before or after.

    As torch's function, this one puts the model into evaluation mode. There are no gradients, and no way back but
    ``module.dequantize()``. The modules run on the CPU with the C++ backend.

    ``weight_dropout`` is about training and ends here: the modules have none, nor has what ``dequantize()`` gives.

    Left alone, each with its reason in the report: modules with a projection, ``connections``, ``num_heads``,
    ``reset_after=False`` or ``coupled=True``, and ``Recurrent``; those not on the CPU; subclasses, wrapped, parametrized,
    pruned or scripted modules, whose weights or results may be other ones than they seem.

    Args:
        model: the model, changed in place.
        report: a list to which one ``Conversion`` is appended for every recurrent module that was swapped or left alone.
        only: classes, of torch.nn or fused, and paths of the modules that are meant, as in the set that torch's function takes.
            Default: all

    Returns:
        ``model``. Warns of what was left alone, unless a report is asked for.

    Raises:
        TypeError: if ``model`` is no module, ``report`` no list, or ``only`` has other things than classes and paths.
        ValueError: if ``only`` has a class or a path that is none of such a module, or a weight has a NaN or an infinity.
        RuntimeError: if the C++ backend cannot run here.

    >>> model = quantize_dynamic(nn.Sequential(nn.LSTM(4, 8)))
    >>> model[0]
    QuantizedLSTM(4, 8)
    >>> model.state_dict()["0.weight_hh_l0"].dtype
    torch.int8
    """
    function = "fused_rnn.quantize_dynamic"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")
    if report is not None and not isinstance(report, list):
        raise TypeError(f"{function}: report: expected a list or None, got {type(report).__name__}")
    with dispatch.backend("cpp"):
        pass
    wanted = _wanted(model, only)
    rows: list[Conversion] = []
    found = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if wanted(name, module)]
    paths: dict[int, list[str]] = {}
    for name, module in found:
        paths.setdefault(id(module), []).append(name)
    modules = {id(module): module for _, module in found}
    # All are made before one is changed: a weight that cannot be quantized leaves the model as it was.
    made: list[tuple[nn.Module, Quantized]] = []
    for key, module in modules.items():
        name, *also = paths[key]
        reason = _obstacle(module)
        if reason is None:
            try:
                made.append((module, _FLOAT[type(module)].from_float(module)))
            except ValueError as error:
                raise ValueError(f"{function}: {name or '(the model)'}: {error}") from error
        after = type(module) if reason is not None else _FLOAT[type(module)]
        rows.append(Conversion(name, type(module), after, reason, tuple(also)))
    for module, quantized_module in made:
        _become(module, quantized_module)
    model.eval()
    if report is not None:
        report += rows
    else:
        left = [row for row in rows if row.reason is not None]
        if left:
            warnings.warn(
                f"{function} left {len(left)} of {len(rows)} recurrent modules as they were: " + "; ".join(map(str, left)),
                stacklevel=2,
            )
    return model


def _wanted(model: nn.Module, only: Any) -> Callable[[str, nn.Module], bool]:
    """Whether the module at a path is meant."""
    if only is None:
        return lambda _, module: _is_recurrent(module)
    if isinstance(only, (str, type)):
        raise TypeError(f"fused_rnn.quantize_dynamic: only: expected a set of classes and paths, got {only!r}")
    paths = {name for name, module in model.named_modules(remove_duplicate=False) if _is_recurrent(module)}
    made: set[type[Quantized]] = set()
    for each in only:
        if isinstance(each, str):
            if each not in paths:
                known = ", ".join(sorted(paths)) or "none"
                raise ValueError(
                    f"fused_rnn.quantize_dynamic: only: expected paths of recurrent modules ({known}), got {each!r}"
                )
        elif not isinstance(each, type):
            raise TypeError(f"fused_rnn.quantize_dynamic: only: expected classes and paths, got {type(each).__name__}")
        elif each not in _FLOAT:
            raise ValueError(
                f"fused_rnn.quantize_dynamic: only: expected classes of {', '.join(_QUANTIZED)}, of torch.nn or fused_rnn, "
                f"got {each.__module__}.{each.__qualname__}"
            )
        else:
            made.add(_FLOAT[each])
    return lambda name, module: _is_recurrent(module) and (name in only or _FLOAT.get(type(module)) in made)


def _is_recurrent(module: nn.Module) -> bool:
    if isinstance(module, Quantized):
        return False
    plain = convert.plain_class(type(module))
    return plain in _FLOAT or convert.kinship(module, plain) is not None or isinstance(module, (Initialised, Recurrent))


def _obstacle(module: nn.Module) -> str | None:
    """Why a recurrent module stays as it is."""
    cls = type(module)
    if isinstance(module, Recurrent):
        return "no int8 kernel has a cell that is made of equations"
    if cls not in _FLOAT:
        plain = convert.plain_class(cls)
        if plain in _FLOAT:
            return "its weights are computed from others, or sharded: remove what does it first"
        known = next((base for base in cls.__mro__ if base in _FLOAT), None)
        if known is not None:
            return f"a subclass of {known.__module__}.{known.__qualname__} may have changed anything"
        return convert.kinship(module, plain)
    reason = convert.obstacle(module)
    if reason is not None:
        return reason
    if convert.given_weights(module) is not None:
        return "it computes with other tensors than its parameters"
    names = getattr(module, "_flat_weights_names", None) or [
        f"{kind}_{which}" for kind in ("weight", "bias") for which in ("ih", "hh")
    ]
    for name in names:
        if name not in module._parameters:
            return f"{name} is no parameter: it is pruned, normed or computed from others"
    for parameter in module.parameters():
        if parameter.device.type != "cpu":
            return f"its parameters are on {parameter.device}: the kernels run on the CPU"
    return _FLOAT[cls].refuses(module)


def _become(module: nn.Module, made: Quantized) -> None:
    """Give a module the class and the contents of the quantized one made of it; hooks and what users keep in it stay."""
    state = vars(module)
    for name in list(module._parameters):
        if name.startswith(("weight_", "bias_")):
            del module._parameters[name]
    for name in vars(type(made)._FLOAT_MODULE(1, 1)):
        if name not in _ANY:
            state.pop(name, None)
    for name in ("_flat_weights", "_stack_options"):
        state.pop(name, None)
    module.__class__ = type(made)
    for name, value in vars(made).items():
        if name not in _ANY:
            state[name] = value
    module._buffers.update(made._buffers)
    module._non_persistent_buffers_set |= made._non_persistent_buffers_set


def _map(mappings: ModuleType) -> None:
    """Tell torch what the fused modules become, where its functions are given their classes."""
    table = mappings.get_default_dynamic_quant_module_mappings()
    table.update({cls: made for cls, made in _FLOAT.items() if cls.__module__.startswith("fused_rnn.")})


when_imported("torch.ao.quantization.quantization_mappings", _map)
