"""What is to be done once a file of torch is imported that takes too long to import before anyone asks for it."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call ``act`` with a module: now if it is imported, or right after its import. Asked for the same again, once."""
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(finder, _Waiting) and finder.waits(name, act) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, act))


class _Waiting:
    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self._name, self._act = name, act

    def waits(self, name: str, act: Callable[[ModuleType], None]) -> bool:
        return (name, act) == (self._name, self._act)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._act(module)

            loader.exec_module = exec_module
        return spec
