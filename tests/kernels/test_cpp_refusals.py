"""Calls that the C++ extension must refuse, before a kernel runs, and what it reads all the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

from cpp_support import (  # noqa: E402 (after the check for what it imports)
    CELLS,
    Call,
    Subclass,
    backward_results,
    every_other_column,
    forward_results,
    make_backward,
    make_forward,
    make_step,
    negated,
    with_weight,
)

Change = Callable[[Call], dict[str, Any]]


def sizes(*values: int, dtype: torch.dtype = torch.int64) -> Change:
    """The rows of a packed batch with these sizes, whatever the sizes say."""
    return lambda call: {"input": call["input"].flatten(0, 1), "batch_sizes": torch.tensor(values, dtype=dtype)}


# What is changed, and whose name the error begins with.
WRONG_FORWARD: dict[str, tuple[Change, str]] = {
    "unknown cell": (lambda call: {"cell": "lstn"}, "cell"),
    "other cell's weights": (lambda call: {"cell": "gru"}, "weight_hh"),
    "too few steps in input": (lambda call: {"input": call["input"][:-1]}, "input"),
    "too many steps in input": (lambda call: {"input": torch.cat([call["input"]] * 2)}, "input"),
    "other batch in input": (lambda call: {"input": call["input"][:, :-1]}, "input"),
    "too few features": (lambda call: {"input": call["input"][..., :-1]}, "weight_ih"),
    "too few rows in input": (lambda call: {"input": call["input"].flatten(0, 1)[:-1]}, "input"),
    "dtype of input": (lambda call: {"input": call["input"].double()}, "weight_ih"),
    "integers in input": (lambda call: {"input": call["input"].int()}, "input"),
    "integers of 64 bits in input": (lambda call: {"input": call["input"].long()}, "input"),
    "booleans in input": (lambda call: {"input": call["input"] > 0}, "input"),
    "1D input": (lambda call: {"input": call["input"].flatten()}, "input"),
    "one state missing": (lambda call: {"states": call["states"][:1]}, "states"),
    "one state None": (lambda call: {"states": (call["states"][0], None)}, "states"),
    "states of another batch": (lambda call: {"states": [state[:, :-1] for state in call["states"]]}, "states"),
    "states of one recurrence": (lambda call: {"states": [state[:1] for state in call["states"]]}, "states"),
    "2D states": (lambda call: {"states": [state[0] for state in call["states"]]}, "states"),
    "units of c": (lambda call: {"states": (call["states"][0], call["states"][1][..., :-1])}, "states"),
    "dtype of states": (lambda call: {"states": [state.double() for state in call["states"]]}, "states"),
    "weights of one recurrence": (lambda call: {"weights": call["weights"][:1]}, "weights"),
    "no weights": (lambda call: {"weights": []}, "weights"),
    "weights that are too few": (lambda call: {"weights": [weights[:4] for weights in call["weights"]]}, "weights"),
    "no weight_ih": (lambda call: with_weight(call, "ih", None), "weights"),
    "rows of weight_ih": (lambda call: with_weight(call, "ih", call["weights"][0].ih[:-1]), "weight_ih"),
    "columns of the second weight_ih": (lambda call: with_weight(call, "ih", call["weights"][0].hh, 1), "weight_ih"),
    "columns of weight_hh": (lambda call: with_weight(call, "hh", call["weights"][0].hh[:, :-1]), "weight_hr"),
    "columns of the second weight_hh": (lambda call: with_weight(call, "hh", call["weights"][0].hh[:, :-1], 1), "weight_hh"),
    "rows of weight_hh": (lambda call: with_weight(call, "hh", call["weights"][0].hh[:-1]), "weight_hh"),
    "dtype of weight_hh": (lambda call: with_weight(call, "hh", call["weights"][0].hh.double()), "weight_hh"),
    "1D weight_hh": (lambda call: with_weight(call, "hh", call["weights"][0].hh[:, 0]), "weight_hh"),
    "1D weight_ih": (lambda call: with_weight(call, "ih", call["weights"][0].ih[:, 0]), "weight_ih"),
    "no units": (lambda call: with_weight(call, "hh", torch.zeros(0, 0)), "weight_hh"),
    "no columns": (lambda call: with_weight(call, "hh", torch.zeros(148, 0)), "weight_h"),
    "length of bias_ih": (lambda call: with_weight(call, "bias_ih", call["weights"][0].bias_ih[:-1]), "bias_ih"),
    "length of bias_hh": (lambda call: with_weight(call, "bias_hh", call["weights"][1].bias_hh[:-1], 1), "bias_hh"),
    "2D bias": (lambda call: with_weight(call, "bias_hh", call["weights"][0].bias_hh[None]), "bias_hh"),
    "dtype of bias": (lambda call: with_weight(call, "bias_hh", call["weights"][0].bias_hh.half()), "bias_hh"),
    "projection of one recurrence": (lambda call: with_weight(call, "hr", torch.zeros(37, 37)), "weight_hr"),
    "projection of the other": (lambda call: with_weight(call, "hr", torch.zeros(37, 37), 1), "weight_hr"),
    "columns of weight_hr": (lambda call: with_weight(call, "hr", torch.zeros(37, 36)), "weight_hr"),
    "one flag of reverse": (lambda call: {"reverse": [False]}, "weights"),
    "no recurrence": (lambda call: {"reverse": []}, "reverse"),
    "longer": (lambda call: {"length": call["length"] + 1}, "input"),
    "no length": (lambda call: {"length": 0}, "length"),
    "negative length": (lambda call: {"length": -1}, "length"),
    "negative batch": (lambda call: {"batch": -1}, "batch"),
    "overflowing sizes": (lambda call: {"length": 2**62, "batch": 4}, "length"),
    "reset of one recurrence": (lambda call: {"reset": call["reset"][:1]}, "reset"),
    "rows of reset": (lambda call: {"reset": call["reset"][:, :-1]}, "reset"),
    "1D reset": (lambda call: {"reset": call["reset"][0]}, "reset"),
    "dtype of reset": (lambda call: {"reset": call["reset"].to(torch.int8)}, "reset"),
    "batch_sizes of a dense input": (lambda call: {"batch_sizes": torch.full((6,), 9)}, "input"),
    "fewer batch_sizes": (sizes(9, 9, 9, 9, 9), "batch_sizes"),
    "growing batch_sizes": (sizes(8, 9, 9, 9, 9, 9), r"batch_sizes\[1\]"),
    "batch_sizes beyond the batch": (sizes(10, 9, 9, 9, 9, 8), r"batch_sizes\[0\]"),
    "negative batch_sizes": (sizes(9, 9, 9, 9, 9, -1), r"batch_sizes\[5\]"),
    "batch_sizes for fewer rows": (sizes(9, 9, 9, 9, 9, 8), "input"),
    "int32 batch_sizes": (sizes(*[9] * 6, dtype=torch.int32), "batch_sizes"),
    "no threads": (lambda call: {"threads": 0}, "threads"),
    "unknown sharing": (lambda call: {"sharing": "rows"}, "sharing"),
    "states of a layer for a step": (lambda call: {"step": True}, "states"),
}


@pytest.mark.parametrize("case", WRONG_FORWARD)
def test_wrong_forward_calls_raise(case: str) -> None:
    change, name = WRONG_FORWARD[case]
    call = make_forward("lstm")
    with pytest.raises(ValueError, match=rf"^{name}.*(expected|overflows)"):
        _C.layer_forward(**call | change(call))


def test_overflowing_batch_sizes_raise() -> None:
    call = make_forward("gru", reset=False) | {"batch": 2**62, "states": None, "length": 3}
    call |= {"input": call["input"].flatten(0, 1), "batch_sizes": torch.full((3,), 2**62)}
    with pytest.raises(ValueError, match="the sum of batch_sizes overflows"):
        _C.layer_forward(**call)


WRONG_BACKWARD: dict[str, tuple[Change, str]] = {
    "rows of out": (lambda call: {"out": call["out"][:-1]}, "out"),
    "columns of out": (lambda call: {"out": call["out"][..., :-1]}, "out"),
    "no out": (lambda call: {"out": None}, "out"),
    "dtype of out": (lambda call: {"out": call["out"].double()}, "out"),
    "no tape": (lambda call: {"tape": None}, "tape"),
    "rows of tape": (lambda call: {"tape": call["tape"][:-1]}, "tape"),
    "columns of tape": (lambda call: {"tape": call["tape"][..., :-1]}, "tape"),
    "recurrences of tape": (lambda call: {"tape": call["tape"][:, :1]}, "tape"),
    "dtype of tape": (lambda call: {"tape": call["tape"].double()}, "tape"),
    "shape of d_out": (lambda call: {"d_out": call["d_out"][:-1]}, "d_out"),
    "rows of d_cells": (lambda call: {"d_cells": call["d_cells"][:-1]}, "d_cells"),
    "columns of d_cells": (lambda call: {"d_cells": call["d_cells"][..., :-1]}, "d_cells"),
    "dtype of d_cells": (lambda call: {"d_cells": call["d_cells"].double()}, "d_cells"),
    "one of d_states": (lambda call: {"d_states": call["d_states"][:1]}, "d_states"),
    "shape of d_states": (lambda call: {"d_states": [state[..., :-1] for state in call["d_states"]]}, "d_states"),
    "dtype of d_states": (lambda call: {"d_states": [state.double() for state in call["d_states"]]}, "d_states"),
    "shape of states": (lambda call: {"states": [state[..., :-1] for state in call["states"]]}, "states"),
    "fewer wanted": (lambda call: {"wanted": call["wanted"][:-1]}, "wanted"),
    "more wanted": (lambda call: {"wanted": [*call["wanted"], True]}, "wanted"),
    "rows of input": (lambda call: {"input": call["input"][:-1]}, "input"),
    "no threads": (lambda call: {"threads": 0}, "threads"),
}


@pytest.mark.parametrize("case", WRONG_BACKWARD)
def test_wrong_backward_calls_raise(case: str) -> None:
    change, name = WRONG_BACKWARD[case]
    call = make_backward("lstm")
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        _C.layer_backward(**call | change(call))


def test_c_of_a_cell_without_raises() -> None:
    forward = make_forward("gru")
    with pytest.raises(ValueError, match="cell_states: expected False for a cell without c"):
        _C.layer_forward(**forward | {"cell_states": True})
    call = make_backward(forward)
    with pytest.raises(ValueError, match="d_cells: expected None for a cell without c"):
        _C.layer_backward(**call | {"d_cells": call["d_out"]})
    with pytest.raises(ValueError, match="weight_hr: expected None for this cell"):
        _C.layer_forward(**forward | with_weight(forward, "hr", torch.zeros(37, 37)))


def test_tape_of_a_cell_without_raises() -> None:
    call = make_backward("rnn_tanh")
    assert call["tape"] is None
    with pytest.raises(ValueError, match="tape: expected None if it is the output"):
        _C.layer_backward(**call | {"tape": call["out"]})


WRONG_STEP: dict[str, tuple[Change, str]] = {
    "features": (lambda call: {"input": call["input"][:, :-1]}, "weight_ih"),
    "rows of input": (lambda call: {"input": call["input"][:-1]}, "input"),
    "a step and a batch": (lambda call: {"input": call["input"][None]}, "step"),
    "two steps": (lambda call: {"input": call["input"].repeat(2, 1), "length": 2}, "step"),
    "two recurrences": (lambda call: {"weights": call["weights"] * 2, "reverse": [False, True]}, "step"),
    "3D states": (lambda call: {"states": [state[None] for state in call["states"]]}, "states"),
    "rows of states": (lambda call: {"states": [state[:-1] for state in call["states"]]}, "states"),
    "units of c": (lambda call: {"states": (call["states"][0], call["states"][1][:, :-1])}, "states"),
    "a projection": (lambda call: with_weight(call, "hr", torch.zeros(37, 37)), "step"),
}


@pytest.mark.parametrize("case", WRONG_STEP)
def test_wrong_steps_raise(case: str) -> None:
    change, name = WRONG_STEP[case]
    call = make_step("lstm")
    assert _C.layer_forward(**call)[0].isfinite().all()
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        _C.layer_forward(**call | change(call))


def test_gradients_of_h_after_a_step_raise() -> None:
    """The gradient of h is that of the output."""
    call = make_backward(make_step("lstm"))
    assert len(call["d_states"]) == 1
    with pytest.raises(ValueError, match="d_states: expected 1"):
        _C.layer_backward(**call | {"d_states": (call["d_out"], *call["d_states"])})


def test_unknown_instruction_set_raises() -> None:
    with pytest.raises(ValueError, match=rf"isa: expected .*{_C.isas()[-1]}, got sse9"):
        _C.set_isa("sse9")


def test_what_is_no_tensor_in_cpu_memory_raises() -> None:
    call = make_forward("gru")
    x = call["input"]
    with pytest.raises((AttributeError, TypeError)):
        _C.layer_forward(**call | {"input": x.numpy()})
    with pytest.raises((AttributeError, TypeError)):
        _C.layer_forward(**call | {"input": None})
    with pytest.raises(ValueError, match="expected a tensor on the CPU"):
        _C.layer_forward(**call | {"input": x.to("meta")})
    with pytest.raises(ValueError, match="at most 3 dimensions"):
        _C.layer_forward(**call | {"input": x[None, None]})
    freed = call["weights"][0].ih.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="expected a tensor with memory of its own"):
        _C.layer_forward(**call | with_weight(call, "ih", freed))


def other_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with a gap after each row, and the next one out of alignment."""
    return torch.nn.functional.pad(tensor, (1, 2), value=float("nan"))[..., 1:-2]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every other column": every_other_column,
    "wider rows": other_rows,
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "other sign": negated,
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
    "parameter": lambda tensor: torch.nn.Parameter(tensor),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["layer", "packed", "projected", "step"])
def test_any_layout_is_read(cell: str, layout: str, kind: str) -> None:
    """Every operand and every gradient in the layout gives the same bits as all of them contiguous."""
    arrange = LAYOUTS[layout]

    def arranged(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return arrange(value) if value.is_floating_point() else value
        if isinstance(value, list | tuple) and value and not isinstance(value[0], bool):
            parts = [arranged(each) for each in value]
            return type(value)(*parts) if hasattr(value, "_fields") else parts
        return value

    if kind == "step":
        forward = make_step(cell)
    elif kind == "packed":
        forward = make_forward(cell, batch_sizes=torch.tensor([8, 8, 5, 2, 1, 1]))
    else:
        forward = make_forward(cell, projection=11 if kind == "projected" and CELLS[cell].projected is not None else None)
    backward = make_backward(forward)
    for call, results in ((forward, forward_results), (backward, backward_results)):
        for actual, expected in zip(results({name: arranged(each) for name, each in call.items()}), results(call), strict=True):
            assert torch.equal(actual, expected)


def test_strided_flags_and_sizes_are_read() -> None:
    call = make_forward("lstm", batch_sizes=torch.tensor([8, 8, 5, 2, 1, 1]))
    strided = {name: call[name].repeat_interleave(2, -1)[..., ::2] for name in ("reset", "batch_sizes")}
    for actual, expected in zip(forward_results(call | strided), forward_results(call), strict=True):
        assert torch.equal(actual, expected)


def test_expanded_operands_are_read() -> None:
    """States and a gradient that are one number, a weight that is one row."""
    forward = make_forward("lstm")
    row = forward["weights"][0].ih[:1].expand(148, -1)
    ones = {"states": [torch.ones(1).expand(state.shape) for state in forward["states"]]} | with_weight(forward, "ih", row)
    plain = {"states": [torch.ones(state.shape) for state in forward["states"]]} | with_weight(forward, "ih", row.clone())
    for actual, expected in zip(forward_results(forward | ones), forward_results(forward | plain), strict=True):
        assert torch.equal(actual, expected)
    backward = make_backward(forward)
    one, whole = ({"d_out": torch.ones(1).expand(backward["out"].shape)}, {"d_out": torch.ones(backward["out"].shape)})
    for actual, expected in zip(backward_results(backward | one), backward_results(backward | whole), strict=True):
        assert torch.equal(actual, expected)


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
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            rnn = fused_rnn.GRU(5, 19, 2, dtype=dtype)
            x = torch.randn(7, 3, 5, dtype=dtype, requires_grad=True)
            reset = torch.rand(7, 3) < 0.3
            out, h = rnn(x, reset=reset)
            out.square().sum().backward()
            with torch.no_grad():
                results = [out, h, x.grad, *(p.grad for p in rnn.parameters()), *rnn(x[:1], h)]
            for result in results:
                digest.update(result.detach().double().numpy().tobytes())
        print(digest.hexdigest())
    """
    printed = {
        subprocess.run([sys.executable, "-c", program, case], capture_output=True, text=True, check=True, timeout=120).stdout
        for case in ("with", "without")
    }
    assert len(printed) == 1
    assert len(printed.pop()) == 65
