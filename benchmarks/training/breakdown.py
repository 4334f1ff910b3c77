"""How much of a training step is the recurrent layers, and how much is the rest, which no recurrent kernel can speed up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


@dataclass
class _Call:
    """When one call of a layer began and ended; None is what has not happened."""

    forward_begin: float
    forward_end: float | None = None
    backward_begin: float | None = None
    backward_end: float | None = None


class RecurrentClock:
    """Time a model's recurrent layers, forward and backward, within the training step that happens anyway.

    The backward of a layer begins when the first gradient of its results is there, and ends when its input's gradient is
    whole, or, where the input wants none, with the block. Four clock readings a layer and step; the model is left as it was.

    >>> import torch
    >>> model = nn.GRU(3, 4)
    >>> clock = RecurrentClock(model)
    >>> with clock:
    ...     model(torch.randn(5, 2, 3))[0].sum().backward()
    >>> clock.seconds > 0
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
        self._calls: list[_Call] = []
        self._hooks = ExitStack()
        self.seconds = 0.0

    def __enter__(self) -> RecurrentClock:
        self._calls.clear()
        for layer in self._layers:
            for handle in (layer.register_forward_pre_hook(self._before), layer.register_forward_hook(self._after)):
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        end = time.perf_counter()
        self._hooks.close()
        self.seconds = 0.0
        for call in self._calls:
            if call.forward_end is not None:
                self.seconds += call.forward_end - call.forward_begin
            if call.backward_begin is not None:
                self.seconds += (end if call.backward_end is None else call.backward_end) - call.backward_begin

    def _before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._calls.append(_Call(time.perf_counter()))

    def _after(self, layer: nn.Module, inputs: tuple[Any, ...], results: Any) -> None:
        call = self._calls[-1]

        def begins(gradient: Tensor) -> None:
            if call.backward_begin is None:
                call.backward_begin = time.perf_counter()

        def ends(gradient: Tensor) -> None:
            call.backward_end = time.perf_counter()

        for tensor in _tensors(results):
            if tensor.requires_grad:
                tensor.register_hook(begins)
        for tensor in _tensors(inputs[0]):
            if tensor.requires_grad:
                tensor.register_hook(ends)
        call.forward_end = time.perf_counter()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
