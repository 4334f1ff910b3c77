"""What a graph says that it saved: tools that draw it, or count its memory, read it from every node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from tests.calls_support import flat

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Seen(TorchDispatchMode):
    """A mode that sees every operation: a layer is an operator then."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def nodes(*results: Tensor) -> list[Any]:
    """All nodes that results lead to."""
    found, todo = [], [result.grad_fn for result in results]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.append(node)
            todo += [following for following, _ in node.next_functions]
    return found


def read(node: Any) -> list[Tensor]:
    """Every tensor that a node says it saved, by each of the ways that torch's nodes have."""
    tensors: list[Tensor] = []
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            tensors += [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Tensor)]
    # A Function's own; all of them are tensors, or a tool that asks for their sizes fails.
    saved = list(getattr(node, "saved_tensors", ()))
    assert all(isinstance(tensor, Tensor) for tensor in saved), node
    raw = [each.data for each in getattr(node, "_raw_saved_tensors", ())]
    assert [each.shape for each in raw] == [each.shape for each in saved]
    return tensors + saved


def dense(name: str, **options: Any) -> list[Tensor]:
    module = getattr(fused_rnn, name)(3, 4, **options)
    return flat(module(torch.randn((5, 3) if "Cell" in name else (5, 2, 3))))


def in_a_mode(name: str) -> list[Tensor]:
    with Seen():
        return dense(name)


def in_autocast(name: str) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return dense(name)


def second(name: str) -> list[Tensor]:
    module, x = getattr(fused_rnn, name)(3, 4), torch.randn(5, 3, requires_grad=True)
    return list(torch.autograd.grad(flat(module(x))[0].sum(), [x, *module.parameters()], create_graph=True))


def loop(name: str) -> list[Tensor]:
    module, x = getattr(fused_rnn, name)(3, 4), torch.randn((2, 3) if "Cell" in name else (1, 2, 3))
    states = None
    for _ in range(3):
        results = module(x, states)
        states = results if "Cell" in name else results[1]
    return flat(states)


CALLS: dict[str, Callable[[str], list[Tensor]]] = {
    "dense": dense,
    "without biases": lambda name: dense(name, bias=False),
    "in a mode": in_a_mode,
    "in autocast": in_autocast,
    "second gradients": second,
    "loop": loop,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", CALLS)
def test_every_node_can_be_read(call: str, name: str, backend: str) -> None:
    results = CALLS[call](name)
    found = nodes(*results)
    assert any(read(node) for node in found)
    sum(result.float().sum() for result in results).backward()
    # As of torch's own nodes: what was saved is freed, and that is said.
    for node in found:
        if type(node).__name__ in ("RecordedBackward", "RecordedStepBackward", "_ForwardBackward"):
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                read(node)


def test_what_is_saved() -> None:
    """The output, the input, the two weights and the tape: what is read in the backward, and nothing else."""
    module, x = fused_rnn.LSTM(3, 4), torch.randn(5, 2, 3)
    (node,) = (node for node in nodes(module(x)[0]) if type(node).__name__ == "RecordedBackward")
    shapes = sorted(tuple(tensor.shape) for tensor in read(node))
    assert shapes == sorted([(5, 2, 4), (5, 2, 3), (16, 3), (16, 4), (10, 1, 20)])
    assert any(tensor is module.weight_hh_l0 for tensor in read(node))


def test_layers_of_other_kinds() -> None:
    x = torch.randn(5, 2, 3)
    modules: list[nn.Module] = [fused_rnn.LSTM(3, 4, 2, proj_size=2, bidirectional=True), fused_rnn.GRU(3, 4, batch_first=True)]
    for module in modules:
        packed = pack_padded_sequence(x, torch.tensor([5, 3]))
        reset = torch.rand(5, 2) < 0.3
        for out in (
            module(x)[0],
            module(packed)[0].data,
            module(x, reset=reset)[0],
            module(x, lengths=torch.tensor([5, 2] if not module.batch_first else [2, 1, 0, 2, 1]))[0],
        ):
            assert any(read(node) for node in nodes(out))
