"""torch.fx.symbolic_trace: a call of a module is one node, whatever its arguments are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Tracer, symbolic_trace

import fused_rnn

packages = pytest.mark.parametrize("package", [nn, fused_rnn], ids=["torch.nn", "fused_rnn"])


class Net(nn.Module):
    """Layers with and without states, two calls of one module, and cells in a loop."""

    def __init__(self, package: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([package.LSTM(3, 4, bidirectional=True), package.GRU(8, 4), package.RNN(4, 4)])
        self.cells = nn.ModuleDict({"lstm": package.LSTMCell(4, 4), "gru": package.GRUCell(4, 4), "rnn": package.RNNCell(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        out, (h, c) = self.layers[0](x)
        out, state = self.layers[1](out, (h[:1] + c[1:]))
        out, _ = self.layers[2](input=out, hx=state)
        out, _ = self.layers[2](out)
        h, c = self.cells["lstm"](out[0])
        for _ in range(2):
            h, c = self.cells["lstm"](out[1], (h, c))
        return self.cells["rnn"](self.cells["gru"](h, c))


def calls(graph: GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


@packages
def test_one_node_for_each_call(package: Any) -> None:
    net, x = Net(package), torch.randn(5, 2, 3)
    graph = symbolic_trace(net)
    expected = [
        "layers.0",
        "layers.1",
        "layers.2",
        "layers.2",
        "cells.lstm",
        "cells.lstm",
        "cells.lstm",
        "cells.gru",
        "cells.rnn",
    ]
    assert calls(graph) == expected
    assert torch.equal(graph(x), net(x))
    assert torch.equal(Interpreter(graph).run(x), net(x))
    graph(x).sum().backward()
    # The modules are the same objects, and a graph may be copied.
    assert graph.get_submodule("layers.0") is net.layers[0]
    assert torch.equal(copy.deepcopy(graph)(x), net(x))
    assert torch.equal(symbolic_trace(graph)(x), net(x))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.LSTM(3, 4)
        self.register_buffer("start", torch.zeros(2, 2, 3))

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> Tensor:
        out, (h, c), cells = self.rnn(x, lengths=lengths, reset=reset, return_cell_states=True)
        # Stand-ins among the states alone.
        return self.rnn(self.start, (h, c))[0].sum() + out.sum() + cells.sum()


def test_keywords_and_states_alone() -> None:
    net = Masked()
    graph = symbolic_trace(net)
    first, second = (node for node in graph.graph.nodes if node.op == "call_module")
    assert set(first.kwargs) == {"lengths", "reset", "return_cell_states"}
    assert len(second.args) == 2
    arguments = torch.randn(5, 2, 3), torch.tensor([5, 2]), torch.rand(5, 2) < 0.3
    assert torch.equal(graph(*arguments), net(*arguments))


@pytest.mark.parametrize("options", [{}, {"connections": "highway", "num_heads": 2}], ids=["plain", "options"])
@pytest.mark.parametrize("cell", [fused_rnn.cells.mgu, fused_rnn.cells.lstm_coupled], ids=lambda cell: cell.row.name)
def test_cells_of_equations(cell: Any, options: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fused_rnn.Recurrent(cell, 4, 4, **options)

        def forward(self, x: Tensor, reset: Tensor) -> Tensor:
            out, state = self.rnn(x, reset=reset)
            return self.rnn(out, state)[0]

    net = Net()
    graph = symbolic_trace(net)
    assert calls(graph) == ["rnn", "rnn"]
    arguments = torch.randn(5, 2, 4), torch.rand(5, 2) < 0.3
    assert torch.equal(graph(*arguments), net(*arguments))


class Paths(Tracer):
    """As the tracers of feature extractors: each node is named after the module that was called."""

    def __init__(self, leaves: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__()
        self.leaves = leaves
        self.path = ""
        self.paths: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before, self.path = self.path, self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.path = before

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(*args, **kwargs)
        self.paths[proxy.node.name] = self.path
        return proxy


@pytest.mark.parametrize("leaves", [(), (fused_rnn.LSTM,)], ids=["others", "named as leaves"])
def test_other_tracers(leaves: tuple[type[nn.Module], ...]) -> None:
    net = fused_rnn.convert(Net(nn))
    tracer = Paths(leaves)
    graph = GraphModule(net, tracer.trace(net))
    for node in graph.graph.nodes:
        if node.op == "call_module":
            assert tracer.paths[node.name] == node.target
    x = torch.randn(5, 2, 3)
    assert torch.equal(graph(x), net(x))


class Around(nn.Module):
    def __init__(self, package: Any) -> None:
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(3, 3), package.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.first(x))[0])


@packages
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantization_of_the_graph(package: Any) -> None:
    """The linear layers around it are quantized, it stays as it is."""
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    # torch's quantized operations are not; a fixture sets it again.
    torch.use_deterministic_algorithms(False)
    net, x = Around(package).eval(), torch.randn(5, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = quantize.prepare_fx(net, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        converted = quantize.convert_fx(prepared)
        torch.testing.assert_close(converted(x), net(x), rtol=0.1, atol=0.1)
    assert type(converted.rnn) is package.GRU


@packages
def test_what_a_trace_refuses(package: Any) -> None:
    """A module that is itself traced, and one that is no part of what is traced."""
    with pytest.raises(torch.fx.proxy.TraceError):
        symbolic_trace(package.GRU(3, 4))
    other = package.GRU(3, 4)

    class Outside(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return other(x)

    with pytest.raises(NameError, match="module is not installed as a submodule"):
        symbolic_trace(Outside())
