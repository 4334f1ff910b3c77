"""Plain torch.onnx.export of models with fused modules: ONNX's own operators, by both of torch's exporters."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fused_rnn

IN, H = 5, 8
by_both = pytest.mark.parametrize("dynamo", [False, True], ids=["trace", "dynamo"])
newer = pytest.mark.skipif(not hasattr(torch.onnx.ops, "symbolic_multi_out"), reason="torch before 2.8")
pytestmark = [
    newer,
    # The exporter of traces, and the JIT, are deprecated as a whole.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size:UserWarning"),
]


def exported(model: torch.nn.Module, inputs: tuple[Any, ...], sizes: Sequence[dict[int, str]], dynamo: bool) -> onnx.ModelProto:
    """The model in ONNX; of each tensor of the input, the dimensions that may change are named."""
    file = io.BytesIO()
    names = [f"x{i}" for i in range(len(sizes))]
    if dynamo:
        dims = iter([dict.fromkeys(each, Dim.AUTO) for each in sizes])
        shapes = torch.utils._pytree.tree_map(lambda _: next(dims), inputs)
        torch.onnx.export(model, inputs, file, dynamo=True, input_names=names, dynamic_shapes=shapes, verbose=False)
    else:
        axes = dict(zip(names, sizes, strict=True))
        torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes)
    proto = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def operators(proto: onnx.ModelProto) -> list[str]:
    assert {node.domain for node in proto.graph.node} == {""}
    return [node.op_type for node in proto.graph.node]


def assert_runs(proto: onnx.ModelProto, model: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    runtime = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [value.name for value in runtime.get_inputs()]
    found = runtime.run(None, {name: x.numpy() for name, x in zip(names, tree_leaves(inputs), strict=True)})
    with torch.no_grad():
        expected = tree_leaves(model(*inputs))
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), value, rtol=1e-4, atol=2e-6)


LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {"num_layers": 2}),
    "relu": ("RNN", {"nonlinearity": "relu", "bidirectional": True, "bias": False}),
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    "lstm_plain": ("LSTM", {"bias": False}),
    "gru": ("GRU", {"num_layers": 2, "batch_first": True}),
    "gru_both": ("GRU", {"bidirectional": True}),
}


@by_both
@pytest.mark.parametrize("given", [False, True], ids=["zero", "states"])
@pytest.mark.parametrize("case", LAYERS)
def test_layers(case: str, given: bool, dynamo: bool) -> None:
    name, options = LAYERS[case]
    model = fused_rnn.convert(getattr(torch.nn, name)(IN, H, **options)).eval()
    count = model.num_layers * (2 if model.bidirectional else 1)

    def inputs(length: int, number: int) -> tuple[Any, ...]:
        x = torch.randn(number, length, IN) if model.batch_first else torch.randn(length, number, IN)
        if not given:
            return (x,)
        states = [torch.randn(count, number, H) for _ in range(2 if name == "LSTM" else 1)]
        return x, tuple(states) if name == "LSTM" else states[0]

    first = inputs(6, 3)
    sizes = [{0: "N", 1: "T"} if model.batch_first else {0: "T", 1: "N"}, *({1: "N"} for _ in tree_leaves(first)[1:])]
    proto = exported(model, first, sizes, dynamo)
    assert operators(proto).count(name) == model.num_layers
    assert not {"MatMul", "Loop"} & set(operators(proto))
    for length, number in ((6, 3), (9, 2), (2, 11)):
        assert_runs(proto, model, inputs(length, number))


@by_both
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["residual", "highway", "dense"])
def test_connections(kind: str, batch_first: bool, dynamo: bool) -> None:
    """Each layer is ONNX's own operator, and ONNX's own sums and products are around it; masks of weights are not exported."""
    options = {"num_layers": 3, "bidirectional": True, "batch_first": batch_first, "dropout": 0.5, "weight_dropout": 0.5}
    model = fused_rnn.LSTM(IN, H, **options, connections=kind).eval()
    sizes = {0: "N", 1: "T"} if batch_first else {0: "T", 1: "N"}
    proto = exported(model, (torch.randn(3, 6, IN),), [sizes], dynamo)
    assert operators(proto).count("LSTM") == 3
    for length, number in ((6, 3), (9, 2), (2, 11)):
        assert_runs(proto, model, (torch.randn(length, number, IN),))


@by_both
@pytest.mark.parametrize("bidirectional", [False, True])
def test_heads(bidirectional: bool, dynamo: bool) -> None:
    """An operator for each head of a layer, both directions in it."""
    model = fused_rnn.LSTM(IN, H, num_layers=2, bidirectional=bidirectional, num_heads=2).eval()
    proto = exported(model, (torch.randn(3, 6, IN),), [{0: "T", 1: "N"}], dynamo)
    assert operators(proto).count("LSTM") == 4
    for length, number in ((6, 3), (9, 2), (2, 11)):
        assert_runs(proto, model, (torch.randn(length, number, IN),))


class _Loop(torch.nn.Module):
    """A cell at each of three steps."""

    def __init__(self, cell: torch.nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Any:
        h = None
        for t in range(3):
            h = self.cell(x[t], h)
        return h


@by_both
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_cells_in_a_loop(name: str, dynamo: bool) -> None:
    model = _Loop(fused_rnn.convert(getattr(torch.nn, f"{name}Cell")(IN, H))).eval()
    proto = exported(model, (torch.randn(3, 4, IN),), [{1: "N"}], dynamo)
    assert operators(proto).count(name) == 3
    for number in (1, 4, 7):
        assert_runs(proto, model, (torch.randn(3, number, IN),))


@by_both
def test_unbatched(dynamo: bool) -> None:
    model = fused_rnn.GRU(IN, H).eval()
    proto = exported(model, (torch.randn(6, IN),), [{0: "T"}], dynamo)
    assert operators(proto).count("GRU") == 1
    assert_runs(proto, model, (torch.randn(9, IN),))


@by_both
def test_float64_and_a_whole_model(dynamo: bool) -> None:
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 40)
            self.rnn = torch.nn.LSTM(40, 30, batch_first=True)
            self.head = torch.nn.Linear(30, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.rnn(self.embedding(words))[0])

    model = fused_rnn.convert(Tagger().eval())
    proto = exported(model, (torch.randint(11, (3, 6)),), [{0: "N", 1: "T"}], dynamo)
    assert operators(proto).count("LSTM") == 1
    assert_runs(proto, model, (torch.randint(11, (2, 9)),))


class _Packs(torch.nn.Module):
    def __init__(self, rnn: torch.nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor, h: Tensor) -> Any:
        out, h = self.rnn(pack_padded_sequence(x, lengths), h)
        return pad_packed_sequence(out)[0], h


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "deep"])
def test_packed_inside(options: dict[str, Any]) -> None:
    """The exporter of traces makes lengths of packing, as it does for torch.nn."""
    plain = torch.nn.GRU(IN, H, **options)
    model = _Packs(fused_rnn.convert(plain)).eval()
    count = len(model.rnn.all_weights)

    def inputs(lengths: list[int]) -> tuple[Tensor, ...]:
        return torch.randn(lengths[0], len(lengths), IN), torch.tensor(lengths), torch.randn(count, len(lengths), H)

    proto = exported(model, inputs([6, 4, 1]), [{0: "T", 1: "N"}, {0: "N"}, {1: "N"}], dynamo=False)
    assert operators(proto).count("GRU") == model.rnn.num_layers
    for lengths in ([6, 4, 1], [7, 3], [3, 3, 2, 2]):
        assert_runs(proto, model, inputs(lengths))


@by_both
def test_what_has_no_operator_says_what_to_do(dynamo: bool) -> None:
    x = torch.randn(6, 3, IN)

    class With(torch.nn.Module):
        def __init__(self, **keywords: Any) -> None:
            super().__init__()
            self.rnn, self.keywords = fused_rnn.LSTM(IN, H), keywords

        def forward(self, x: Tensor) -> Any:
            return self.rnn(x, **self.keywords)[0]

    refused: tuple[tuple[torch.nn.Module, str], ...] = (
        (fused_rnn.LSTM(IN, H, proj_size=3), "export a model with proj_size=0"),
        (With(lengths=torch.tensor([2, 6, 1])), "export a model without them"),
        (With(reset=torch.zeros(6, 3, dtype=torch.bool)), "export a model without resets"),
        (With(return_cell_states=True), "export a model without return_cell_states"),
    )
    for model, words in refused:
        with pytest.raises(Exception, match=words):
            exported(model.eval(), (x,), [{}], dynamo)


def test_trace_is_exported_in_eval_mode() -> None:
    """As of torch.nn: the exporter of traces leaves dropout out unless it is told to keep it."""
    model = fused_rnn.LSTM(IN, H, 2, dropout=0.5)
    proto = exported(model, (torch.randn(6, 3, IN),), [{}], dynamo=False)
    assert "Dropout" not in operators(proto)
    assert model.training
    assert_runs(proto, model.eval(), (torch.randn(6, 3, IN),))


def test_program_that_was_exported_before() -> None:
    model = fused_rnn.GRU(IN, H, bidirectional=True).eval()
    program = torch.export.export(model, (torch.randn(6, 3, IN),), dynamic_shapes=({0: Dim("T"), 1: Dim("N")},))
    proto = fused_rnn.onnx.export(program, verbose=False).model_proto
    assert operators(proto).count("GRU") == 1
    assert_runs(proto, model, (torch.randn(9, 2, IN),))


def test_import_needs_no_package_of_onnx() -> None:
    script = "import sys, fused_rnn; print([name for name in ('onnx', 'onnxscript', 'onnx_ir') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
