"""Calls that the C++ extension must refuse, before a kernel runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

from cpp_support import every_other_column, make_backward, make_call, make_step  # noqa: E402 (after the check)

WRONG_FORWARD = {
    "unknown cell": lambda call: {"cell": "lstn"},
    "other cell's weights": lambda call: {"cell": "gru"},
    "too few rows in tape": lambda call: {"tape": call["tape"][:-1]},
    "too many rows in tape": lambda call: {"tape": torch.cat([call["tape"], call["tape"]])},
    "too few columns in tape": lambda call: {"tape": call["tape"][:, :, :-1]},
    "dtype of tape": lambda call: {"tape": call["tape"].double()},
    "integers in tape": lambda call: {"tape": call["tape"].int()},
    "strided columns in tape": lambda call: {"tape": every_other_column(call["tape"])},
    "overlapping rows in tape": lambda call: {
        "tape": call["tape"].as_strided(call["tape"].shape, (1, *call["tape"].stride()[1:]))
    },
    "out within tape": lambda call: {"out": call["tape"][:, :, : call["out"].shape[2]]},
    "shape of out": lambda call: {"out": call["out"][:, :1]},
    "one state missing": lambda call: {"states": call["states"][:1]},
    "states of another batch": lambda call: {"states": [state[:, :-1].clone() for state in call["states"]]},
    "states not contiguous": lambda call: {"states": [every_other_column(state) for state in call["states"]]},
    "dtype of states": lambda call: {"states": [state.double() for state in call["states"]]},
    "shape of bias": lambda call: {"bias": call["bias"][:, :-1]},
    "weights of one direction": lambda call: {"reverse": [False]},
    "no direction": lambda call: {"reverse": []},
    "weights of the backward": lambda call: {"weight_hh": make_backward("lstm")["weight_hh"]},
    "projection in place of W_hh": lambda call: {"weight_hr": call["weight_hh"]},
    "longer": lambda call: {"length": call["length"] + 1},
    "negative length": lambda call: {"length": -1},
    "negative batch": lambda call: {"batch": -1},
    "overflowing sizes": lambda call: {"length": 2**62, "batch": 4},
    "shape of reset": lambda call: {"reset": call["reset"][:-1]},
    "dtype of reset": lambda call: {"reset": call["reset"].to(torch.int8)},
    "batch_sizes alone": lambda call: {"batch_sizes": torch.full((6,), 9)},
    "growing batch_sizes": lambda call: {"batch_sizes": torch.tensor([8, 9, 9, 9, 9, 9]), "offsets": torch.arange(6) * 9},
    "batch_sizes beyond the batch": lambda call: {
        "batch_sizes": torch.tensor([10, 9, 9, 9, 9, 8]),
        "offsets": torch.arange(6) * 9,
    },
    "negative batch_sizes": lambda call: {"batch_sizes": torch.tensor([9, 9, 9, 9, 9, -1]), "offsets": torch.arange(6) * 9},
    "overlapping offsets": lambda call: {"batch_sizes": torch.full((6,), 9), "offsets": torch.arange(6) * 8},
    "offsets beyond the rows": lambda call: {"batch_sizes": torch.full((6,), 9), "offsets": torch.arange(6) * 9 + 1},
    "overflowing offsets": lambda call: {
        "batch_sizes": torch.full((6,), 9),
        "offsets": torch.tensor([0, 9, 18, 27, 36, 2**63 - 1]),
    },
    "int32 batch_sizes": lambda call: {
        "batch_sizes": torch.full((6,), 9, dtype=torch.int32),
        "offsets": torch.arange(6, dtype=torch.int32) * 9,
    },
    "no threads": lambda call: {"threads": 0},
    "unknown sharing": lambda call: {"sharing": "rows"},
}


@pytest.mark.parametrize("case", WRONG_FORWARD)
def test_wrong_forward_calls_raise(case: str) -> None:
    call = make_call("lstm")
    with pytest.raises(ValueError, match=r"expected|overflows"):
        _C.forward(**call | WRONG_FORWARD[case](call))


WRONG_BACKWARD = {
    "rows of d_gates": lambda call: {"d_gates": call["d_gates"][:-1]},
    "columns of d_gates": lambda call: {"d_gates": call["d_gates"][:, :, :-1]},
    "d_gates within tape": lambda call: {"d_gates": call["tape"][:, :, : call["d_gates"].shape[2]]},
    "d_out is d_gates": lambda call: {"d_out": call["d_gates"][:, :, : call["d_out"].shape[2]]},
    "shape of d_out": lambda call: {"d_out": call["d_out"][:-1]},
    "d_cells is d_gates": lambda call: {"d_cells": call["d_gates"][:, :, : call["d_cells"].shape[2]]},
    "rows of d_cells": lambda call: {"d_cells": call["d_cells"][:-1]},
    "columns of d_cells": lambda call: {"d_cells": call["d_cells"][:, :, :-1]},
    "dtype of d_cells": lambda call: {"d_cells": call["d_cells"].double()},
    "strided columns of d_cells": lambda call: {"d_cells": every_other_column(call["d_cells"])},
    "d_states are states_0": lambda call: {"d_states": call["states_0"]},
    "shape of states_0": lambda call: {"states_0": [state[:, :, :-1].clone() for state in call["states_0"]]},
    "steps out of order": lambda call: {"t_begin": 3, "t_end": 2},
    "steps beyond the last": lambda call: {"t_end": call["length"] + 1},
    "steps before the first": lambda call: {"t_begin": -1},
    "rows of fewer steps": lambda call: {"t_begin": 1},
    "weights of the forward": lambda call: {"weight_hh": make_call("lstm")["weight_hh"]},
}


@pytest.mark.parametrize("case", WRONG_BACKWARD)
def test_wrong_backward_calls_raise(case: str) -> None:
    call = make_backward("lstm")
    with pytest.raises(ValueError, match="expected"):
        _C.backward(**call | WRONG_BACKWARD[case](call))


def test_gradient_of_c_of_a_cell_without_raises() -> None:
    call = make_backward("gru")
    with pytest.raises(ValueError, match="d_cells: expected None for a cell without c"):
        _C.backward(**call | {"d_cells": call["d_out"]})


@pytest.mark.parametrize(
    "weights",
    [
        [],
        [torch.zeros(8, 2), torch.zeros(8, 3)],
        [torch.zeros(8)],
        [torch.zeros(7, 2)],
        [torch.zeros(8, 2, dtype=torch.int64)],
        [torch.zeros(8, 4)[:, ::2]],
        [torch.zeros(0, 0)],
        [torch.zeros(8, 2), torch.zeros(8, 2, dtype=torch.float64)],
    ],
    ids=["none", "two shapes", "1D", "rows", "integers", "strides", "empty", "two dtypes"],
)
def test_wrong_weights_raise(weights: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="expected"):
        _C.Packed("lstm", weights, False, "hidden", False, 1)


def test_wrong_projections_raise() -> None:
    x, w, out = torch.ones(2, 5), torch.ones(7, 5), torch.empty(2, 7)
    for wrong in [(x[:, :4], w, out), (x, w, out[:1]), (x.double(), w, out), (x[0], w, out)]:
        with pytest.raises(ValueError, match="expected"):
            _C.project(*wrong, 1)
    with pytest.raises(ValueError, match="expected"):
        _C.project(x, w, every_other_column(out), 1)
    with pytest.raises(ValueError, match="expected"):
        _C.project(w, w, w[:, :7], 1)
    with pytest.raises(ValueError, match="expected"):
        _C.project(x, w, out, 0)


def with_weight(call: dict[str, Any], place: int, weight: Any) -> dict[str, Any]:
    return {"weights": [weight if i == place else other for i, other in enumerate(call["weights"])]}


WRONG_STEP: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "unknown cell": lambda call: {"cell": "lstn"},
    "features": lambda call: {"input": call["input"][..., :-1].clone()},
    "dtype of input": lambda call: {"input": call["input"].double()},
    "2D states": lambda call: {"states": tuple(state[0] for state in call["states"])},
    "rows of states": lambda call: {"states": tuple(state[:, :-1].clone() for state in call["states"])},
    "layers of states": lambda call: {"states": tuple(state[:1].clone() for state in call["states"])},
    "units of c": lambda call: {"states": (call["states"][0], call["states"][1][..., :-1].clone())},
    "one state": lambda call: {"states": call["states"][:1]},
    "no units": lambda call: {"states": tuple(state[..., :0].clone() for state in call["states"])},
    "no weights": lambda call: {"weights": []},
    "half a layer": lambda call: {"weights": call["weights"][:6]},
    "rows of weight_ih": lambda call: with_weight(call, 0, call["weights"][0][:-1]),
    "columns of weight_hh": lambda call: with_weight(call, 1, call["weights"][1][:, :-1]),
    "columns of the second weight_ih": lambda call: with_weight(call, 4, call["weights"][0]),
    "dtype of weight_hh": lambda call: with_weight(call, 1, call["weights"][1].double()),
    "1D weight_ih": lambda call: with_weight(call, 0, call["weights"][0][:, 0].clone()),
    "length of bias": lambda call: with_weight(call, 7, call["weights"][7][:-1]),
    "the other sign": lambda call: {"input": torch.complex(call["input"], call["input"]).conj().imag},
    "no threads": lambda call: {"threads": 0},
}


@pytest.mark.parametrize("case", WRONG_STEP)
def test_wrong_steps_raise(case: str) -> None:
    call = make_step("lstm")
    assert _C.step(**call)[0].isfinite().all()
    with pytest.raises(ValueError, match="expected"):
        _C.step(**call | WRONG_STEP[case](call))


class Subclass(torch.Tensor):
    pass


OTHER_STEP: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "two steps": lambda call: {"input": call["input"].expand(2, -1, -1)},
    "unbatched input": lambda call: {"input": call["input"][0]},
    "many rows": lambda call: {"input": torch.zeros(1, 9, 21)},
    "no rows": lambda call: {"input": torch.zeros(1, 0, 21)},
    "bfloat16": lambda call: {"input": call["input"].bfloat16()},
    "strided input": lambda call: {"input": every_other_column(call["input"][0])[None]},
    "strided states": lambda call: {"states": tuple(state.mT.contiguous().mT for state in call["states"])},
    "strided weight": lambda call: with_weight(call, 1, every_other_column(call["weights"][1])),
    "strided bias": lambda call: with_weight(call, 2, call["weights"][2].repeat_interleave(2)[::2]),
    "a weight that is missing": lambda call: with_weight(call, 5, None),
    "a subclass as input": lambda call: {"input": call["input"].as_subclass(Subclass)},
    "a subclass as weight": lambda call: with_weight(call, 4, call["weights"][4].as_subclass(Subclass)),
    "no tensor": lambda call: {"input": call["input"].numpy()},
}


@pytest.mark.parametrize("case", OTHER_STEP)
def test_steps_of_another_kind_are_left_to_others(case: str) -> None:
    call = make_step("lstm")
    assert _C.step(**call | OTHER_STEP[case](call)) is None


def test_unknown_instruction_set_raises() -> None:
    with pytest.raises(ValueError, match=rf"isa: expected .*{_C.isas()[-1]}, got sse9"):
        _C.set_isa("sse9")


def test_what_is_no_tensor_in_cpu_memory_raises() -> None:
    x, w, out = torch.ones(2, 5), torch.ones(7, 5), torch.empty(2, 7)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.project(x.numpy(), w, out, 1)
    with pytest.raises(ValueError, match="expected a tensor on the CPU"):
        _C.project(x.to("meta"), w, out, 1)
    with pytest.raises(ValueError, match="other sign"):
        _C.project(torch.complex(x, x).conj().imag, w, out, 1)
    with pytest.raises(ValueError, match="at most 3 dimensions"):
        _C.project(x[None, None], w, out, 1)
    with pytest.raises(ValueError, match=r"expected torch\.float32, got another"):
        _C.project(x, w.to(torch.int32), out, 1)
    freed = w.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="expected a tensor with memory of its own"):
        _C.project(x, freed, out, 1)
    _C.project(x, w, out, 1)
    assert out.eq(5).all()


def test_tensors_of_other_classes_are_read_by_their_attributes() -> None:
    x, w, out = torch.randn(3, 6)[:, ::1], torch.randn(5, 9)[:, 2:8], torch.empty(3, 5)
    _C.project(x.as_subclass(Subclass), w.as_subclass(Subclass), out.as_subclass(Subclass), 1)
    torch.testing.assert_close(out, x @ w.t())


def test_without_the_table_of_dlpack() -> None:
    """As with a torch that is too old for it: the same values, bit for bit."""
    program = """if True:
        import hashlib, sys, torch
        if sys.argv[1] == "without":
            torch.Tensor.__dlpack_c_exchange_api__ = None
        import fused_rnn
        torch.manual_seed(0)
        torch.set_num_threads(1)
        digest = hashlib.sha256()
        for dtype in (torch.float32, torch.float64):
            rnn = fused_rnn.GRU(5, 19, 2, dtype=dtype)
            x = torch.randn(7, 3, 5, dtype=dtype, requires_grad=True)
            reset = torch.rand(7, 3) < 0.3
            out, h = rnn(x, reset=reset)
            out.square().sum().backward()
            with torch.no_grad():
                results = [out, h, x.grad, *(p.grad for p in rnn.parameters()), *rnn(x[:1], h)]
            for result in results:
                digest.update(result.detach().numpy().tobytes())
        print(digest.hexdigest())
    """
    printed = {
        subprocess.run([sys.executable, "-c", program, case], capture_output=True, text=True, check=True, timeout=120).stdout
        for case in ("with", "without")
    }
    assert len(printed) == 1
    assert len(printed.pop()) == 65
