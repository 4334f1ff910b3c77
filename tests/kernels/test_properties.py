"""Every mixture of cell, sizes, dtype, form and memory layout against the float64 reference: outputs and all gradients.

Hypothesis draws a ``Case`` and shrinks what fails. A failure prints the case as Python, and ``check(Case(...))`` in this file
runs it again. How many are drawn is the profile's business: some tens as a rule, thousands in ``make test-extended``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from tolerances import assert_close_to_reference
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import functional
from fused_rnn.cells import CELLS
from fused_rnn.data.cell import Weights
from fused_rnn.data.steps import Steps

CPU_BACKENDS = [name for name, status in fused_rnn.backends().items() if status.available and "cpu" in status.devices]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

FORMS = ("dense", "batch_first", "unbatched", "packed", "packed_sorted", "lengths")


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _sliced(x: Tensor) -> Tensor:
    """Every second column of a wider tensor, whose other columns are NaN."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _offset(x: Tensor) -> Tensor:
    """Contiguous, but not aligned to a vector."""
    flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    """Stride zero in the first dimension: all its entries are the first one."""
    return x[:1].expand(x.shape)


def _flipped(x: Tensor) -> Tensor:
    return x.flip(0).flip(0)


def _negated(x: Tensor) -> Tensor:
    """A view whose memory holds the numbers with the other sign."""
    return torch._neg_view(-x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "transposed": _transposed,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": _expanded,
    "flipped": _flipped,
    "negated": _negated,
}


@dataclass(frozen=True)
class Case:
    """One draw. All numbers come from ``seed``, so that sizes and layouts can shrink on their own."""

    cell: str = "rnn_tanh"
    form: str = "dense"
    lengths: tuple[int, ...] = (1,)
    inputs: int = 1
    hidden: int = 1
    projection: int | None = None
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    given_states: bool = False
    reset: bool = False
    dtype: str = "float32"
    input_layout: str = "contiguous"
    state_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    graded: str = "all"
    frozen: frozenset[str] = frozenset()
    backend: str = "reference"
    threads: int = 1
    seed: int = 0

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"Case({', '.join(changed)})"


# The minimal gated unit has no function of its own: ``Recurrent`` alone runs it.
FUNCTIONS = sorted({*CELLS} - {"mgu"})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case that the arguments allow."""
    cell = draw(st.sampled_from(FUNCTIONS))
    form = draw(st.sampled_from(FORMS))
    # From 8 rows a step on, the C++ kernels do the input's products on the walk.
    batch = 1 if form == "unbatched" else draw(st.integers(1, 6) | st.sampled_from([9, 14]))
    if form in ("packed", "packed_sorted", "lengths"):
        lengths = draw(st.lists(st.integers(1, 9), min_size=batch, max_size=batch))
        lengths = sorted(lengths, reverse=True) if form == "packed_sorted" else lengths
    else:
        lengths = [draw(st.integers(1, 9))] * batch
    # Sizes around the widths of vectors and tiles.
    sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 48, 63, 65, 100]))
    hidden = draw(sizes)
    projection = draw(st.none() | st.integers(1, hidden - 1)) if CELLS[cell].projected is not None and hidden > 1 else None
    dtype = draw(st.sampled_from(list(DTYPES)))
    # relu has a kink at zero. Where rounding crosses it gradients jump, and only the last layer's crossings can be seen.
    layers = draw(st.integers(1, 1 if cell == "rnn_relu" and dtype in ("bfloat16", "float16") else 3))
    return Case(
        cell=cell,
        form=form,
        lengths=tuple(lengths),
        inputs=draw(sizes),
        hidden=hidden,
        projection=projection,
        layers=layers,
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        given_states=draw(st.booleans()),
        reset=draw(st.booleans()),
        dtype=dtype,
        input_layout=draw(st.sampled_from(list(LAYOUTS))),
        state_layout=draw(st.sampled_from(list(LAYOUTS))),
        weight_layout=draw(st.sampled_from(list(LAYOUTS))),
        graded=draw(st.sampled_from(["all", "out", "states", "none"])),
        frozen=draw(st.frozensets(st.sampled_from(["input", "states", *Weights._fields]))),
        backend=draw(st.sampled_from(CPU_BACKENDS)),
        threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
    )


class Problem:
    """The tensors of a case, in one dtype: leaves that hold the numbers, from which the arguments are made."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.cell = CELLS[case.cell]
        self.directions = 2 if case.bidirectional else 1
        self.dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(case.seed)

        def numbers(*shape: int, scale: float = 1.0) -> Tensor:
            # Rounded to the dtype of the case here, once: what differs later is what was computed.
            return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(self.dtype)

        length, batch = max(case.lengths), len(case.lengths)
        size = case.projection or case.hidden
        gates = self.cell.num_gates * case.hidden
        self.leaves: dict[str, Tensor] = {"input": numbers(length, batch, case.inputs)}
        recurrences = case.layers * self.directions
        if case.given_states:
            for name, width in zip(self.cell.states, (size, case.hidden), strict=False):
                self.leaves[f"states.{name}"] = numbers(recurrences, batch, width)
        for index in range(recurrences):
            inputs = case.inputs if index < self.directions else self.directions * size
            weights = {"ih": (gates, inputs), "hh": (gates, size), "bias_ih": (gates,), "bias_hh": (gates,)}
            if not case.bias:
                weights = {key: shape for key, shape in weights.items() if "bias" not in key}
            if case.projection:
                weights["hr"] = (size, case.hidden)
            for key, shape in weights.items():
                # Recurrent matrices whose norm is about one: with a larger one errors grow from step to step, whoever computes.
                self.leaves[f"{key}.{index}"] = numbers(*shape, scale=0.5 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.5)
        self.reset = torch.rand(length, batch, generator=generator) < 0.3 if case.reset else None
        self.d_results: list[Tensor] | None = None
        self.generator = generator

    def tensors(self, dtype: torch.dtype, arranged: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The leaves in a dtype, and what a layer is given: they, or, ``arranged``, their views and copies."""
        case = self.case
        layouts = {"input": case.input_layout, "states": case.state_layout}
        leaves, arguments = {}, {}
        for name, value in self.leaves.items():
            kind = name.split(".")[0]
            leaf = value.to(dtype).clone()
            if kind not in case.frozen:
                leaf.requires_grad_()
            leaves[name] = leaf
            layout = layouts.get(kind, case.weight_layout)
            # An expanded tensor has other gradients, not other memory alone, so the reference has it too.
            arguments[name] = LAYOUTS[layout](leaf) if arranged or layout == "expanded" else leaf
        return leaves, arguments

    def weights(self, arguments: dict[str, Tensor]) -> list[Weights]:
        count = self.case.layers * self.directions
        return [Weights(*(arguments.get(f"{field}.{index}") for field in Weights._fields)) for index in range(count)]

    def states(self, arguments: dict[str, Tensor]) -> tuple[Tensor, ...] | None:
        if not self.case.given_states:
            return None
        return tuple(arguments[f"states.{name}"] for name in self.cell.states)

    def results(self, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What the reference gives: out (rows of all sequences, padded with zeros), the states, and the leaves."""
        case = self.case
        leaves, arguments = self.tensors(dtype, arranged=False)
        weights, states = self.weights(arguments), self.states(arguments)
        length, batch = max(case.lengths), len(case.lengths)
        if states is None:
            widths = (case.projection or case.hidden, case.hidden)[: len(self.cell.states)]
            states = tuple(torch.zeros(len(weights), batch, width, dtype=dtype) for width in widths)
        # One sequence at a time: no scheme of rows and no sorting.
        outs, ends = [], []
        for n, steps in enumerate(case.lengths):
            rows, last = arguments["input"][:steps, n], []
            for first in range(0, len(weights), self.directions):
                part = slice(first, first + self.directions)
                ends_of, outs_of = [], []
                for d, weight in enumerate(weights[part]):
                    before = tuple(state[first + d : first + d + 1, n : n + 1] for state in states)
                    out, end = fused_rnn.reference.layer(
                        self.cell, rows, Steps(steps, 1), before, (weight,), (d == 1,), self._reset(n, steps, d)
                    )
                    outs_of.append(out)
                    ends_of.append(end)
                rows = torch.cat(outs_of, 1)
                end = tuple(torch.cat(parts) for parts in zip(*ends_of, strict=True))
                last.append(end)
            outs.append(torch.nn.functional.pad(rows, (0, 0, 0, length - steps)))
            ends.append([torch.cat(layers) for layers in zip(*last, strict=True)])
        return [torch.stack(outs, 1), *(torch.cat(state, 1) for state in zip(*ends, strict=True))], leaves

    def _reset(self, n: int, steps: int, direction: int) -> Tensor | None:
        """Where sequence ``n`` starts anew, in the order of its rows."""
        if self.reset is None:
            return None
        reset = self.reset[:steps, n]
        if direction:
            # A flag starts a new part of the sequence. Walking backwards, the state is dropped after that part's first step.
            reset = torch.cat((reset[1:], torch.zeros(1, dtype=torch.bool)))
        return reset[None]

    def fused_results(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """As ``results``, by the fused kernels, through the arguments that a user gives."""
        case = self.case
        leaves, arguments = self.tensors(self.dtype, arranged=True)
        weights, states = self.weights(arguments), self.states(arguments)
        input: Any = arguments["input"]
        options: dict[str, Any] = {"bidirectional": case.bidirectional}
        if self.reset is not None:
            options["reset"] = self.reset
        if case.form == "batch_first":
            input, options["batch_first"] = input.transpose(0, 1), True
            if self.reset is not None:
                options["reset"] = self.reset.t()
        elif case.form == "unbatched":
            input = input[:, 0]
            states = None if states is None else tuple(state[:, 0] for state in states)
            if self.reset is not None:
                options["reset"] = self.reset[:, 0]
        elif case.form.startswith("packed"):
            input = pack_padded_sequence(input, list(case.lengths), enforce_sorted=case.form == "packed_sorted")
            if self.reset is not None:
                options["reset"] = pack_padded_sequence(
                    self.reset, list(case.lengths), enforce_sorted=case.form == "packed_sorted"
                )
        elif case.form == "lengths":
            options["lengths"] = torch.tensor(case.lengths)
        # Some cells are options of another one's function.
        function: Any = {"gru_reset_before": functional.gru, "lstm_coupled": functional.lstm}.get(case.cell)
        if function is None:
            function = getattr(functional, case.cell)
        elif case.cell == "gru_reset_before":
            options["reset_after"] = False
        else:
            options["coupled"] = True
        hx: Any = None if states is None else states if len(self.cell.states) > 1 else states[0]
        out, ends = function(input, weights, hx, **options)
        ends = list(ends) if len(self.cell.states) > 1 else [ends]
        if isinstance(out, PackedSequence):
            out = torch.nn.utils.rnn.pad_packed_sequence(out, total_length=max(case.lengths))[0]
        elif case.form == "batch_first":
            out = out.transpose(0, 1)
        elif case.form == "unbatched":
            out, ends = out[:, None], [end[:, None] for end in ends]
        return [out, *ends], leaves

    def gradients(self, results: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a fixed random combination of the results that the case wants graded, with respect to what is not frozen."""
        if self.d_results is None:
            self.d_results = [torch.randn(r.shape, generator=self.generator, dtype=torch.float64) for r in results]
        if self.case.graded == "none":
            return {}
        chosen = {"all": slice(None), "out": slice(1), "states": slice(1, None)}[self.case.graded]
        asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        pairs = [(r, d.to(self.dtype).to(r.dtype)) for r, d in zip(results[chosen], self.d_results[chosen], strict=True)]
        pairs = [(result, d) for result, d in pairs if result.requires_grad]
        if not asked or not pairs:
            return {}
        given, d_given = zip(*pairs, strict=True)
        found = torch.autograd.grad(given, list(asked.values()), d_given, allow_unused=True)
        # No path and a path of zeros are the same.
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(asked.items(), found, strict=True)
        }


def check(case: Case) -> None:
    """Compare the fused layers with the reference in float64, as near as the reference is in the case's own dtype."""
    problem = Problem(case)
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with fused_rnn.backend(case.backend), torch.set_grad_enabled(case.graded != "none"):
            results, leaves = problem.fused_results()
            before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
            grads = problem.gradients(results, leaves)
    finally:
        torch.set_num_threads(threads)
    expected, exact_leaves = problem.results(torch.float64)
    d_expected = problem.gradients(expected, exact_leaves)
    plain, plain_leaves = problem.results(problem.dtype)
    d_plain = problem.gradients(plain, plain_leaves)
    for name, *values in zip(("out", *(f"{name}_n" for name in problem.cell.states)), results, plain, expected, strict=True):
        assert_close_to_reference(*values, name=name)
    assert grads.keys() == d_expected.keys()
    if case.cell == "rnn_relu" and not torch.equal(results[0] > 0, expected[0] > 0):
        return
    for name, grad in grads.items():
        assert_close_to_reference(grad, d_plain[name], d_expected[name], name=f"d_{name}")
    for name, leaf in leaves.items():
        assert torch.equal(leaf, before[name]), f"{name} was written"


@given(case=cases())
def test_any_case(case: Case) -> None:
    note(f"check({case!r})")
    check(case)


@pytest.mark.parametrize("cell", FUNCTIONS)
def test_the_check_sees_a_wrong_number(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail is none: a gradient off by a thousandth is found."""
    case = Case(cell=cell, lengths=(4, 4), inputs=3, hidden=5, given_states=True)
    check(case)
    whole, calls = Problem.gradients, []

    def wrong(self: Problem, results: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        grads = whole(self, results, leaves)
        # The first call is for the fused layers, the others are the reference's.
        if not calls:
            grads["hh.0"] = grads["hh.0"] * 1.001
        calls.append(self)
        return grads

    monkeypatch.setattr(Problem, "gradients", wrong)
    with pytest.raises(AssertionError, match=r"d_hh\.0: error"):
        check(case)


def test_a_case_prints_as_python() -> None:
    case = Case(cell="gru", lengths=(3, 1), form="packed", frozen=frozenset({"ih"}), seed=7)
    assert repr(case) == "Case(cell='gru', form='packed', lengths=(3, 1), frozen=frozenset({'ih'}), seed=7)"
    assert eval(repr(case)) == case
