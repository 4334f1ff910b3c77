"""The seam (``fused_rnn.kernels.protocol``): every CPU backend and cell computes layers as plain torch in float64 does."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from tolerances import assert_close_to_reference
from torch import Tensor

import fused_rnn
from fused_rnn import reference
from fused_rnn.cells import CELLS
from fused_rnn.data.cell import Weights, initial_states
from fused_rnn.data.steps import Steps
from fused_rnn.kernels import dispatch
from fused_rnn.kernels.protocol import Backend, Layer, LayerCall, LayerResult, OutputGradients

BACKENDS = [name for name, status in fused_rnn.backends().items() if status.available and "cpu" in status.devices]
Arrange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one layer."""

    steps: int = 5
    batch: int = 3
    inputs: int = 6
    hidden: int = 17
    reverse: tuple[bool, ...] = (False,)
    projection: int | None = None
    form: str = "dense"  # (T, N, I); "rows" for (R, I); "packed": one sequence has no step at all; "step" of a cell
    reset: bool = False
    biases: tuple[str, ...] = ("both",)  # of each recurrence, over and over: "both", "ih", "hh" or "none"
    states: bool = True
    graded: frozenset[str] = frozenset({"out", "h", "c", "cells"})  # whose gradients are given
    cell_states: bool = False
    groups: int | None = None

    def __str__(self) -> str:
        fields = Case.__dataclass_fields__
        changed = {name: value for name, value in vars(self).items() if value != fields[name].default}
        return ",".join(f"{name}={sorted(value) if name == 'graded' else value}" for name, value in changed.items()) or "plain"


@dataclass
class Inputs:
    """Everything that one run reads, in float64."""

    steps: Steps
    names: list[str]  # of the operands
    operands: list[Tensor | None]
    reset: Tensor | None
    gradients: dict[str, Tensor]  # of what the forward returns


def make_steps(case: Case) -> Steps:
    """Dense, or packed so that one sequence has no step at all."""
    groups = case.groups or 1
    batch = case.batch // groups
    if case.form != "packed":
        return Steps(case.steps, case.batch)
    return Steps.packed(torch.linspace(batch, 1, case.steps).round().to(torch.int64), batch + 1).times(groups)


def make_inputs(cell_name: str, case: Case, dtype: torch.dtype) -> Inputs:
    """Fresh numbers that ``dtype`` can hold, of a size that keeps the gates away from saturation."""
    cell, steps = CELLS[cell_name], make_steps(case)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{cell_name} {case}".encode()))

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).double()

    d, h, n = len(case.reverse), case.hidden, steps.batch
    p, gates, rows = case.projection or h, cell.num_gates * h, steps.rows(0, steps.length).stop
    before = (rows,) if case.form in ("rows", "packed", "step") else (case.steps, n)
    recurrences = () if case.form == "step" else (d,)
    widths = dict(zip(cell.states, (p, h), strict=False))
    names = ["input", *cell.states]
    operands: list[Tensor | None] = [randn(*before, case.inputs)]
    operands += [randn(*recurrences, n, width) if case.states else None for width in widths.values()]
    for i, biases in zip(range(d), itertools.cycle(case.biases)):
        names += [f"{field}[{i}]" for field in Weights._fields]
        operands += [randn(gates, case.inputs, scale=case.inputs**-0.5), randn(gates, p, scale=p**-0.5)]
        operands += [randn(gates, scale=0.5) if biases in ("both", name) else None for name in ("ih", "hh")]
        operands.append(None if case.projection is None else randn(p, h, scale=h**-0.5))
    gradients = {"out": randn(*before, d * p)}
    for name, width in widths.items():
        if case.form != "step" or name != "h":
            gradients[name] = randn(*recurrences, n, width)
    if case.cell_states:
        gradients["cells"] = randn(*before, d * h)
    reset = torch.rand(d, rows, generator=generator) < 0.3 if case.reset else None
    return Inputs(steps, names, operands, reset, {name: each for name, each in gradients.items() if name in case.graded})


def plain_results(cell_name: str, case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the equations in plain torch give, and autograd of them."""
    cell, steps, step = CELLS[cell_name], inputs.steps, case.form == "step"
    leaves = [None if each is None else each.to(dtype).requires_grad_() for each in inputs.operands]
    input, states, weights, _ = LayerCall.of(_layer(cell_name, case, inputs, None), leaves, None)[1:]
    if states is None:
        states = initial_states(cell, input, len(weights), steps.batch, weights[0])
    states = tuple(state[None] if state.dim() == 2 else state for state in states)
    rows = input.reshape(-1, case.inputs)
    out, ends = reference.layer(
        cell, rows, steps, states, tuple(weights), case.reverse, inputs.reset, cell_states=case.cell_states
    )
    found = {"out": out.reshape(*input.shape[:-1], -1)}
    if case.cell_states:
        found["cells"] = ends[-1].reshape(*input.shape[:-1], -1)
    for name, end in zip(cell.states, ends, strict=False):
        if not step or name != "h":
            found[name] = end[0] if step else end
    chosen = [leaf for leaf in leaves if leaf is not None]

    def gradients(group: int | None) -> list[Tensor]:
        given = {name: grad.to(dtype) for name, grad in inputs.gradients.items()}
        if group is not None:
            # Sequence j is of group j modulo their number.
            mine = torch.arange(steps.batch) % case.groups == group
            sizes = [steps.batch] * steps.length if steps.batch_sizes is None else steps.batch_sizes.tolist()
            my_rows = torch.cat([mine[:n] for n in sizes])
            for name, grad in given.items():
                flags = mine if name in cell.states else my_rows
                given[name] = torch.where(flags[:, None], grad.reshape(-1, len(flags), grad.shape[-1]), 0).view(grad.shape)
        return torch.autograd.grad(
            [found[name] for name in given], chosen, list(given.values()), retain_graph=True, materialize_grads=True
        )

    whole = gradients(None)
    parts = whole if case.groups is None else [torch.stack(each) for each in zip(*map(gradients, range(case.groups)))]  # noqa: B905
    first = 1 + len(cell.states)
    names = [name for name, leaf in zip(inputs.names, leaves, strict=True) if leaf is not None]
    results = {name: value.detach() for name, value in found.items()}
    for name, of_all, of_groups in zip(names, whole, parts, strict=True):
        results[f"d_{name}"] = of_all if name in inputs.names[:first] else of_groups
    return results


@functools.lru_cache(maxsize=64)
def expected_results(cell: str, case: Case, dtype: torch.dtype) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    """The inputs, what is right, and what plain torch makes of it in ``dtype``; not to be written."""
    inputs = make_inputs(cell, case, dtype)
    return inputs, plain_results(cell, case, inputs, torch.float64), plain_results(cell, case, inputs, dtype)


def choose(backend: str) -> Backend:
    with fused_rnn.backend(backend):
        return dispatch.choose(torch.device("cpu"))


def _layer(cell: str, case: Case, inputs: Inputs, backend: Backend | None) -> Layer:
    return Layer(CELLS[cell], backend, inputs.steps, case.reverse, case.cell_states, case.form == "step")  # type: ignore[arg-type]


def make_call(
    backend: str, cell: str, case: Case, inputs: Inputs, dtype: torch.dtype, arrange: Arrange = Tensor.contiguous
) -> LayerCall:
    """The call of a layer, with what a forward reads in the layout of memory that ``arrange`` gives it."""
    operands = [None if each is None else arrange(each.to(dtype)) for each in inputs.operands]
    return LayerCall.of(_layer(cell, case, inputs, choose(backend)), operands, inputs.reset)


def backward(
    call: LayerCall,
    case: Case,
    inputs: Inputs,
    result: LayerResult,
    wanted: Sequence[bool] | None = None,
    arrange: Arrange = Tensor.contiguous,
) -> dict[str, Tensor]:
    """The gradients that are wanted; None for all that there are."""
    dtype = call.input.dtype
    given = {name: arrange(grad.to(dtype)) for name, grad in inputs.gradients.items()}
    after = call.layer.cell.states[1:] if call.layer.step else call.layer.cell.states
    gradients = OutputGradients(given.get("out"), [given.get(name) for name in after], given.get("cells"))
    if wanted is None:
        wanted = [operand is not None for operand in inputs.operands]
    found = call.layer.backend.backward(call, result.out, result.tape, gradients, wanted, case.groups)
    assert len(found) == len(wanted)
    assert [grad is not None for grad in found] == list(wanted)
    return {f"d_{name}": grad for name, grad in zip(inputs.names, found, strict=True) if grad is not None}


def forward_values(call: LayerCall, result: LayerResult) -> dict[str, Tensor]:
    """What the forward returned, by name."""
    after = call.layer.cell.states[1:] if call.layer.step else call.layer.cell.states
    values = {"out": result.out, **dict(zip(after, result.states, strict=True))}
    return values if result.cell_states is None else {**values, "cells": result.cell_states}


def check(backend: str, cell: str, case: Case, dtype: torch.dtype, arrange: Arrange = Tensor.contiguous) -> None:
    """A forward with and without a backward to follow, and two backwards; nothing that they read is written."""
    inputs, expected, plain = expected_results(cell, case, dtype)
    call = make_call(backend, cell, case, inputs, dtype, arrange)
    assert call.layer.backend.supports(call) is None
    result = call.layer.backend.forward(call, True)
    assert (result.tape is None) == CELLS[cell].tape_is_out
    kept = [None if each is None else each.clone() for each in (result.out, result.tape, *call.operands())]
    grads, again = (backward(call, case, inputs, result, arrange=arrange) for _ in range(2))
    for before, after in zip(kept, (result.out, result.tape, *call.operands()), strict=True):
        assert before is None or torch.equal(before, after), "written what was only to be read"
    for name, grad in grads.items():
        assert torch.equal(grad, again[name]), f"{name}: a second backward gives other bits"
    actual = forward_values(call, result) | grads
    dropped = call.layer.backend.forward(call, False)
    assert dropped.tape is None
    assert actual.keys() == expected.keys()
    for name, value in forward_values(call, dropped).items():
        assert_close_to_reference(value, plain[name], expected[name], f"{name} of inference")
    # relu has a kink at zero. Where rounding to 16 bits crosses it gradients jump.
    jumps = cell == "rnn_relu" and dtype.itemsize == 2 and not torch.equal(result.out > 0, expected["out"] > 0)
    for name, value in actual.items():
        if not (jumps and name.startswith("d_")):
            assert_close_to_reference(value, plain[name], expected[name], name)


def _dtype_name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# The walks of the others are tested in both dtypes on their own.
KINDS = [
    (name, dtype)
    for name in BACKENDS
    for dtype in (torch.float32, torch.float64)
    if name == "cpp" or (dtype == torch.float64) == (name == "reference")
]
HALVES = [(name, dtype) for name in BACKENDS for dtype in (torch.bfloat16, torch.float16)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kind = pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=_dtype_name)
every_half = pytest.mark.parametrize(("backend", "dtype"), HALVES, ids=_dtype_name)
every_cell = pytest.mark.parametrize("cell", CELLS)
every_projected_cell = pytest.mark.parametrize("cell", [name for name, row in CELLS.items() if row.projected is not None])

FOUR = (False, True, True, False)
CASES = [
    Case(),
    Case(reverse=(True,), form="rows"),
    Case(reverse=(False, True), batch=9, hidden=33),
    Case(reverse=(True, False), form="rows", inputs=40),
    Case(reverse=(False, False), steps=3),
    Case(reverse=(True, True), steps=3, reset=True),
    Case(reverse=FOUR, reset=True, cell_states=True, biases=("both", "ih", "none", "hh")),
    Case(reverse=FOUR, form="packed", steps=6, batch=7, hidden=5),
    Case(form="packed", batch=6, reset=True, steps=7),
    Case(form="packed", batch=6, reverse=(True,), steps=7, cell_states=True),
    Case(form="packed", batch=21, reverse=(False, True), reset=True, steps=7, hidden=9),
    Case(reset=True, batch=1, hidden=65, steps=9, reverse=(False, True)),
    Case(biases=("none",), hidden=33),
    Case(biases=("ih",), batch=9),
    Case(biases=("hh",), reverse=(False, True)),
    Case(states=False, reverse=(False, True), reset=True, cell_states=True),
    Case(states=False, form="packed", batch=4),
    Case(cell_states=True, graded=frozenset({"cells"}), batch=5),
    Case(cell_states=True, graded=frozenset({"h", "c"})),
    Case(graded=frozenset({"h"}), reverse=(False, True)),
    Case(graded=frozenset({"out"}), form="packed", batch=4),
    Case(steps=1, batch=1, hidden=1, inputs=1),
    *(Case(steps=1, batch=batch, reverse=(False, True), reset=batch > 4, cell_states=batch < 9) for batch in (1, 4, 5, 49)),
    Case(steps=1, batch=7, states=False, biases=("none",), form="rows", reverse=FOUR),
    Case(groups=3, batch=6, reset=True),
    Case(groups=2, batch=6, form="packed", reverse=(False, True), biases=("hh", "both"), states=False, reset=True),
    Case(steps=1, groups=4, batch=4, form="step"),
]
PROJECTED = [
    Case(projection=5),
    Case(projection=1, hidden=2, batch=1, steps=1),
    Case(projection=33, hidden=50, batch=9, reverse=(False, True), form="rows", reset=True),
    Case(projection=4, form="packed", batch=6, reverse=FOUR, reset=True, cell_states=True, biases=("ih", "both")),
    Case(projection=7, states=False, graded=frozenset({"cells"}), cell_states=True, steps=1),
    Case(projection=6, groups=2, batch=6, form="packed", reverse=(True, False)),
]


def _fitting(cell: str, case: Case) -> Case:
    """The case for a cell that may have no c."""
    if CELLS[cell].cell_state is not None:
        return case
    graded = case.graded if case.graded & {"out", "h"} else frozenset({"out", "h"})
    return replace(case, cell_states=False, graded=graded)


@every_cell
@every_kind
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_match_the_reference(backend: str, cell: str, dtype: torch.dtype, case: Case) -> None:
    """Recurrences, forms, resets of each recurrence's own, absent operands and gradients, groups."""
    check(backend, cell, _fitting(cell, case), dtype)


@every_projected_cell
@every_kind
@pytest.mark.parametrize("case", PROJECTED, ids=str)
def test_projected_layers_match_the_reference(backend: str, cell: str, dtype: torch.dtype, case: Case) -> None:
    """The same for the cells whose h can be a projection."""
    check(backend, cell, case, dtype)


@every_cell
@every_kind
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 49, 100])
def test_steps_of_cells_match_the_reference(backend: str, cell: str, dtype: torch.dtype, batch: int) -> None:
    """What a cell gives: h after the step is the output and not among the states; with states and without."""
    case = Case(steps=1, batch=batch, form="step", hidden=33, inputs=20)
    check(backend, cell, case, dtype)
    check(backend, cell, replace(case, states=False, biases=("ih",)), dtype)
    check(backend, cell, replace(case, graded=frozenset({"out"}), biases=("none",), hidden=16), dtype)


@every_cell
@every_half
@pytest.mark.parametrize("case", [0, 6, 8, 10, 15, -1, "step", "single"], ids=str)
def test_halves_match_the_reference(backend: str, cell: str, dtype: torch.dtype, case: int | str) -> None:
    """What is stored in 16 bits is computed in float32."""
    others = {"step": Case(steps=1, batch=5, form="step"), "single": Case(steps=1, batch=9, reverse=(False, True))}
    check(backend, cell, _fitting(cell, CASES[case] if isinstance(case, int) else others[case]), dtype)


@every_projected_cell
@every_half
@pytest.mark.parametrize("case", PROJECTED, ids=str)
def test_projected_halves_match_the_reference(backend: str, cell: str, dtype: torch.dtype, case: Case) -> None:
    check(backend, cell, case, dtype)


@every_cell
@every_backend
@pytest.mark.parametrize("case", [Case(reverse=(False, True)), Case(form="packed"), Case(steps=1, form="step")], ids=str)
def test_each_gradient_alone(backend: str, cell: str, case: Case) -> None:
    """A gradient does not depend on which others are wanted; none at all is all right."""
    for projection in (None, 5) if CELLS[cell].projected is not None and case.form != "step" else (None,):
        given = replace(case, projection=projection)
        inputs, expected, plain = expected_results(cell, given, torch.float32)
        call = make_call(backend, cell, given, inputs, torch.float32)
        result = call.layer.backend.forward(call, True)
        places = [place for place, operand in enumerate(inputs.operands) if operand is not None]
        for wanted_place in (*places, None):
            found = backward(call, given, inputs, result, [place == wanted_place for place in range(len(inputs.operands))])
            for name, grad in found.items():
                assert_close_to_reference(grad, plain[name], expected[name], name)


# What differs is where the numbers lie, in which order, and with which sign.
LAYOUTS: dict[str, Arrange] = {
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "rows in wider ones": lambda x: torch.nn.functional.pad(x, (1, 2), value=float("nan"))[..., 1:-2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
}


@every_cell
@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[6], CASES[8], Case(steps=1, batch=5, form="step")], ids=str)
def test_any_layout_of_memory(backend: str, cell: str, layout: str, case: Case) -> None:
    """Operands and gradients of results, all of them."""
    check(backend, cell, _fitting(cell, case), torch.float32, LAYOUTS[layout])


@every_cell
@every_backend
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 40])
def test_any_number_of_threads(backend: str, cell: str, threads: int, batch: int) -> None:
    """More threads than cores, a number that does not divide the work, one: all right, and the same bits in every run."""
    case = Case(batch=batch, hidden=160, inputs=30, reverse=(False, True), steps=4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(backend, cell, case, torch.float32)
    finally:
        torch.set_num_threads(before)


@every_backend
def test_python_threads_at_once(backend: str) -> None:
    """Calls from several Python threads do not disturb each other."""
    cases = [(cell, Case(batch=batch, hidden=70, steps=8)) for cell in CELLS for batch in (1, 20)]
    for cell, case in cases:
        expected_results(cell, case, torch.float32)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check, backend, cell, case, torch.float32) for cell, case in cases * 2]:
            done.result()
