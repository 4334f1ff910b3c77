"""Runs a program of others twice, with torch.nn and converted, from the same seeds, and compares all that came out."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar
from unittest import mock

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

import fused_rnn

Model = TypeVar("Model", bound=nn.Module)

# Both runs are in float32, where a right result may differ by a few roundings of 6e-8 in every product. The loops of training
# add them up, and an optimizer divides small gradients by their own size; some steps of that stay under these bounds. A state,
# a gate or a gradient that went wrong shows in the second or third digit.
RTOL, ATOL = 1e-4, 1e-5


def package(name: str) -> ModuleType:
    """Import a package, or skip the file where it is not installed. One that is installed and does not import is an error."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed here; make test-downstream installs it", allow_module_level=True)
    return importlib.import_module(name)


def package_with_torchaudio(name: str) -> ModuleType:
    """As ``package``, for one that imports torchaudio: if that cannot load, a stand-in takes its place meanwhile.

    The wheels of torchaudio on the default package index are for CUDA, and do not load beside a torch for the CPU alone. What
    the tests run of such packages reads and writes no sound, so an attribute that does nothing is enough.
    """
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return package(name)
    standins: dict[str, ModuleType] = {}
    try:
        importlib.import_module("torchaudio")
    except OSError:
        for part in ("torchaudio", "torchaudio.transforms", "torchaudio.functional"):
            standins[part] = mock.MagicMock(name=part, __spec__=ModuleSpec(part, None), __path__=[], __version__="0.0")
    sys.modules.update(standins)
    try:
        return package(name)
    finally:
        for part in standins:
            del sys.modules[part]


def _recurrent(module: nn.Module) -> bool:
    return isinstance(module, (nn.RNNBase, RNNCellBase))


def _fused(module: nn.Module) -> bool:
    # A parametrized module has a class made at run time, over the one that it had.
    return any(cls.__module__.startswith("fused_rnn.") for cls in type(module).__mro__)


class Swap:
    """What a program calls with each model that it built, before it runs it; in the first run it changes nothing."""

    def __init__(self, convert: bool) -> None:
        self.convert = convert
        self.models: list[nn.Module] = []
        self.before: list[dict[str, Tensor]] = []
        self.calls: Counter[bool] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> Swap:
        """Itself: libraries copy the arguments of models, and all copies report here."""
        return self

    def __call__(self, model: Model, *, made_so: bool = False, keep_class: bool = False) -> Model:
        """Convert ``model``, all of it, or leave it to torch.nn; where the program itself has ``made_so``, only look at it."""
        assert any(map(_recurrent, model.modules())), "there is nothing to convert"
        if self.convert and not made_so:
            report: list[fused_rnn.Conversion] = []
            fused_rnn.convert(model, report, keep_class=keep_class)
            assert not [str(one) for one in report if one.reason is not None]
        self.models.append(model)
        self.before.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return model

    def _count(self, module: nn.Module, _: Any) -> None:
        # Some libraries run a layer once while they build it, to learn its sizes.
        if self.models and _recurrent(module):
            self.calls[_fused(module)] += 1

    def run(self, program: Callable[[Swap], dict[str, Any]]) -> dict[str, Any]:
        """What ``program`` returns, and the parameters of its models as they are after it."""
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        hook = nn.modules.module.register_module_forward_pre_hook(self._count)
        try:
            results = dict(program(self))
        finally:
            hook.remove()
        assert self.calls[self.convert], "no recurrent module was called"
        assert not self.calls[not self.convert], "a recurrent module of the other run was called"
        for place, model in enumerate(self.models):
            for name, parameter in model.named_parameters():
                results[f"model {place}: {name}"] = parameter.detach().clone()
        return results

    def assert_trained(self) -> None:
        """Every recurrent weight that asks for gradients is another one than when the model was built."""
        for model, before in zip(self.models, self.before, strict=True):
            for path, module in model.named_modules():
                if not _recurrent(module):
                    continue
                for name, parameter in module.named_parameters(prefix=path):
                    assert not parameter.requires_grad or not torch.equal(parameter, before[name]), f"{name} was not trained"


def assert_same(program: Callable[[Swap], dict[str, Any]], *, trains: bool = True, unlike: tuple[str, ...] = ()) -> None:
    """Run ``program`` with torch.nn and converted, and compare what it returns and its models' parameters after it.

    Args:
        program: takes a ``Swap``, calls it with every model that it builds, and returns named tensors, arrays and numbers.
        trains: whether the recurrent weights must be others at the end.
        unlike: ends of the names of parameters that are not compared, because rounding alone decides them.

    Raises:
        AssertionError: if a result differs or is not finite, or if the wrong recurrent modules were called.
    """
    plain, fused = Swap(convert=False), Swap(convert=True)
    expected, actual = plain.run(program), fused.run(program)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        if name.endswith(unlike):
            continue
        tensor = torch.as_tensor(value)
        assert tensor.isfinite().all(), f"{name}: {tensor}"
        torch.testing.assert_close(
            torch.as_tensor(actual[name]), tensor, rtol=RTOL, atol=ATOL, msg=lambda text, name=name: f"{name}: {text}"
        )
    if trains:
        plain.assert_trained()
        fused.assert_trained()
    assert fused.calls[True] == plain.calls[False], "the programs took different ways"
