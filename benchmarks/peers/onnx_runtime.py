"""ONNX Runtime on the CPU: inference only, one recurrent operator built by hand with the same weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CELLS, Case
from benchmarks.peers.base import Peer, Provider
from benchmarks.problem import Problem

# Cell -> (attributes of the operator, torch's gate blocks in the operator's order).
# LSTM: torch i f g o, ONNX i o f c. GRU: torch r z n, ONNX z r h. Source: the operators' pages of the ONNX standard.
_OPERATORS: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "lstm": ({}, (0, 3, 1, 2)),
    "gru": ({"linear_before_reset": 1}, (1, 0, 2)),
}

# Operator set 14 and IR 8 (ONNX 1.10 on) hold the last change to LSTM and GRU; anything newer reads them.
_OPSET, _IR = 14, 8


def _unavailable() -> str | None:
    missing = []
    for name in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return f"not installed: {' '.join(missing)} (pip install {' '.join(missing)})" if missing else None


def _refuses(case: Case) -> str | None:
    if case.training:
        return "inference only"
    if case.cell not in _OPERATORS:
        return f"compared for {' and '.join(CELLS[cell][0] for cell in _OPERATORS)} only"
    if case.dtype != "float32" or not case.plain:
        return "compared for one dense float32 layer of one direction only"
    return None


def _version() -> str:
    return str(importlib.import_module("onnxruntime").__version__)


def _blocks(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    blocks = weight.detach().chunk(len(order))
    return torch.cat([blocks[i] for i in order])


def _model(problem: Problem, case: Case) -> bytes:
    """The graph: (input, h_0[, c_0]) -> (Y, h_n[, c_n]), weights as constants."""
    onnx: Any = importlib.import_module("onnx")
    helper, numpy_helper, float32 = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    B, T, I, H = case.shape.sizes  # noqa: E741
    attributes, order = _OPERATORS[case.cell]
    weights = {name: _blocks(value, order) for name, value in problem.module.named_parameters()}
    parameters = {
        "W": weights["weight_ih_l0"][None],
        "R": weights["weight_hh_l0"][None],
        "B": torch.cat([weights["bias_ih_l0"], weights["bias_hh_l0"]])[None],
    }
    states = ["h", "c"][: len(problem.states)]
    node = helper.make_node(
        case.class_name,
        ["input", "W", "R", "B", "", *(f"{s}_0" for s in states)],
        ["Y", *(f"{s}_n" for s in states)],
        hidden_size=H,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        case.cell,
        [helper.make_tensor_value_info("input", float32, [T, B, I])]
        + [helper.make_tensor_value_info(f"{s}_0", float32, [1, B, H]) for s in states],
        [helper.make_tensor_value_info("Y", float32, [T, 1, B, H])]
        + [helper.make_tensor_value_info(f"{s}_n", float32, [1, B, H]) for s in states],
        [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in parameters.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    return bytes(model.SerializeToString())


def _prepare(problem: Problem, case: Case, threads: int) -> Provider:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_model(problem, case), options, providers=["CPUExecutionProvider"])
    feed = {"input": problem.input.numpy()}
    feed |= {f"{name}_0": state.numpy() for name, state in zip("hc", problem.states, strict=False)}

    def tensors(results: list[Any]) -> tuple[Tensor, ...]:
        out, *states = (torch.from_numpy(result) for result in results)
        return (out.squeeze(1), *states)

    return Provider(step=lambda: session.run(None, feed), tensors=tensors)


PEER = Peer(
    name="onnxruntime",
    title="ONNX Runtime",
    unavailable=_unavailable,
    version=_version,
    refuses=_refuses,
    prepare=_prepare,
)
