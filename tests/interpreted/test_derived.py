"""Cells that users define, on kernels that are made from their equations: walks in every regime, whole layers, limits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import equations_support
import pytest
import torch
from equations_support import coupled, deep, late, linear, memory, nested, reset_before, rnn_of_n, split, swish
from test_contract import CHIP, RAGGED, REGIMES, regime_of
from tolerances import assert_close_to_reference
from torch import Tensor
from walks_support import Case, check

import fused_rnn
from fused_rnn.cells import GRU, gru, mgu, relu, sigmoid, tanh
from fused_rnn.cells.definition import Definition
from fused_rnn.kernels import dispatch, triton, written
from fused_rnn.kernels.triton import plan
from fused_rnn.kernels.triton.derived import module_of, recurrence_of, source_of


# The backward reads the output beside a block that is kept: of one gate, whose activation is h and whose sum changes c.
@fused_rnn.cell(gates="a", states="h c")
def shared(x, W, h, c):
    a = x.a + W.a(h)
    return tanh(a), c * sigmoid(a) - a / 2


# Names that the kernels have for other things, a state that is the same number for every unit; a factor of −1.
@fused_rnn.cell(gates="x tl d_h tape", states="h carry")
def names(x, W, h, carry):
    first = sigmoid(x.x + W.x(h)) * -1.0
    second = relu(x.tl + W.tl(h)) / (2 - first)
    return first - (second - (x.d_h + W.d_h(h))) * tanh(x.tape + W.tape(h)), carry * 0 + 0.1


# The second stage needs nothing of the first one but the operand's product, which lives on after a reset.
@fused_rnn.cell(gates="a b")
def deeper(x, W, h):
    return tanh(x.b + W.b(sigmoid(x.a + W.a(h))))


# Two later gates; values of the first stage in both, a kept sum, and a gate that both stages of the backward add to.
@fused_rnn.cell(gates="i s o g")
def wide(x, W, h):
    i = sigmoid(x.i + W.i(h))
    s = x.s + W.s(h)
    m = s * i + h / 2
    o = sigmoid(x.o + W.o(m))
    g = relu(x.g + W.g(m))
    return o * tanh(s) + g * i - h / 4


ONE_STAGE = [equations_support.leaky, coupled, nested, linear, split, swish, rnn_of_n, shared, names]
TWO_STAGES = [late, reset_before, deeper, wide]
EVERY = ONE_STAGE + TWO_STAGES


def id_of(value: object) -> str:
    return value.body.__name__ if isinstance(value, Definition) else str(value)


# Two programs along the units and two along the batch, of sizes that are no power of two; ragged rows with resets.
@pytest.mark.parametrize("case", [Case(steps=2, batch=9, hidden=18, reverse=(False, True)), RAGGED], ids=str)
@pytest.mark.parametrize(
    ("cell", "regime"), [*((c, r) for c in ONE_STAGE for r in REGIMES), *((c, "library") for c in TWO_STAGES)], ids=id_of
)
def test_walks(cell: Definition, regime: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with regime_of(regime, monkeypatch):
        check("triton", cell.row.name, case, torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        Case(steps=1, batch=1, hidden=1),
        Case(steps=2, batch=2, hidden=5, bias=False),
        Case(steps=6, batch=4, hidden=6, ragged="padded", reverse=(True,), reset=True, chunk=2, d_cells=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", EVERY, ids=id_of)
def test_sizes_and_parts_in_float64(cell: Definition, case: Case) -> None:
    check("triton", cell.row.name, case, torch.float64)


def results(module: fused_rnn.Recurrent, input: Tensor, backend: str, **options: Tensor) -> dict[str, Tensor]:
    """Output, last states and every gradient."""
    x = input.clone().requires_grad_()
    with fused_rnn.backend(backend):
        out, ends = module(x, **options)
        values = (out, *ends) if isinstance(ends, tuple) else (out, ends)
        loss = sum((v * torch.linspace(-1, 1, v.numel(), dtype=torch.float64).to(v.dtype).view_as(v)).sum() for v in values)
        grads = torch.autograd.grad(loss, (x, *module.parameters()))
    found = {f"value {i}": value.detach() for i, value in enumerate(values)}
    return found | {f"gradient {i}": grad for i, grad in enumerate(grads)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["lengths", "reset"])
@pytest.mark.parametrize("cell", [mgu, coupled, late, split, rnn_of_n], ids=id_of)
def test_layers(cell: Definition, options: str, dtype: torch.dtype) -> None:
    """Two bidirectional layers of ``Recurrent`` against the reference in float64."""
    given = {"lengths": torch.tensor([4, 1, 3])} if options == "lengths" else {"reset": torch.rand(5, 3) < 0.3}
    module = fused_rnn.Recurrent(cell, 3, 7, num_layers=2, bidirectional=True, dtype=dtype)
    exact = fused_rnn.Recurrent(cell, 3, 7, num_layers=2, bidirectional=True, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, 3, dtype=dtype)
    ours, theirs = (results(module, x, backend, **given) for backend in ("triton", "reference"))
    for name, value in results(exact, x.double(), "reference", **given).items():
        assert_close_to_reference(ours[name], theirs[name], value, name)


@pytest.mark.parametrize("cell", [memory, deep], ids=id_of)
def test_two_states_beside_the_product_are_refused(cell: Definition) -> None:
    module = fused_rnn.Recurrent(cell, 3, 4)
    message = r"the triton backend cannot compute this layer: .* one state beside the product, not both of \('h', '[mc]'\)"
    with fused_rnn.backend("triton"), pytest.raises(NotImplementedError, match=message):
        module(torch.randn(2, 1, 3))
    with pytest.raises(NotImplementedError, match=rf"cell {cell.row.name}: the Triton kernels carry one state"):
        recurrence_of(cell.row)
    with pytest.raises(ValueError, match=rf"explain\(\): cell: {cell.row.name}: the Triton kernels carry one state"):
        triton.explain(cell.row.name, 64, 8, device=CHIP)


@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "library"])
def test_a_step_of_two_products_is_the_librarys(regime: str) -> None:
    module = fused_rnn.Recurrent(mgu, 3, 4)
    message = rf"force\(regime='{regime}'\): the product of n is a second one in each step"
    with plan.force(regime=regime), fused_rnn.backend("triton"), pytest.raises(ValueError, match=message):
        module(torch.randn(2, 1, 3))


def test_the_backend_takes_cells_of_equations() -> None:
    assert "cooperative" in triton.explain(coupled.row.name, 512, 8, device=CHIP)
    with fused_rnn.backend("triton"):
        assert dispatch.choose(torch.device("cpu"), coupled.row).name == "triton"


def test_the_source_reads_as_if_written_by_hand() -> None:
    source = source_of(gru.derived)
    assert inspect.getsource(module_of(gru.derived)) == source
    assert inspect.getsource(recurrence_of(GRU).stage.step.fn) in source
    for line in (
        "def gru_step(x, product, bias, h_before):",
        "    hn = bias[3] + product[2]",
        "    n = tanh(x[2] + bias[2] + r * hn)",
        "    h = n + z * (h_before - n)",
        "    return h, h, (r, z, n, hn)",
        "    r, z, n, hn = tape",
        "    d_r = d_n * hn * r * (1.0 - r)",
        "    return (d_hn, d_r, d_z, d_n), v0, d_carry",
    ):
        assert f"{line}\n" in source


def _of(body: Callable[..., Any]) -> str:
    return source_of(fused_rnn.cell(gates="n", states="h")(body).derived)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (lambda x, W, h: tanh(x.n + W.n(h)) - (h - (h - 1)), "n - (h_before - (h_before - 1.0))"),
        (lambda x, W, h: tanh(x.n + W.n(h)) / (h / (h * 3)), "n / (h_before / (h_before * 3.0))"),
        (lambda x, W, h: tanh(x.n + W.n(h)) * (h * (h + 3)), "n * (h_before * (h_before + 3.0))"),
        (lambda x, W, h: tanh(x.n + W.n(h)) * -(h * 3) / h, "n * -(h_before * 3.0) / h_before"),
        (lambda x, W, h: -(tanh(x.n + W.n(h)) + h) * (-1.0 - h), "-(n + h_before) * (-1.0 - h_before)"),
        (lambda x, W, h: 4 - tanh(x.n + W.n(h)) + h, "4.0 - n + h_before"),
    ],
)
def test_parentheses(body: Callable[..., Any], line: str) -> None:
    """As many as Python needs for the order in which the equations compute."""
    body.__name__ = "given"
    assert f"    h = {line}\n" in _of(body)


def test_without_a_folder_that_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are made all the same, for this process alone."""

    @fused_rnn.cell(gates="n")
    def fresh(x: Any, W: Any, h: Any) -> Any:
        return tanh(x.n + W.n(h)) * 0.625

    monkeypatch.setattr(written, "folder", lambda _: (_ for _ in ()).throw(OSError("no folder")))
    check("triton", fresh.row.name, Case(steps=2, batch=2, hidden=3), torch.float32)
    assert module_of(fresh.derived).__spec__ is None
