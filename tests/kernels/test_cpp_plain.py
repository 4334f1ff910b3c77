"""The short way of a call without a graph: what it takes, what it leaves to the others, and what its results are like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rnn

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")

from cpp_support import CELLS, Subclass, make_forward, make_step, negated  # noqa: E402 (after the check)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make(cell: str, step: bool, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of ``layer_forward``, and those of ``plain_forward`` for the same."""
    if step:
        call = make_step(cell, dtype)
    else:
        call = make_forward(cell, dtype, reverse=(False,), reset=False, **options) | {"keep": False, "cell_states": False}
    plain = {name: call[name] for name in ("cell", "input", "states", "step", "threads")} | {"weights": call["weights"][0]}
    return call, plain


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits(cell: str, step: bool, dtype: torch.dtype) -> None:
    call, plain = make(cell, step, dtype)
    for states in (call["states"], None):
        out, after, _, _ = _C.layer_forward(**call | {"states": states})
        found, found_after = _C.plain_forward(**plain | {"states": states})
        for one, other in zip((found, *found_after), (out, *after), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


@pytest.mark.parametrize("projection", [None, 11])
def test_batch_first_and_projections(projection: int | None) -> None:
    call, plain = make("lstm", False, projection=projection)
    out, after, _, _ = _C.layer_forward(**call)
    found, found_after = _C.plain_forward(**plain, batch_first=True)
    assert found.shape == out.transpose(0, 1).shape
    assert not found._is_view()
    for one, other in zip((found.transpose(0, 1), *found_after), (out, *after), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("place", ["input", "state", "weight"])
def test_what_is_of_a_class_of_its_own_is_left_to_others(place: str) -> None:
    _, plain = make("gru", False)
    other = {
        "input": lambda: {"input": plain["input"].as_subclass(Subclass)},
        "state": lambda: {"states": (plain["states"][0].as_subclass(Subclass),)},
        "weight": lambda: {"weights": plain["weights"]._replace(bias_hh=plain["weights"].bias_hh.as_subclass(Subclass))},
    }
    assert _C.plain_forward(**plain) is not None
    assert _C.plain_forward(**plain | other[place]()) is None


@pytest.mark.parametrize("step", [False, True])
def test_the_other_sign(step: bool) -> None:
    _, plain = make("lstm", step)
    other = {"input": negated(plain["input"]), "states": tuple(negated(state) for state in plain["states"])}
    weights = type(plain["weights"])(*(None if each is None else negated(each) for each in plain["weights"]))
    (out, after), (found, found_after) = _C.plain_forward(**plain), _C.plain_forward(**plain | other | {"weights": weights})
    assert all(torch.equal(one, other) for one, other in zip((found, *found_after), (out, *after), strict=True))


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "2D input": (lambda call: {"input": call["input"][0]}, "input: expected 3 dimensions"),
    "no steps": (lambda call: {"input": call["input"][:0]}, "length: expected 1 or more"),
    "features": (lambda call: {"input": call["input"][..., :-1]}, "weight_ih: expected"),
    "dtype": (lambda call: {"input": call["input"].double()}, "weight_ih: expected"),
    "units": (lambda call: {"states": tuple(state[..., :-1] for state in call["states"])}, "states: expected"),
    "a state is missing": (lambda call: {"states": call["states"][:1]}, "states: expected 2"),
    "four weights": (lambda call: {"weights": call["weights"][:4]}, "weights: expected"),
    "no weight_ih": (lambda call: {"weights": call["weights"]._replace(ih=None)}, "weights: expected"),
    "threads": (lambda call: {"threads": 0}, "threads: expected 1 or more"),
    "a layer as a step": (lambda call: {"step": True}, "input: expected 2 dimensions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_raise(case: str) -> None:
    _, plain = make("lstm", False)
    change, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        _C.plain_forward(**plain | change(plain))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_with_and_without_a_graph(name: str) -> None:
    """The modules give the same bits and strides either way, also where an operand has odd strides on an axis of one index."""
    module = getattr(fused_rnn, name)(8, 8)
    shape = (1, 8) if "Cell" in name else (1, 1, 8)
    x = torch.randn(shape)
    for input in (x, x.as_strided(shape, (3,) * (len(shape) - 1) + (1,))):

        def flat(value: Any) -> list[Tensor]:
            return [value] if isinstance(value, Tensor) else [each for part in value for each in flat(part)]

        recorded = flat(module(input))
        assert all(each.requires_grad for each in recorded)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = flat(module(input))
            for one, other in zip(found, recorded, strict=True):
                assert torch.equal(one, other.detach())
                assert one.stride() == other.stride() == torch.empty(one.shape).stride()
                assert one.is_inference() is (mode is torch.inference_mode)
                assert not one.requires_grad
            # Each has memory of its own.
            assert len({each.untyped_storage().data_ptr() for each in found}) == len(found)


def test_small_blocks_begin_on_a_cache_line() -> None:
    blocks = [torch.frombuffer(_C.Memory(size), dtype=torch.uint8) for size in (1, 63, 64, 100, 1000, 5000, (256 << 10) - 64)]
    for block in blocks:
        assert block.data_ptr() % 64 == 0
        block.fill_(7)
    assert all(int(block.sum()) == 7 * len(block) for block in blocks)
