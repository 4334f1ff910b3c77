"""Direct calls of the extension for whole layers: wrong ones raise, others are left to the general way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")


def make_forward() -> dict[str, Any]:
    x, h = torch.randn(5, 4, 6), torch.randn(1, 4, 9)
    weights = [torch.randn(36, 6), torch.randn(36, 9), torch.randn(36), torch.randn(36)]
    return {"cell": "lstm", "input": x, "states": (h, h.clone()), "weights": weights, "keep": True, "threads": 2}


def make_backward() -> dict[str, Any]:
    call = make_forward()
    out, after, tape = _C.layer_forward(**call)
    del call["keep"]
    wanted = {"input_wanted": True, "states_wanted": True, "weights_wanted": True}
    return {**call, "out": out, "tape": tape, "d_out": torch.randn(5, 4, 9), "d_states": after, **wanted}


def replaced(call: dict[str, Any], place: int, weight: Any) -> dict[str, Any]:
    weights = list(call["weights"])
    weights[place] = weight
    return {"weights": weights}


class Subclass(torch.Tensor):
    pass


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "unknown cell": lambda call: {"cell": "lstn"},
    "no threads": lambda call: {"threads": 0},
    "weights for two": lambda call: {"weights": call["weights"] * 2},
    "rows of weight_ih": lambda call: replaced(call, 0, call["weights"][0][:-1]),
    "columns of weight_ih": lambda call: replaced(call, 0, call["weights"][0][:, :-1]),
    "columns of weight_hh": lambda call: replaced(call, 1, call["weights"][1][:, :-1]),
    "1D weight_hh": lambda call: replaced(call, 1, call["weights"][1][:, 0].clone()),
    "dtype of weight_hh": lambda call: replaced(call, 1, call["weights"][1].double()),
    "length of a bias": lambda call: replaced(call, 3, call["weights"][3][:-1]),
    "one state": lambda call: {"states": call["states"][:1]},
    "rows of states": lambda call: {"states": tuple(state[:, :-1].clone() for state in call["states"])},
    "two layers of states": lambda call: {"states": tuple(state.repeat(2, 1, 1) for state in call["states"])},
    "the other sign": lambda call: {"input": torch.complex(call["input"], call["input"]).conj().imag},
}
WRONG_BACKWARD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **WRONG,
    "steps of out": lambda call: {"out": call["out"][:-1]},
    "rows of the tape": lambda call: {"tape": call["tape"][:-1]},
    "blocks of the tape": lambda call: {"tape": call["tape"][..., :-9].contiguous()},
    "no tape": lambda call: {"tape": None},
    "units of d_out": lambda call: {"d_out": call["d_out"][..., :-1].contiguous()},
    "dtype of d_out": lambda call: {"d_out": call["d_out"].double()},
    "one of d_states": lambda call: {"d_states": call["d_states"][:1]},
    "rows of d_states": lambda call: {"d_states": tuple(state[:, :-1].clone() for state in call["d_states"])},
}
OTHER: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "unbatched": lambda call: {"input": call["input"][0]},
    "no rows": lambda call: {"input": call["input"][:, :0]},
    "bfloat16": lambda call: {"input": call["input"].bfloat16()},
    "strided input": lambda call: {"input": call["input"].mT.contiguous().mT},
    "strided states": lambda call: {"states": tuple(state.mT.contiguous().mT for state in call["states"])},
    "strided weight": lambda call: replaced(call, 0, call["weights"][0].t().contiguous().t()),
    "strided bias": lambda call: replaced(call, 2, call["weights"][2].repeat_interleave(2)[::2]),
    "no weight_hh": lambda call: replaced(call, 1, None),
    "a subclass as input": lambda call: {"input": call["input"].as_subclass(Subclass)},
    "a subclass as bias": lambda call: replaced(call, 2, call["weights"][2].as_subclass(Subclass)),
    "a subclass as state": lambda call: {"states": tuple(state.as_subclass(Subclass) for state in call["states"])},
    "no tensor": lambda call: {"input": call["input"].numpy()},
}
OTHER_BACKWARD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **OTHER,
    "expanded d_out": lambda call: {"d_out": call["d_out"][:1].expand(5, -1, -1)},
    "strided out": lambda call: {"out": call["out"].mT.contiguous().mT},
    "a subclass as d_out": lambda call: {"d_out": call["d_out"].as_subclass(Subclass)},
    "out is missing": lambda call: {"out": None},
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


@pytest.mark.parametrize("case", OTHER)
def test_other_forwards_are_left_to_the_general_way(case: str) -> None:
    call = make_forward()
    assert _C.layer_forward(**call | OTHER[case](call)) is None


@pytest.mark.parametrize("case", OTHER_BACKWARD)
def test_other_backwards_are_left_to_the_general_way(case: str) -> None:
    call = make_backward()
    assert _C.layer_backward(**call | OTHER_BACKWARD[case](call)) is None


def test_no_results_of_another_kind_are_written_to() -> None:
    """A mode may make something else of torch's functions than was asked for."""

    class Halves(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            return made[..., : made.shape[-1] // 2] if function is Tensor.new_empty else made

    call, backward = make_forward(), make_backward()
    with Halves():
        assert _C.layer_forward(**call) is None
        assert _C.layer_backward(**backward) is None
