"""torch.export, ONNX and torch.jit.trace: what leaves Python computes what the module computes, at other sizes too."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from older_torch import dynamo_with_values
from torch import Tensor
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fused_rnn
from fused_rnn.graph import onnx_export

IN, H = 5, 8
T, N = Dim("T"), Dim("N")
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    "lstm_proj": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {"batch_first": True, "bidirectional": True}),
}
OTHER_SIZES = ((1, 1), (9, 2), (2, 11))
# torch.export in torch 2.13 uses what its own pytree calls deprecated; the JIT is deprecated as a whole.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")


def make(case: str, **options: Any) -> torch.nn.Module:
    name, own = MODULES[case]
    module: torch.nn.Module = getattr(fused_rnn, name)(IN, H, **{**own, **options})
    return module.eval()


def batch(module: torch.nn.Module, length: int = 6, count: int = 3) -> Tensor:
    x = torch.randn(length, count, IN)
    return x.transpose(0, 1).contiguous() if module.batch_first else x


def sizes(module: torch.nn.Module) -> dict[int, Any]:
    return {0: N, 1: T} if module.batch_first else {0: T, 1: N}


def assert_same(program: Callable[..., Any], module: torch.nn.Module, inputs: Sequence[Any]) -> None:
    for actual, expected in zip(tree_leaves(program(*inputs)), tree_leaves(module(*inputs)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("case", "strict"), [*((case, False) for case in MODULES), ("lstm", True), ("gru", True)])
def test_export_with_other_sizes(case: str, strict: bool) -> None:
    module = make(case)
    program = torch.export.export(module, (batch(module),), dynamic_shapes=(sizes(module),), strict=strict)
    for length, count in ((6, 3), *OTHER_SIZES, (4, 0)):
        assert_same(program.module(), module, (batch(module, length, count),))
    decomposed = program.run_decompositions()
    assert any("layer_forward" in str(node.target) for node in decomposed.graph.nodes)
    assert_same(decomposed.module(), module, (batch(module, 7, 2),))


def test_export_with_states() -> None:
    module = make("lstm_proj")

    def states(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(1, count, 3), torch.randn(1, count, H)

    program = torch.export.export(module, (batch(module), states(3)), dynamic_shapes=({0: T, 1: N}, ({1: N}, {1: N})))
    for length, count in OTHER_SIZES:
        assert_same(program.module(), module, (batch(module, length, count), states(count)))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=dynamo_with_values)], ids=["non_strict", "strict"])
def test_export_with_lengths(strict: bool) -> None:
    module = make("lstm")

    def call(program: Callable[..., Any], length: int, lengths: list[int]) -> list[Tensor]:
        torch.manual_seed(length)
        return tree_leaves(program(batch(module, length, len(lengths)), lengths=torch.tensor(lengths)))

    shapes = {"input": {0: T, 1: N}, "lengths": {0: N}}
    given = {"lengths": torch.tensor([2, 6, 1])}
    exported = torch.export.export(module, (batch(module),), given, dynamic_shapes=shapes, strict=strict)
    for program in (exported.module(), exported.run_decompositions().module()):
        for length, lengths in ((6, [6, 6, 6]), (9, [0, 9, 3, 2]), (3, [0, 0])):
            torch.testing.assert_close(call(program, length, lengths), call(module, length, lengths), rtol=1e-6, atol=1e-6)


class _Packed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.GRU(IN, H)

    def forward(self, data: Tensor, batch_sizes: Tensor) -> Any:
        out, h = self.rnn(PackedSequence(data, batch_sizes))
        return out.data, h


@dynamo_with_values
def test_export_of_packed_rows() -> None:
    """The number of sequences is then a size that only the values tell."""
    module = _Packed()
    first = (torch.randn(7, IN), torch.tensor([4, 2, 1]))
    program = torch.export.export(module, first, dynamic_shapes=({0: Dim("R")}, {0: T}))
    for lengths in ([4, 1], [6, 6, 5, 2]):
        given = pack_padded_sequence(torch.randn(max(lengths), len(lengths), IN), lengths)
        assert_same(program.module(), module, (given.data, given.batch_sizes))
    with pytest.raises(RuntimeError, match="add up to 8 rows"):
        program.module()(torch.randn(7, IN), torch.tensor([4, 3, 1]))


def test_exported_program_trains() -> None:
    """It computes no tape, so the backward runs the forward again: the same gradients, the second ones too."""
    module = make("gru").double()
    x = batch(module).double()
    program = torch.export.export(module, (x,), dynamic_shapes=(sizes(module),)).module()
    (node,) = [node for node in program.graph.nodes if "layer_forward" in str(node.target)]
    assert node.args[-1] is False
    x = batch(module, 9, 2).double()
    found = []
    for run in (program, module):
        parameters = list(run.parameters())
        loss = sum(value.sin().sum() for value in tree_leaves(run(x)))
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        loss = sum(value.sin().sum() for value in tree_leaves(run(x)))
        second = torch.autograd.grad(sum(grad.sin().sum() for grad in first), parameters)
        found.append([*torch.autograd.grad(loss, parameters), *second])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_saved_program_runs_in_another_process(tmp_path: Path) -> None:
    """The reader needs the operators: it imports fused_rnn, and nothing of the model's code."""
    module = make("lstm")
    x = batch(module, 9, 2)
    program = torch.export.export(module, (batch(module),), dynamic_shapes=(sizes(module),))
    torch.export.save(program, tmp_path / "lstm.pt2")
    torch.save((x, tree_leaves(module(x))), tmp_path / "expected.pt")
    read = """
import sys, torch, fused_rnn
x, expected = torch.load(sys.argv[2])
found = torch.utils._pytree.tree_leaves(torch.export.load(sys.argv[1]).module()(x))
for actual, value in zip(found, expected, strict=True):
    torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6)
print("same")
"""
    arguments = [sys.executable, "-c", read, str(tmp_path / "lstm.pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run(arguments, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


# --- ONNX. ---


def session(program: Any) -> tuple[list[onnx.NodeProto], Callable[..., list[Tensor]]]:
    """The nodes of an exported program, and ONNX Runtime on it."""
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    runtime = onnxruntime.InferenceSession(model.SerializeToString())
    names = [value.name for value in runtime.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: value.numpy() for name, value in zip(names, tree_leaves(inputs), strict=True)}
        return [torch.from_numpy(value) for value in runtime.run(None, given)]

    return list(model.graph.node), run


def assert_close_in_onnx(run: Callable[..., list[Tensor]], module: torch.nn.Module, inputs: Sequence[Any]) -> None:
    with torch.no_grad():
        expected = tree_leaves(module(*inputs))
    for actual, value in zip(run(*inputs), expected, strict=True):
        # ONNX Runtime's own tanh and logistic are right to some units in the last place, and a walk adds them up.
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=2e-6)


ONNX = {
    "rnn_tanh": ("RNN", {"bias": False}, "RNN", 1),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}, "RNN", 2),
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}, "LSTM", 2),
    "lstm_plain": ("LSTM", {}, "LSTM", 1),
    "lstm_coupled": ("LSTM", {"num_layers": 2, "bidirectional": True, "coupled": True}, "LSTM", 2),
    "lstm_coupled_plain": ("LSTM", {"bias": False, "coupled": True}, "LSTM", 1),
    "gru": ("GRU", {"batch_first": True, "bidirectional": True}, "GRU", 1),
    "lstm_heads": ("LSTM", {"num_layers": 2, "bidirectional": True, "num_heads": 2}, "LSTM", 4),
    "gru_heads": ("GRU", {"num_heads": 4}, "GRU", 4),
    "gru_reset_before": ("GRU", {"num_layers": 2, "bidirectional": True, "reset_after": False}, "GRU", 2),
    "gru_reset_before_plain": ("GRU", {"bias": False, "reset_after": False}, "GRU", 1),
}


@pytest.mark.parametrize("case", ONNX)
def test_onnx(case: str) -> None:
    name, options, operator, count = ONNX[case]
    module = getattr(fused_rnn, name)(IN, H, **options).eval()
    program = fused_rnn.onnx.export(module, (batch(module),), dynamic_shapes=(sizes(module),), verbose=False)
    nodes, run = session(program)
    assert [node.op_type for node in nodes].count(operator) == count
    assert {node.domain for node in nodes} == {""}
    if name == "GRU":
        given = [each.i for node in nodes for each in node.attribute if each.name == "linear_before_reset"]
        assert given == [module.reset_after] * count
    for length, number in ((6, 3), *OTHER_SIZES):
        assert_close_in_onnx(run, module, (batch(module, length, number),))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_onnx_with_states(name: str) -> None:
    module = getattr(fused_rnn, name)(IN, H, bidirectional=True).eval()

    def inputs(length: int, count: int) -> tuple[Any, ...]:
        states = [torch.randn(2, count, H) for _ in range(2 if name == "LSTM" else 1)]
        return torch.randn(length, count, IN), tuple(states) if name == "LSTM" else states[0]

    shapes = ({0: T, 1: N}, ({1: N}, {1: N}) if name == "LSTM" else {1: N})
    _, run = session(fused_rnn.onnx.export(module, inputs(6, 3), dynamic_shapes=shapes, verbose=False))
    for length, count in OTHER_SIZES:
        assert_close_in_onnx(run, module, inputs(length, count))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_onnx_of_cells(name: str) -> None:
    module = getattr(fused_rnn, name)(IN, H).eval()
    program = fused_rnn.onnx.export(module, (torch.randn(3, IN),), dynamic_shapes=({0: N},), verbose=False)
    nodes, run = session(program)
    assert name.removesuffix("Cell") in [node.op_type for node in nodes]
    for count in (1, 3, 8):
        assert_close_in_onnx(run, module, (torch.randn(count, IN),))


def test_onnx_file_of_a_whole_model(tmp_path: Path) -> None:
    """Through torch.onnx.export itself, with weights too large for the exporter to fold, one bias, and words for input."""

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 40)
            self.rnn = fused_rnn.GRU(40, 300, batch_first=True)
            self.head = torch.nn.Linear(300, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.rnn(self.embedding(words))[0])

    model, path = Tagger().eval(), tmp_path / "tagger.onnx"
    table = fused_rnn.onnx.translation_table()
    torch.onnx.export(
        model,
        (torch.randint(11, (3, 6)),),
        path,
        dynamo=True,
        dynamic_shapes=({0: N, 1: T},),
        custom_translation_table=table,
        verbose=False,
    )
    runtime = onnxruntime.InferenceSession(path)
    words = torch.randint(11, (2, 9))
    with torch.no_grad():
        expected = model(words)
    (found,) = runtime.run(None, {runtime.get_inputs()[0].name: words.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    assert [node.op_type for node in onnx.load(path, load_external_data=False).graph.node].count("GRU") == 1


def test_onnx_refuses_what_it_has_no_operator_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make("lstm_proj")
    with pytest.raises(NotImplementedError, match="no ONNX operator computes an LSTM with projections"):
        fused_rnn.onnx.export(module, (batch(module),), verbose=False)
    with monkeypatch.context() as patch:
        patch.delitem(onnx_export.OPERATORS, "gru")
        with pytest.raises(NotImplementedError, match="no ONNX operator computes the cell 'gru'"):
            fused_rnn.onnx.export(make("gru"), (batch(module),), verbose=False)
    with pytest.raises(NotImplementedError, match="PackedSequence cannot be exported to ONNX"):
        fused_rnn.onnx.export(_Packed().eval(), (torch.randn(7, IN), torch.tensor([4, 2, 1])), verbose=False)
    with pytest.raises(NotImplementedError, match="lengths cannot be exported to ONNX"):
        fused_rnn.onnx.export(make("lstm"), (batch(module),), kwargs={"lengths": torch.tensor([2, 6, 1])}, verbose=False)


def test_onnx_without_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnxscript"):
        fused_rnn.onnx.translation_table()


# --- torch.jit. ---


@pytest.mark.parametrize("case", MODULES)
def test_jit_trace(case: str) -> None:
    """For every size, stored and loaded, and trained."""
    module = make(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, (batch(module),))
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    for program in (traced, torch.jit.load(stored)):
        for length, count in ((6, 3), *OTHER_SIZES):
            assert_same(program, module, (batch(module, length, count),))
    twin = copy.deepcopy(module)
    x = batch(module, 9, 2)
    tree_leaves(traced(x))[0].sin().sum().backward()
    tree_leaves(twin(x))[0].sin().sum().backward()
    for actual, expected in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_jit_trace_is_quiet() -> None:
    """The sizes that it cannot record are those of argument checks."""
    script = """
import warnings, torch, fused_rnn
with warnings.catch_warnings(record=True) as caught:
    torch.jit.trace(fused_rnn.LSTM(5, 8, 2), (torch.randn(6, 3, 5),))
print([str(each.message) for each in caught if issubclass(each.category, torch.jit.TracerWarning)])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr + done.stdout
