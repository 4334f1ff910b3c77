"""Whole layers on the Triton backend: the dtypes that a GPU stores, against torch.nn's rule; tensors of other devices."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close_to_reference
from torch import Tensor

import fused_rnn
from fused_rnn.cells import GRU
from fused_rnn.data.steps import Steps
from fused_rnn.kernels.triton import plan
from fused_rnn.kernels.triton.derived import recurrence_of


def results(module: torch.nn.Module, input: Tensor, states: tuple[Tensor, ...], backend: str) -> dict[str, Tensor]:
    """Output, last states and every gradient, initial states' included."""
    x = input.clone().requires_grad_()
    given = [state.clone().requires_grad_() for state in states]
    with fused_rnn.backend(backend):
        out, ends = module(x, tuple(given) if len(given) > 1 else given[0])
    ends = ends if isinstance(ends, tuple) else (ends,)
    values = (out, *ends)
    loss = sum((v * torch.linspace(-1, 1, v.numel(), dtype=torch.float64).to(v.dtype).view_as(v)).sum() for v in values)
    leaves = {"input": x, **{f"state {i}": state for i, state in enumerate(given)}, **dict(module.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {f"value {i}": value.detach() for i, value in enumerate(values)}
    return found | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("regime", ["resident", "streamed", "library"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layers_in_every_dtype(name: str, regime: str, dtype: torch.dtype) -> None:
    """Error ≤ 2 × that of plain torch in the same dtype + floor."""
    module = getattr(fused_rnn, name)(5, 19, bidirectional=True, dtype=dtype)
    exact = getattr(fused_rnn, name)(5, 19, bidirectional=True, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(4, 3, 5, dtype=dtype)
    states = tuple(torch.randn(2, 3, 19, dtype=dtype) for _ in range(2 if name == "LSTM" else 1))
    # One program has all units, so that nobody has to be waited for.
    with plan.force(regime=regime, units=32):
        ours = results(module, x, states, "triton")
    theirs = results(module, x, states, "reference")
    expected = results(exact, x.double(), tuple(state.double() for state in states), "reference")
    for key, value in expected.items():
        assert_close_to_reference(ours[key], theirs[key], value, key)


def test_inference_keeps_nothing_and_says_the_same() -> None:
    module, x = fused_rnn.LSTM(5, 7, num_layers=2), torch.randn(3, 2, 5)
    with fused_rnn.backend("triton"):
        trained, _ = module(x)
        with torch.no_grad():
            inferred, _ = module(x)
    assert torch.equal(trained, inferred)


def test_a_second_backward_gives_the_same() -> None:
    module, x = fused_rnn.GRU(5, 7), torch.randn(3, 2, 5, requires_grad=True)
    with fused_rnn.backend("triton"):
        out, _ = module(x)
    first, second = (torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_the_backend_says_of_itself() -> None:
    status = fused_rnn.backends()["triton"]
    assert status.available
    assert status.devices == ("cuda", "cpu")
    assert "interpreted on the CPU" in status.detail


def test_the_cpu_is_served_on_request_only() -> None:
    """Without being asked, a CPU tensor goes to a backend that is made for it."""
    from fused_rnn.kernels import dispatch

    assert dispatch.choose(torch.device("cpu")).name != "triton"


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected weights of bfloat16, .*, got torch\.int32, which no backend"):
        recurrence_of(GRU).pack([torch.zeros(12, 4, dtype=torch.int32)], None, Steps(9, 3), False)


def test_wrong_buffers_are_refused() -> None:
    """The error names the buffer, what was expected and what came."""
    gru, steps = recurrence_of(GRU), Steps(2, 3)
    packed = gru.pack([torch.zeros(12, 4)], None, steps, False)
    tape, out, h = torch.zeros(6, 1, 16), torch.zeros(6, 1, 4), torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match=r"out: expected contiguous columns of torch\.float32, got torch\.float16"):
        gru.forward(tape, out.half(), (h,), (h,), packed, None, steps, (False,), None, True)
    with pytest.raises(ValueError, match=r"tape: expected rows of shape \(·, 1, 16\), got \(6, 2, 16\)"):
        gru.forward(torch.zeros(6, 2, 16), out, (h,), (h,), packed, None, steps, (False,), None, True)
    packed = gru.pack([torch.zeros(12, 4)], None, steps, True)
    with pytest.raises(ValueError, match=r"d_cells: expected None for gru"):
        gru.backward(tape, (h,), (h,), None, out, tape, out, (h,), packed, steps, 0, 2, (False,), None)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("given", [True, False])
def test_plain_layers_need_few_products(name: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights' gradients come without the sums over stretches of time, and are the same numbers."""
    from fused_rnn.kernels.triton import layer

    module, x = getattr(fused_rnn, name)(5, 7), torch.randn(4, 3, 5)
    states = tuple(torch.randn(1, 3, 7) for _ in range(2 if name == "LSTM" else 1))
    if not given:
        states = tuple(torch.zeros_like(state) for state in states)
    monkeypatch.setattr(layer, "WeightGradients", lambda *_: pytest.fail("these are the sums of other layers"))
    found = results(module, x, states, "triton")
    for key, value in results(module, x, states, "reference").items():
        torch.testing.assert_close(found[key], value, msg=key, rtol=1e-3, atol=1e-3)
    if not given:
        with fused_rnn.backend("triton"):
            out, _ = module(x)
        torch.testing.assert_close(out.detach(), found["value 0"])
