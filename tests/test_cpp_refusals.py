"""Calls that the C++ extension must refuse, before a kernel runs."""

from __future__ import annotations

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


WRONG_STEP = {
    "unknown cell": lambda call: {"cell": "lstn"},
    "features": lambda call: {"input": call["input"][:, :-1]},
    "dtype of input": lambda call: {"input": call["input"].double()},
    "1D input": lambda call: {"input": call["input"][0]},
    "2D states": lambda call: {"states": [state[0] for state in call["states"]]},
    "rows of states": lambda call: {"states": [state[:, :-1].clone() for state in call["states"]]},
    "one state": lambda call: {"states": call["states"][:1]},
    "states in place": lambda call: {"new_states": call["states"]},
    "out is a state": lambda call: {"out": call["new_states"][0]},
    "rows of weight_ih": lambda call: {"weight_ih": call["weight_ih"][:-1]},
    "columns of weight_hh": lambda call: {"weight_hh": call["weight_hh"][:, :-1]},
    "strides of weight_hh": lambda call: {"weight_hh": every_other_column(call["weight_hh"])},
    "length of bias": lambda call: {"bias_hh": call["bias_hh"][:-1]},
    "no threads": lambda call: {"threads": 0},
}


@pytest.mark.parametrize("case", WRONG_STEP)
def test_wrong_steps_raise(case: str) -> None:
    call = make_step("lstm")
    _C.step(**call)
    assert call["out"].isfinite().all()
    with pytest.raises(ValueError, match="expected"):
        _C.step(**call | WRONG_STEP[case](call))


def test_unknown_instruction_set_raises() -> None:
    with pytest.raises(ValueError, match=r"isa: expected .*baseline, got sse9"):
        _C.set_isa("sse9")


def test_what_is_no_tensor_in_cpu_memory_raises() -> None:
    call = make_step("gru")
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.step(**call | {"input": call["input"].numpy()})
    with pytest.raises(ValueError, match="expected a tensor on the CPU"):
        _C.step(**call | {"input": call["input"].to("meta")})
    freed = call["weight_hh"].clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="expected a tensor with memory of its own"):
        _C.step(**call | {"weight_hh": freed})
    with pytest.raises(ValueError, match="at most 3 dimensions"):
        _C.step(**call | {"input": call["input"][None, None]})
