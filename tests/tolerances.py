"""How far a result may be from the float64 reference: one table, one number per dtype, each with its reason."""

from __future__ import annotations

import torch
from torch import Tensor

# Our error may be this many times torch.nn's. Not one: two right results in the same dtype round in different places.
FACTOR = 2.0

# What is added to it, in units of the dtype's machine epsilon, times the scale of the result. torch's error can be zero by
# luck in a small result, so the bound needs a floor.
FLOOR_IN_EPS = {
    # The reference is computed in float64 itself: its own rounding over a walk of some hundred steps is in the difference.
    torch.float64: 64.0,
    # A handful of roundings in the gates, and kernels whose exp and tanh are right to a few units in the last place.
    torch.float32: 16.0,
    # Computed in float32 and rounded once per stored value: one rounding of the output, one of a state that feeds back.
    torch.bfloat16: 2.0,
    torch.float16: 2.0,
}


def assert_close_to_reference(actual: Tensor, torch_result: Tensor, reference64: Tensor, name: str = "result") -> None:
    """Assert that ``actual`` is as near to the reference as torch.nn is: error ≤ 2 × torch's error + floor.

    The error is the largest absolute difference over the tensor. The floor is taken of the largest value, or of 1: gates and
    states are of order one, so a small result is a difference of values of that order.

    Args:
        actual: ours.
        torch_result: torch.nn's, same dtype and shape.
        reference64: the float64 reference, same shape.
        name: what to call the result in the message.

    Raises:
        AssertionError: if shape or dtype differ, if a value is not finite where torch's is, or if the error is larger.
    """
    assert actual.shape == torch_result.shape == reference64.shape, (
        f"{name}: shapes differ: {tuple(actual.shape)}, torch {tuple(torch_result.shape)}, {tuple(reference64.shape)}"
    )
    assert actual.dtype == torch_result.dtype, f"{name}: {actual.dtype}, torch {torch_result.dtype}"
    if actual.numel() == 0:
        return
    actual64, torch64 = actual.detach().double(), torch_result.detach().double()
    reference64 = reference64.detach()
    finite = torch64.isfinite()
    # Infinities must be the same ones; NaN has to be NaN.
    torch.testing.assert_close(actual64[~finite], torch64[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    error = (actual64 - reference64)[finite].abs().max().item()
    torch_error = (torch64 - reference64)[finite].abs().max().item()
    scale = max(1.0, reference64[finite].abs().max().item())
    bound = FACTOR * torch_error + FLOOR_IN_EPS[actual.dtype] * torch.finfo(actual.dtype).eps * scale
    # Written so that a NaN fails.
    assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g} (torch's error {torch_error:.3g}, scale {scale:.3g})"
