"""``connections=`` and ``weight_dropout=`` under torch.compile, torch.export, torch.jit.trace and FLOP counters."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from compile_support import IN, H, assert_same, flat, fresh, make, packed, results, states_of  # noqa: F401
from older_torch import dynamo_with_values
from stack_support import CONNECTIONS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn

every_kind = pytest.mark.parametrize("kind", CONNECTIONS)
DOUBLE = torch.float64


@every_kind
@pytest.mark.parametrize("case", ["rnn_relu", "lstm_proj"])
def test_compiled_training_is_that_of_eager_code(kind: str, case: str) -> None:
    """Two directions and both dropouts under one seed, for any sizes in one graph, with and without initial states."""
    module = make(case, num_layers=3, bidirectional=True, dropout=0.5, connections=kind, weight_dropout=0.3)
    for with_states in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for length, batch in ((6, 3), (2, 9), (13, 11)):
            x = torch.randn(length, batch, IN, dtype=DOUBLE)
            states = states_of(module, length if module.batch_first else batch) if with_states else []
            dynamic = () if with_states else (0, 1)
            expected = results(module, module, x, None, states)
            for one, other in zip(results(compiled, module, x, None, states, dynamic), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        if not with_states:
            assert counter.frame_count == 1


@dynamo_with_values
@every_kind
def test_compiled_packed_and_lengths(kind: str) -> None:
    module = make("gru", num_layers=2, bidirectional=True, connections=kind)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([4, 9, 2, 1, 9], [8, 3]):
        x = torch.randn(max(lengths), len(lengths), IN, dtype=DOUBLE)
        given = packed(x, lengths, enforce_sorted=False)
        assert_same(results(compiled, module, given.data, given, []), results(module, module, given.data, given, []))
    lengths = torch.tensor([3, 0, 5])
    x, reset = torch.randn(5, 3, IN, dtype=DOUBLE), torch.rand(5, 3) < 0.4
    compiled = torch.compile(lambda x: flat(module(x, lengths=lengths, reset=reset)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flat(module(x, lengths=lengths, reset=reset)))


def test_inductor_draws_a_mask_for_each_call() -> None:
    """Compiled for good: another mask at each call, none in evaluation."""
    module = make("lstm", num_layers=2, weight_dropout=0.5, connections="highway")
    compiled, x = torch.compile(module, fullgraph=True), torch.randn(4, 2, IN, dtype=DOUBLE)
    outs = [compiled(x)[0] for _ in range(3)]
    assert not torch.allclose(outs[0], outs[1])
    assert not torch.allclose(outs[1], outs[2])
    module.eval()
    torch.testing.assert_close(compiled(x), module(x))
    module.weight_dropout = 0.0
    torch.testing.assert_close(compiled(x), module(x))


@every_kind
@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_other_sizes(kind: str, strict: bool) -> None:
    module = make("lstm", num_layers=3, bidirectional=True, connections=kind, weight_dropout=0.5).eval()
    dims = {0: Dim("T"), 1: Dim("N")}
    program = torch.export.export(module, (torch.randn(6, 3, IN, dtype=DOUBLE),), dynamic_shapes=(dims,), strict=strict)
    for length, batch in ((6, 3), (9, 2), (2, 7)):
        x = torch.randn(length, batch, IN, dtype=DOUBLE)
        torch.testing.assert_close(flat(program.module()(x)), flat(module(x)))


@every_kind
def test_traced(kind: str) -> None:
    module = make("gru", num_layers=3, bidirectional=True, batch_first=True, connections=kind, weight_dropout=0.5).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (torch.randn(3, 6, IN, dtype=DOUBLE),))
    for length, batch in ((6, 3), (9, 2)):
        x = torch.randn(batch, length, IN, dtype=DOUBLE)
        torch.testing.assert_close(traced(x), module(x))


@every_kind
def test_a_node_of_symbolic_traces(kind: str) -> None:
    """As the plain modules."""
    model = torch.nn.Sequential(make("gru", num_layers=2, connections=kind))
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    x = torch.randn(6, 3, IN, dtype=DOUBLE)
    torch.testing.assert_close(graph(x), model(x))


def test_flops_of_a_highway() -> None:
    """Those of the plain stack, and one product more for each gate."""
    options: dict[str, Any] = {"num_layers": 3, "bidirectional": True}
    counted = []
    for kind in (None, "highway"):
        module = fused_rnn.GRU(IN, H, **options, connections=kind)
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(4, 2, IN))
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == 2 * (2 * 4 * 2 * (2 * H) ** 2)


@pytest.mark.parametrize("options", [{"connections": "residual"}, {"connections": "highway"}, {"weight_dropout": 0.5}], ids=str)
def test_functionalize(options: dict[str, Any]) -> None:
    module = make("gru", num_layers=2, **options)
    x = torch.randn(4, 2, IN, dtype=DOUBLE)
    torch.manual_seed(0)
    expected = module(x)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.func.functionalize(copy.deepcopy(module))(x), expected)
