"""Single steps of layers, as in text generation and an agent's rollout: one call of the extension, whatever surrounds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close_to_reference
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fused_rnn

_C = pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each forward of the extension had so far."""
    rows: list[int] = []

    def watch(name: str) -> None:
        forward = getattr(_C, name)

        def watched(cell: str, input: torch.Tensor, *rest: Any) -> Any:
            rows.append(input.numel() // input.shape[-1])
            return forward(cell, input, *rest)

        monkeypatch.setattr(_C, name, watched)

    watch("layer_forward")
    watch("plain_forward")
    return rows


def pair(name: str, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(5, 19, **options).eval()
    ours = getattr(fused_rnn, name)(5, 19, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tensors(results: Any) -> list[torch.Tensor]:
    out, states = results
    return [out, *(states if isinstance(states, tuple) else (states,))]


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_torch(calls: list[int], name: str, layers: int, batch_first: bool, batch: int, dtype: torch.dtype) -> None:
    ours, theirs = pair(name, num_layers=layers, batch_first=batch_first, dtype=dtype)
    exact = pair(name, num_layers=layers, batch_first=batch_first, dtype=torch.float64)[1]
    exact.load_state_dict(theirs.state_dict())
    mine = wanted = true = None
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(batch, 1, 5, dtype=dtype) if batch_first else torch.randn(1, batch, 5, dtype=dtype)
            found, expected, reference = ours(x, mine), theirs(x, wanted), exact(x.double(), true)
            mine, wanted, true = found[1], expected[1], reference[1]
            for actual, other, best in zip(tensors(found), tensors(expected), tensors(reference), strict=True):
                assert actual.shape == other.shape
                assert_close_to_reference(actual, other, best)
    assert calls == [batch] * 5 * layers


OTHERWISE: dict[str, Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], Any]] = {
    "gradients": lambda module, x, h: torch.enable_grad()(module)(x, h),
    "two steps": lambda module, x, h: module(torch.cat((x, x)), h),
    "unbatched": lambda module, x, h: module(x[:, 0], h[:, 0]),
    "many rows": lambda module, x, h: module(x.expand(1, 9, 5), h.expand(1, 9, 19)),
    "lengths": lambda module, x, h: module(x, h, lengths=torch.tensor([1])),
    "reset": lambda module, x, h: module(x, h, reset=torch.tensor([[False]])),
    "packed": lambda module, x, h: module(torch.nn.utils.rnn.pack_sequence([x[0]]), h),
    "another backend": lambda module, x, h: fused_rnn.backend("reference")(module)(x, h),
    "autocast": lambda module, x, h: torch.autocast("cpu")(module)(x, h),
    "no rows": lambda module, x, h: module(x[:, :0], h[:, :0].contiguous()),
    "compiled": lambda module, x, h: torch.compile(module, backend="eager", fullgraph=True)(x, h),
    "vmap": lambda module, x, h: torch.vmap(lambda one: module(one, h)[0])(x[None]),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_other_calls_of_a_layer_that_steps(case: str) -> None:
    """Whatever surrounds the step: the results are those of plain torch."""
    ours, _ = pair("GRU")
    x, h = torch.randn(1, 1, 5), torch.randn(1, 1, 19)
    with torch.no_grad():
        found = OTHERWISE[case](ours, x, h)
        with fused_rnn.backend("reference"):
            expected = OTHERWISE[case](ours, x, h)
    for actual, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(actual, other)


@pytest.mark.parametrize(
    "module",
    [{"bidirectional": True}, {"num_layers": 2, "dropout": 0.5}, {"proj_size": 3}],
    ids=lambda options: next(iter(options)),
)
def test_other_modules(calls: list[int], module: dict[str, Any]) -> None:
    ours, theirs = pair("LSTM", **module)
    x, found = torch.randn(1, 2, 5), []
    for one in (ours, theirs):
        one.train()
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(tensors(one(x, one(x)[1])))
    for actual, other in zip(*found, strict=True):
        torch.testing.assert_close(actual, other)
    assert calls == [2] * 2 * ours.num_layers


WRONG: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[Any, ...]]] = {
    "features": lambda x, h: (x[..., :4], h),
    "hidden": lambda x, h: (x, h[..., :7]),
    "batch": lambda x, h: (x, torch.cat((h, h), 1)),
    "layers": lambda x, h: (x, torch.cat((h, h))),
    "rank of the state": lambda x, h: (x, h[0]),
    "a pair of states": lambda x, h: (x, (h, h)),
    "a state that is no tensor": lambda x, h: (x, h.tolist()),
    "dtype of the input": lambda x, h: (x.double(), h),
}


@pytest.mark.parametrize("name", ["RNN", "GRU"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_raise_as_torch(name: str, case: str) -> None:
    ours, theirs = pair(name)
    call = WRONG[case](torch.randn(1, 1, 5), torch.randn(1, 1, 19))
    with torch.no_grad():
        with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever torch raises)
            theirs(*call)
        with pytest.raises(type(expected.value)) as found:
            ours(*call)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("layers", [1, 3])
def test_states_of_another_number_of_layers_raise_as_torch(name: str, layers: int) -> None:
    ours, theirs = pair(name, num_layers=2)
    h = torch.randn(layers, 2, 19)
    state = (torch.randn(2, 2, 19), h) if name == "LSTM" else h
    with torch.no_grad():
        with pytest.raises(RuntimeError) as expected:
            theirs(torch.randn(1, 2, 5), state)
        with pytest.raises(RuntimeError) as found:
            ours(torch.randn(1, 2, 5), state)
    assert str(found.value) == str(expected.value)


def test_on_the_meta_device() -> None:
    ours = fused_rnn.GRU(5, 19, device="meta")
    with torch.no_grad():
        out, h = ours(torch.empty(1, 2, 5, device="meta"), torch.empty(1, 2, 19, device="meta"))
        assert out.shape == h.shape == (1, 2, 19)
        with pytest.raises(RuntimeError, match="not at the same device"):
            pair("GRU")[0](torch.empty(1, 2, 5, device="meta"), torch.empty(1, 2, 19))


def test_strides_are_torchs_where_a_state_has_others() -> None:
    torch.manual_seed(0)
    ours, theirs = fused_rnn.GRU(4, 1), torch.nn.GRU(4, 1)
    x, h = torch.randn(1, 3, 4), torch.randn(1, 1, 3).permute(0, 2, 1)
    with torch.no_grad():
        for actual, expected in zip(ours(x, h), theirs(x, h), strict=True):
            assert actual.stride() == expected.stride()


def test_a_state_of_another_dtype_raises() -> None:
    ours, _ = pair("GRU")
    with torch.no_grad(), pytest.raises(RuntimeError, match="not the same dtype, found input tensor with Float"):
        ours(torch.randn(1, 1, 5), torch.randn(1, 1, 19, dtype=torch.float64))


def test_states_are_not_written() -> None:
    ours, _ = pair("LSTM", num_layers=2)
    with torch.inference_mode():
        state = ours(torch.randn(1, 2, 5))[1]
        before = [part.clone() for part in state]
        out, after = ours(torch.randn(1, 2, 5), state)
        assert all(torch.equal(part, kept) for part, kept in zip(state, before, strict=True))
        out.zero_()
        assert after[0].count_nonzero() == after[0].numel()


def test_strided_states_and_input(calls: list[int]) -> None:
    ours, _ = pair("GRU")
    x, h = torch.randn(1, 5, 3).transpose(1, 2), torch.randn(1, 19, 3).transpose(1, 2)
    with torch.no_grad():
        found, expected = ours(x, h), ours(x.contiguous(), h.contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert calls == [3, 3]


def test_views_whose_memory_holds_the_other_sign() -> None:
    ours, _ = pair("GRU")
    x, h = torch.randn(1, 2, 5), torch.randn(1, 2, 19)
    with torch.no_grad():
        found = ours(torch.complex(x, -x).conj().imag, torch.complex(h, -h).conj().imag)
        torch.testing.assert_close(found, ours(x, h), rtol=0, atol=0)


PARAMETERS: dict[str, Callable[[torch.nn.Module, str], Any]] = {
    "parametrized": lambda module, name: parametrize.register_parametrization(module, name, Halved()),
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.5),
    "a buffer": lambda module, name: replace(module, name, lambda value: module.register_buffer(name, value / 2)),
    "an attribute": lambda module, name: replace(module, name, lambda value: setattr(module, name, value / 2)),
}


class Halved(torch.nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value / 2


def replace(module: torch.nn.Module, name: str, put: Callable[[torch.Tensor], Any]) -> None:
    value = getattr(module, name).detach()
    delattr(module, name)
    put(value)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("parameter", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l0", "bias_hh_l1"])
@pytest.mark.parametrize("case", PARAMETERS)
def test_what_is_no_parameter_counts(name: str, parameter: str, case: str) -> None:
    ours, _ = pair(name, num_layers=2)
    x, h = torch.randn(1, 2, 5), torch.randn(2, 2, 19)
    state = (h, torch.randn(2, 2, 19)) if name == "LSTM" else h
    with torch.no_grad():
        before = ours(x, state)
        PARAMETERS[case](ours, parameter)
        found, expected = ours(x, state), ours(x, state, lengths=torch.tensor([1, 1]))
    for actual, other in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tensors(found)[0], tensors(before)[0], rtol=1e-3)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("parameter", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("case", PARAMETERS)
def test_what_is_no_parameter_counts_in_cells(name: str, parameter: str, case: str) -> None:
    ours, theirs = pair(name)
    x = torch.randn(2, 5)
    with torch.no_grad():
        before = tree_leaves(ours(x))
        for cell in (ours, theirs):
            PARAMETERS[case](cell, parameter)
        found, expected = tree_leaves(ours(x)), tree_leaves(theirs(x))
    for actual, other in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-5, atol=1e-6)
    # Without a state, nothing is multiplied by weight_hh.
    assert torch.equal(found[0], before[0]) is (parameter == "weight_hh")


@pytest.mark.parametrize(
    "change", [torch.Tensor.half, torch.Tensor.double, lambda t: t[..., :1], lambda t: t.mT.contiguous().mT]
)
def test_results_that_a_mode_has_changed_are_not_written(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            return change(made) if function in (torch.Tensor.new_empty_strided, torch.empty_like) else made

    ours, _ = pair("LSTM")
    x, state = torch.randn(1, 2, 5), (torch.randn(1, 2, 19), torch.randn(1, 2, 19))
    with torch.no_grad(), Mode(), pytest.raises(RuntimeError, match="expected a new tensor"):
        ours(x, state)
