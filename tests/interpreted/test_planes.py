"""Float32 in planes of bfloat16: how exact the products are that the kernels with weights in registers make of them."""

from __future__ import annotations

import pytest
import schedules
import torch
from torch import Tensor
from walks_support import Case, make_inputs, run

from fused_rnn.kernels.triton import launch, packing, plan
from fused_rnn.kernels.triton.plan import Device

CHIP = Device("a chip", (9, 0), 32, 227 << 10)
# Relative error of a product of two numbers. Each plane takes the 8 leading bits of what is left, to the nearest: a number errs
# by 2^-9 of itself with one plane, by 2^-18 with two, by 2^-27 with three. Two planes make three of four products: the one
# that is left out is 2^-18 too, which together is less than 2^-16. With three planes float32's own sums are what remains: 2^-24
# for each of some ten additions that follow one another where it counts.
BOUNDS = {2: 2.0**-16, 3: 2.0**-20}
every_form = pytest.mark.parametrize("planes", BOUNDS)
every_regime = pytest.mark.parametrize("regime", ["resident", "cooperative"])


def results(
    cell: str, case: Case, regime: str, planes: int, monkeypatch: pytest.MonkeyPatch, **fields: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of a regime with the switch of float32 as it makes so many planes, and in float64."""
    inputs, choose, plans = make_inputs(cell, case), launch.choose, []
    # What float32 cannot say is no error of a product.
    for tensor in (inputs.gates_x, inputs.bias, inputs.d_out, *inputs.weight_hh, *inputs.states, *inputs.d_states):
        if tensor is not None:
            tensor.copy_(tensor.float())
    monkeypatch.setattr(launch, "device_of", lambda device: CHIP)
    monkeypatch.setattr(launch, "allows_tf32", lambda: planes == 2)
    monkeypatch.setattr(launch, "choose", lambda *given: plans.append(choose(*given)) or plans[-1])
    with plan.force(regime=regime, **fields), schedules.together(monkeypatch, schedules.first_ahead):
        ours = run("triton", cell, case, inputs, torch.float32)
    assert {made.planes for made in plans} == {planes}
    exact = run("reference", cell, case, inputs, torch.float64)
    # The sum of the products' absolute values, of which the error of a sum is a part.
    exact["|W|·|h|"] = torch.stack([h.abs() @ w.abs().t() for h, w in zip(inputs.states[0], inputs.weight_hh, strict=True)], 1)
    return ours, exact


@every_form
@every_regime
def test_one_product(regime: str, planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the ReLU cell is a product and a sum: each element is as near as the bound says."""
    case = Case(steps=1, batch=3, hidden=70, bias=False)
    ours, exact = results("rnn_relu", case, regime, planes, monkeypatch)
    scale = exact["|W|·|h|"] + exact["out"].abs() + 1.0
    error = ((ours["out"].double() - exact["out"]).abs() / scale).max().item()
    assert error <= BOUNDS[planes]
    # Were it more exact, another product would have been made than the plan says.
    assert planes == 3 or error > BOUNDS[3] / 8


@every_form
@every_regime
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_whole_walks(cell: str, regime: str, planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of a step's sums add up: they are of order √H, each step hands on what it got, and a gradient has them twice."""
    case = Case(steps=5, batch=9, hidden=36, ragged="packed", reverse=(False, True), reset=True)
    ours, exact = results(cell, case, regime, planes, monkeypatch)
    bound = BOUNDS[planes] * case.hidden**0.5 * 2
    for name in ours:
        scale = max(1.0, exact[name].abs().max().item())
        error = (ours[name].double() - exact[name]).abs().max().item()
        assert error <= bound * scale, name


@pytest.mark.parametrize("planes", [2, 3])
@every_regime
def test_numbers_beyond_finite_ones(regime: str, planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay in their sequence. An infinity may become NaN: the second plane of a weight may have the other sign."""
    from fused_rnn import backend
    from fused_rnn.nn.layers import RNN

    monkeypatch.setattr(launch, "device_of", lambda device: CHIP)
    monkeypatch.setattr(launch, "allows_tf32", lambda: planes == 2)
    module = RNN(2, 20, nonlinearity="relu")
    with torch.no_grad():
        module.weight_hh_l0.abs_()
    h_0 = torch.zeros(1, 3, 20)
    h_0[0, 0, 3], h_0[0, 1, 4] = float("inf"), float("nan")
    with plan.force(regime=regime), schedules.together(monkeypatch, schedules.first_ahead), backend("triton"), torch.no_grad():
        out, _ = module(torch.zeros(1, 3, 2), h_0)
    assert not out[0, 0].isfinite().any()
    assert out[0, 1].isnan().all()
    assert out[0, 2].isfinite().all()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_streamed_products_in_tf32(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both factors are rounded to the nearest of 11 bits: a sum of K = 33 products errs by some 2⁻¹¹ of its size; NaN stays."""
    monkeypatch.setattr(launch, "allows_tf32", lambda: True)
    case = Case(steps=3, batch=3, hidden=33, reset=True)
    inputs = make_inputs(cell, case)
    with plan.force(regime="streamed", units=64, batch=16):
        found = run("triton", cell, case, inputs, torch.float32)
    expected = run("reference", cell, case, inputs, torch.float64)
    for name, value in expected.items():
        error = (found[name].double() - value).abs().max().item()
        assert error <= 4 * 2**-11 * max(1.0, value.abs().max().item()), name
    assert max((found[name].double() - value).abs().max().item() for name, value in expected.items()) > 2**-16
    lost = torch.tensor([float("nan"), float("inf"), -1.0, 1.0 + 2**-11, 2**-130])
    torch.testing.assert_close(
        packing.rounded(lost), torch.tensor([float("nan"), float("inf"), -1.0, 1.0 + 2**-10, 2**-130]), equal_nan=True
    )
