"""Direct calls of the extension: wrong ones raise, and other layouts of memory are read all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fused_rnn.data.cell import Weights

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")


def make_forward() -> dict[str, Any]:
    x, h = torch.randn(5, 4, 6), torch.randn(1, 4, 9)
    weights = [Weights(torch.randn(36, 6), torch.randn(36, 9), torch.randn(36), torch.randn(36))]
    call = {"cell": "lstm", "input": x, "states": (h, h.clone()), "weights": weights, "length": 5, "batch": 4}
    rest = {"batch_sizes": None, "reverse": (False,), "reset": None, "keep": True, "cell_states": False, "step": False}
    return call | rest | {"threads": 2}


def make_backward() -> dict[str, Any]:
    call = make_forward()
    out, after, _, tape = _C.layer_forward(**call)
    del call["keep"], call["cell_states"]
    gradients = {"out": out, "tape": tape, "d_out": torch.randn(5, 4, 9), "d_cells": None, "d_states": after}
    return call | gradients | {"wanted": [True] * 7 + [False], "gates_wanted": False}


def replaced(call: dict[str, Any], place: int, weight: Any) -> dict[str, Any]:
    weights = list(call["weights"][0])
    weights[place] = weight
    return {"weights": [Weights(*weights)]}


class Subclass(torch.Tensor):
    pass


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "unknown cell": lambda call: {"cell": "lstn"},
    "no threads": lambda call: {"threads": 0},
    "weights for two": lambda call: {"weights": call["weights"] * 2},
    "rows of weight_ih": lambda call: replaced(call, 0, call["weights"][0][0][:-1]),
    "columns of weight_ih": lambda call: replaced(call, 0, call["weights"][0][0][:, :-1]),
    "columns of weight_hh": lambda call: replaced(call, 1, call["weights"][0][1][:, :-1]),
    "1D weight_hh": lambda call: replaced(call, 1, call["weights"][0][1][:, 0].clone()),
    "dtype of weight_hh": lambda call: replaced(call, 1, call["weights"][0][1].double()),
    "length of a bias": lambda call: replaced(call, 3, call["weights"][0][3][:-1]),
    "one state": lambda call: {"states": call["states"][:1]},
    "rows of states": lambda call: {"states": tuple(state[:, :-1].clone() for state in call["states"])},
    "two layers of states": lambda call: {"states": tuple(state.repeat(2, 1, 1) for state in call["states"])},
    "no weight_hh": lambda call: replaced(call, 1, None),
    "unbatched": lambda call: {"input": call["input"][0]},
    "no rows": lambda call: {"input": call["input"][:, :0]},
    "bfloat16 input": lambda call: {"input": call["input"].bfloat16()},
    "another length": lambda call: {"length": 4},
    "a step of many": lambda call: {"step": True},
}
WRONG_BACKWARD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **WRONG,
    "steps of out": lambda call: {"out": call["out"][:-1]},
    "rows of the tape": lambda call: {"tape": call["tape"][:-1]},
    "blocks of the tape": lambda call: {"tape": call["tape"][..., :-9].contiguous()},
    "no tape": lambda call: {"tape": None},
    "out is missing": lambda call: {"out": None},
    "units of d_out": lambda call: {"d_out": call["d_out"][..., :-1].contiguous()},
    "dtype of d_out": lambda call: {"d_out": call["d_out"].double()},
    "one of d_states": lambda call: {"d_states": call["d_states"][:1]},
    "rows of d_states": lambda call: {"d_states": tuple(state[:, :-1].clone() for state in call["d_states"])},
}
# With these the memory cannot be read as it is, or is read by the attributes of a class of its own.
OTHER: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "the other sign": lambda call: {"input": torch.complex(call["input"], -call["input"]).conj().imag},
    "strided input": lambda call: {"input": call["input"].mT.contiguous().mT},
    "strided states": lambda call: {"states": tuple(state.mT.contiguous().mT for state in call["states"])},
    "strided weight": lambda call: replaced(call, 0, call["weights"][0][0].t().contiguous().t()),
    "strided bias": lambda call: replaced(call, 2, call["weights"][0][2].repeat_interleave(2)[::2]),
    "a subclass as input": lambda call: {"input": call["input"].as_subclass(Subclass)},
    "a subclass as bias": lambda call: replaced(call, 2, call["weights"][0][2].as_subclass(Subclass)),
    "a subclass as state": lambda call: {"states": tuple(state.as_subclass(Subclass) for state in call["states"])},
}
OTHER_BACKWARD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **OTHER,
    "expanded d_out": lambda call: {"d_out": call["d_out"][:1].expand(5, -1, -1)},
    "strided out": lambda call: {"out": call["out"].mT.contiguous().mT},
    "a subclass as d_out": lambda call: {"d_out": call["d_out"].as_subclass(Subclass)},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_forwards_raise(case: str) -> None:
    call = make_forward()
    assert _C.layer_forward(**call)[0].isfinite().all()
    with pytest.raises(ValueError, match="expected"):
        _C.layer_forward(**call | WRONG[case](call))


@pytest.mark.parametrize("case", WRONG_BACKWARD)
def test_wrong_backwards_raise(case: str) -> None:
    call = make_backward()
    assert _C.layer_backward(**call)[0].isfinite().all()
    with pytest.raises(ValueError, match="expected"):
        _C.layer_backward(**call | WRONG_BACKWARD[case](call))


NO_TENSORS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "input": lambda call: {"input": call["input"].numpy()},
    "states": lambda call: {"states": tuple(state.numpy() for state in call["states"])},
    "weight": lambda call: replaced(call, 1, call["weights"][0][1].tolist()),
    "bias": lambda call: replaced(call, 2, call["weights"][0][2].numpy()),
    "weights": lambda call: {"weights": [3]},
    "reset": lambda call: {"reset": [[True]]},
}


@pytest.mark.parametrize("case", NO_TENSORS)
def test_what_is_no_tensor_raises(case: str) -> None:
    for make, function in ((make_forward, _C.layer_forward), (make_backward, _C.layer_backward)):
        call = make()
        with pytest.raises((AttributeError, TypeError), match=r"has no|not iterable"):
            function(**call | NO_TENSORS[case](call))


@pytest.mark.parametrize("case", OTHER)
def test_other_layouts_are_read(case: str) -> None:
    """As copies of them are."""
    call = make_forward()
    call |= OTHER[case](call)
    for found, expected in zip(
        tree_leaves(_C.layer_forward(**call)), tree_leaves(_C.layer_forward(**plain(call))), strict=True
    ):
        assert found is expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("case", OTHER_BACKWARD)
def test_other_layouts_are_read_by_the_backward(case: str) -> None:
    call = make_backward()
    call |= OTHER_BACKWARD[case](call)
    for found, expected in zip(_C.layer_backward(**call), _C.layer_backward(**plain(call)), strict=True):
        assert found is expected is None or torch.equal(found, expected)


def plain(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with plain contiguous tensors."""

    def copied(leaf: Any) -> Any:
        return leaf.as_subclass(Tensor).resolve_neg().clone().contiguous() if isinstance(leaf, Tensor) else leaf

    return tree_map(copied, call)


def test_no_results_of_another_kind_are_written_to() -> None:
    """Where someone has patched what makes new tensors, nothing is computed."""

    class Halves(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            return made[..., ::2] if function in (Tensor.new_empty_strided, torch.empty_like) else made

    for make, function in ((make_forward, _C.layer_forward), (make_backward, _C.layer_backward)):
        call = make()
        with Halves(), pytest.raises(RuntimeError, match="expected a new tensor"):
            function(**call)
