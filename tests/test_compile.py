"""torch.compile, and what else sees operators in place of the kernels: the same results as eager code, traced once."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import dispatch, operators, reference
from fused_rnn.cells import CELLS, LSTM, Cell, Weights
from fused_rnn.steps import Steps

IN, H = 5, 7
MODULES = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "batch_first": True}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {"bias": False}),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What one test compiled, or the dynamic sizes that it made torch guess, must not reach the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(case: str, **options: Any) -> torch.nn.Module:
    name, own = MODULES[case]
    module: torch.nn.Module = getattr(fused_rnn, name)(IN, H, **{"dtype": torch.float64, **own, **options})
    return module


def packed(x: Tensor, lengths: Sequence[int], enforce_sorted: bool) -> PackedSequence:
    return pack_padded_sequence(x, list(lengths), enforce_sorted=enforce_sorted)


def flat(result: Any) -> list[Tensor]:
    out, states, *cells = result
    states = states if isinstance(states, tuple) else (states,)
    return [out.data if isinstance(out, PackedSequence) else out, *states, *cells]


def states_of(module: torch.nn.Module, batch: int) -> list[Tensor]:
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or H, H] if isinstance(module, fused_rnn.LSTM) else [H]
    return [torch.randn(count, batch, size, dtype=torch.float64) for size in sizes]


def results(
    function: Callable[..., Any],
    module: torch.nn.Module,
    data: Tensor,
    given: PackedSequence | None,
    states: Sequence[Tensor],
    dynamic: Sequence[int] = (),
) -> list[Tensor]:
    """The outputs, and the gradients of input, initial states and parameters."""
    data = data.detach().clone().requires_grad_()
    torch._dynamo.mark_dynamic(data, dynamic)
    states = [state.detach().clone().requires_grad_() for state in states]
    hx = () if not states else (states[0],) if len(states) == 1 else (tuple(states),)
    torch.manual_seed(1)
    values = flat(function(data if given is None else PackedSequence(data, *given[1:]), *hx))
    loss = sum((value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum() for value in values)
    return [*(value.detach() for value in values), *torch.autograd.grad(loss, [data, *states, *module.parameters()])]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("case", "kind"), [*((case, "dense") for case in MODULES), ("lstm_proj", "packed"), ("gru", "packed")])
def test_training_is_that_of_eager_code(case: str, kind: str) -> None:
    """Two layers, two directions, dropout, with and without initial states; no graph breaks, and no T and N traced again."""
    module = make(case, num_layers=2, bidirectional=True, dropout=0.5)
    for with_states in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        # The first sizes are none of the module's: sizes that are equal in the first call torch takes for the same.
        for lengths in ([4, 9, 2, 1, 9, 8], [8, 3], [3, 6, 6, 6, 12]):
            batch = len(lengths)
            data = torch.randn(max(lengths), batch, IN, dtype=torch.float64)
            given = packed(data, lengths, enforce_sorted=False) if kind == "packed" else None
            if given is not None:
                data = given.data
            elif module.batch_first:
                batch = max(lengths)
            states = states_of(module, batch) if with_states else []
            with torch._dynamo.config.patch(error_on_recompile=len(lengths) < 6):
                assert_same(results(compiled, module, data, given, states), results(module, module, data, given, states))


@pytest.mark.parametrize("case", MODULES)
def test_marked_sizes_compile_once(case: str) -> None:
    module = make(case, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, batch in ((6, 3), (2, 9), (40, 2), (11, 11)):
            x = torch.randn(length, batch, IN, dtype=torch.float64)
            assert_same(results(compiled, module, x, None, [], dynamic=(0, 1)), results(module, module, x, None, []))
    assert counter.frame_count == 1


def test_sizes_that_torch_finds_to_vary_compile_twice() -> None:
    """Without a word about sizes torch takes the first for fixed, and no later one."""
    module, counter = make("gru"), CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length, batch in ((6, 3), (7, 4), (8, 5), (31, 2), (2, 17)):
        compiled(torch.randn(length, batch, IN, dtype=torch.float64))
    assert counter.frame_count == 2


def test_packed_lengths_compile_once() -> None:
    """The number of sequences is in no shape of a sorted PackedSequence: it is read when the program runs."""
    module = make("lstm", num_layers=2)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for lengths in ([6, 4, 4], [9, 1], [5, 5, 5, 5], [3, 2, 1]):
        given = packed(torch.randn(max(lengths), len(lengths), IN, dtype=torch.float64), lengths, enforce_sorted=True)
        assert_same(results(compiled, module, given.data, given, []), results(module, module, given.data, given, []))
    assert counter.frame_count == 1


class _FromBatchSizes(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = make("gru")

    def forward(self, data: Tensor, batch_sizes: Tensor) -> Any:
        return self.rnn(PackedSequence(data, batch_sizes))


class _Padded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = make("gru")

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        out, h = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(out)[0], h


def test_packed_sequence_made_inside() -> None:
    module, data, sizes = _FromBatchSizes(), torch.randn(7, IN, dtype=torch.float64), torch.tensor([4, 2, 1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(flat(compiled(data, sizes)), flat(module(data, sizes)))


def test_packing_inside_breaks_the_graph_and_stays_right() -> None:
    """Not traced by torch: pack_padded_sequence and pad_packed_sequence; what is around them is."""
    module, x, lengths = _Padded(), torch.randn(6, 3, IN, dtype=torch.float64), torch.tensor([2, 6, 3])
    compiled = torch.compile(module, backend="aot_eager")
    assert_same(flat(compiled(x, lengths)), flat(module(x, lengths)))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name: str) -> None:
    module = getattr(fused_rnn, name)(IN, H, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, IN), (4, IN), (IN,)):
        x = torch.randn(shape, dtype=torch.float64)
        both = []
        for function in (compiled, module):
            out = function(x)
            values = [*out] if isinstance(out, tuple) else [out]
            both.append([*values, *torch.autograd.grad(sum(value.sin().sum() for value in values), module.parameters())])
        assert_same(*both)


def test_unbatched_and_small_batches() -> None:
    module = make("lstm")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((6, IN), (6, 3, IN), (6, 1, IN), (1, 1, IN), (6, 0, IN)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_same(results(compiled, module, x, None, []), results(module, module, x, None, []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["lstm_proj", "gru", "rnn_tanh"])
def test_other_dtypes(case: str, dtype: torch.dtype) -> None:
    module = make(case, dtype=dtype, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, IN, dtype=dtype)
    for a, b in zip(results(compiled, module, x, None, []), results(module, module, x, None, []), strict=True):
        # AOTAutograd adds the gradients of a value that is used twice in another order.
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_inductor(kind: str) -> None:
    module = make("lstm_proj", num_layers=2, bidirectional=True, dropout=0.5)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    # Dropout's random numbers are then those of eager code.
    with torch._inductor.config.patch(fallback_random=True):
        for lengths in ([4, 9, 2], [8, 3, 8, 1]):
            data = torch.randn(max(lengths), len(lengths), IN, dtype=torch.float64)
            given = packed(data, lengths, enforce_sorted=False) if kind == "packed" else None
            data = data if given is None else given.data
            for actual, expected in zip(
                results(compiled, module, data, given, []), results(module, module, data, given, []), strict=True
            ):
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_converted_model_trains_compiled() -> None:
    """A few steps of an optimizer, compiled, around a converted model: the same weights as in eager code."""

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(11, IN)
            self.rnn = torch.nn.LSTM(IN, H, bidirectional=True)
            self.head = torch.nn.Linear(2 * H, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.rnn(self.embedding(words))[0])

    model = fused_rnn.convert(Tagger().double())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for _ in range(3):
        words = torch.randint(11, (6, 3))
        for each, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            each(words).square().mean().backward()
            optimizer.step()
    assert_same([*model.parameters()], [*twin.parameters()])


def test_inference_keeps_no_tape() -> None:
    module, x = make("lstm"), torch.randn(6, 3, IN, dtype=torch.float64)
    for training in (False, True):
        record = EagerAndRecordGraphs()
        torch._dynamo.reset()
        with torch.set_grad_enabled(training):
            torch.compile(module, fullgraph=True, backend=record)(x)
        (node,) = [node for node in record.graphs[0].graph.nodes if "layer_forward" in str(node.target)]
        assert node.args[-2] is training
    with torch.inference_mode():
        assert_same(flat(torch.compile(module, fullgraph=True, backend="aot_eager")(x)), flat(module(x)))


def test_backend_is_chosen_when_the_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiled program, each backend; the backward has the forward's, outside of the `with` and in another's."""
    used: list[str] = []
    for name in ("forward", "backward"):
        real = getattr(operators.layers if name == "forward" else operators.gradients, name)

        def spy(call: Any, *args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            used.append(f"{name} {call.kernels.backend}")
            return real(call, *args, **options)

        monkeypatch.setattr(operators.layers if name == "forward" else operators.gradients, name, spy)
    for case in ("lstm", "rnn_tanh"):
        module, x = make(case), torch.randn(6, 3, IN, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            expected = flat(module(x))
            for name in ("reference", "numba", "reference"):
                used.clear()
                with fused_rnn.backend(name):
                    values = flat(compiled(x))
                values[0].sin().sum().backward()
                with fused_rnn.backend("numba"):
                    flat(compiled(x))
                torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
                assert used == [f"forward {name}", f"backward {name}", "forward numba"]
            monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
            used.clear()
            compiled(x)
            assert used == ["forward reference"]
            monkeypatch.delenv("FUSED_RNN_BACKEND")


def test_backend_inside_compiled_code() -> None:
    """torch.compile does not trace the `with`: it runs in eager code, and is obeyed there."""
    module, x = make("gru"), torch.randn(6, 3, IN, dtype=torch.float64)

    def inside(x: Tensor) -> Tensor:
        with fused_rnn.backend("reference"):
            return module(x)[0]

    torch.testing.assert_close(torch.compile(inside, backend="aot_eager")(x), module(x)[0], rtol=1e-12, atol=1e-12)


def test_every_backend_trains_compiled(backend: str) -> None:
    module = make("lstm_proj", bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, IN, dtype=torch.float64)
    assert_same(results(compiled, module, x, None, []), results(module, module, x, None, []))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sizes: sizes + 1, "add up to 10 rows"),
        (lambda sizes: sizes.flip(0), "decreasing order"),
        (lambda sizes: sizes.int(), "1D int64 tensor on the CPU"),
    ],
)
def test_wrong_batch_sizes_raise_when_the_program_runs(change: Callable[[Tensor], Tensor], message: str) -> None:
    module = _FromBatchSizes()
    data, sizes = torch.randn(7, IN, dtype=torch.float64), torch.tensor([4, 2, 1])
    compiled = torch.compile(module, backend="aot_eager")
    compiled(data, sizes)
    with pytest.raises(RuntimeError, match=message):
        compiled(data, change(sizes))


def test_wrong_states_of_a_packed_sequence() -> None:
    module = make("gru")
    given = packed(torch.randn(3, 3, IN, dtype=torch.float64), [3, 2, 1], enforce_sorted=True)
    with pytest.raises(RuntimeError, match="hidden"):
        torch.compile(module, backend="aot_eager")(given, torch.zeros(1, 4, H, dtype=torch.float64))


def test_wrong_arguments_raise_as_in_eager_code() -> None:
    compiled = torch.compile(make("gru"), backend="aot_eager")
    with pytest.raises(RuntimeError, match="Expected 5, got 6"):
        compiled(torch.randn(4, 3, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        compiled(torch.randn(4, 3, IN))
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        compiled(torch.randn(0, 3, IN, dtype=torch.float64))


# --- What torch.nn has not. ---


KEYWORDS = {
    "reset": (("reset",), True),
    "return_cell_states": (("return_cell_states",), True),
    "lengths": (("lengths",), False),
    # In both directions, so that the reverse direction's own masks are traced too.
    "all": (("lengths", "reset", "return_cell_states"), True),
}


@pytest.mark.parametrize("case", KEYWORDS)
def test_keywords(case: str) -> None:
    """Two layers in training, for any number of steps and sequences, and any lengths of them."""
    names, bidirectional = KEYWORDS[case]
    module = fused_rnn.LSTM(IN, H, 2, bidirectional=bidirectional, dropout=0.5, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for index, lengths in enumerate(([2, 4, 0], [6, 6], [5, 1], [0, 0, 0, 0])):
        length, batch = (4, 6, 6, 9)[index], len(lengths)
        x = torch.randn(length, batch, IN, dtype=torch.float64)
        every: dict[str, Any] = {
            "reset": torch.rand(length, batch) < 0.4,
            "return_cell_states": True,
            "lengths": torch.tensor(lengths),
        }
        given = {name: every[name] for name in names}

        def run(call: Callable[..., Any], x: Tensor = x, given: dict[str, Any] = given) -> list[Tensor]:
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            found = flat(call(leaf, **given))
            return [*found, *torch.autograd.grad(sum(value.square().sum() for value in found), [leaf, *module.parameters()])]

        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            assert_same(run(compiled), run(module))


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_in_inductor(batch_first: bool) -> None:
    module = make("gru", batch_first=batch_first, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for lengths in ([2, 4, 0], [5, 6]):
        x = torch.randn(*((len(lengths), 6) if batch_first else (6, len(lengths))), IN, dtype=torch.float64)
        both = [functools.partial(each, lengths=torch.tensor(lengths)) for each in (compiled, module)]
        assert_same(*(results(each, module, x, None, []) for each in both))


def test_wrong_lengths_raise_when_the_program_runs() -> None:
    module = make("gru")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, IN, dtype=torch.float64)
    compiled(x, lengths=torch.tensor([1, 0, 6]))
    for wrong in (7, -1):
        with pytest.raises(ValueError, match=f"lengths: expected values from 0 to 6, the steps of the input, got {wrong}"):
            compiled(x, lengths=torch.tensor([1, 2, wrong]))


def test_lengths_that_other_tracers_see() -> None:
    """Recorded as values that are read at each run, and T as that of the input."""

    class Lengths(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = make("gru", batch_first=True, bidirectional=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return self.rnn(x, lengths=lengths)

    def inputs(length: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
        return torch.randn(len(lengths), length, IN, dtype=torch.float64), torch.tensor(lengths)

    module, given = Lengths(), inputs(6, [2, 6, 1])
    for trace, other in (
        (lambda: make_fx(module)(*given), inputs(6, [0, 3, 5])),
        (lambda: torch.jit.trace(module, given), inputs(4, [0, 3])),
        (lambda: torch.jit.trace(module, given), inputs(9, [9, 1, 9, 9])),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = trace()
        for actual, expected in zip(flat(traced(*other)), flat(module(*other)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- The operators themselves. ---

CHECKED = {
    "rnn_tanh": {},
    "rnn_relu": {"bias": False, "batch_sizes": True},
    "lstm": {"reset": True},
    "lstm_proj": {"projection": 2, "batch_sizes": True, "reset": True},
    "lstm_infer": {"keep": False},
    "lstm_cells": {"cell_states": True},
    "gru": {"one_bias": True},
    "gru_bfloat16": {"dtype": torch.bfloat16, "recurrences": 1},
}


def arguments(
    case: str,
    *,
    bias: bool = True,
    one_bias: bool = False,
    batch_sizes: bool = False,
    reset: bool = False,
    projection: int = 0,
    keep: bool = True,
    cell_states: bool = False,
    dtype: torch.dtype = torch.float64,
    recurrences: int = 2,
    requires_grad: bool = True,
) -> tuple[Any, ...]:
    cell = CELLS[case if case in CELLS else case.partition("_")[0]]
    length, batch = 3, 2
    rows = 5 if batch_sizes else length * batch

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)

    weights: list[Tensor] = []
    for _ in range(recurrences):
        gates = cell.num_gates * H
        weights += [random(gates, IN), random(gates, projection or H)]
        weights += [random(gates) for _ in range(bias + (bias and not one_bias))]
        weights += [random(projection, H)] if projection else []
    present = [1, 1, int(bias), int(bias and not one_bias), int(projection > 0)] * recurrences
    states = [random(recurrences, batch, projection or H if name == "h" else H) for name in cell.states]
    sizes = torch.tensor([2, 2, 1]) if batch_sizes else None
    resets = torch.rand(rows) < 0.3 if reset else None
    return (cell.name, random(rows, IN), states, weights, present, sizes, resets, [0, 1][:recurrences], keep, cell_states)


@pytest.mark.parametrize("case", CHECKED)
def test_opcheck_forward(case: str) -> None:
    opcheck(torch.ops.fused_rnn.layer_forward, arguments(case, **CHECKED[case]))


@pytest.mark.parametrize("case", [case for case in CHECKED if CHECKED[case].get("keep", True)])
def test_opcheck_backward(case: str) -> None:
    given = arguments(case, **CHECKED[case], requires_grad=False)
    out, *ends, tape = torch.ops.fused_rnn.layer_forward(*given)
    wanted = [1] * (1 + len(given[2]) + len(given[3]))
    wanted[1] = 0
    for d_outputs, flags in (
        ([torch.randn_like(value) for value in (out, *ends)], [1] * (1 + len(ends))),
        ([torch.randn_like(ends[-1])], [0] * len(ends) + [1]),
    ):
        opcheck(torch.ops.fused_rnn.layer_backward, (*given[:-2], out, tape, d_outputs, flags, wanted))


def test_opcheck_of_steps() -> None:
    opcheck(torch.ops.fused_rnn.check_batch_sizes, (torch.tensor([3, 1]), 4, 3))
    opcheck(torch.ops.fused_rnn.one_step_earlier, (torch.tensor([True, False, False, True]), torch.tensor([3, 1])))


@pytest.mark.parametrize("lengths", [[2, 0, 3], [0, 0, 0], [4, 4, 4], []], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_opcheck_of_lengths(lengths: list[int], batch_first: bool) -> None:
    padded = torch.randn(*((len(lengths), 4) if batch_first else (4, len(lengths))), IN)
    opcheck(torch.ops.fused_rnn.ragged, (torch.tensor(lengths, dtype=torch.int32), padded, batch_first))


def _layers(dtype: torch.dtype = torch.float64) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """A layer through the operators, the reference's, and an input."""
    cell: Cell = LSTM
    weights = (Weights(torch.randn(4 * H, IN, dtype=dtype), torch.randn(4 * H, H, dtype=dtype)),)
    states = (torch.zeros(1, 3, H, dtype=dtype),) * 2
    x = torch.randn(12, IN, dtype=dtype)
    return (
        lambda x: operators.layer(cell, x, Steps(4, 3), states, weights, (False,))[0],
        lambda x: reference.layer(cell, x, Steps(4, 3), states, weights, (False,))[0],
        x,
    )


def test_operators_under_torch_func() -> None:
    """Exported programs and compiled functions take the operators through torch.func."""
    operator, exact, x = _layers()
    many = torch.stack([x, 2 * x])

    def twice(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        inner = torch.func.grad(lambda x: layer(x).sin().sum())
        return torch.func.grad(lambda x: inner(x).sin().sum())

    for compiled in (False, True):
        wrap = (lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)) if compiled else (lambda f: f)
        for transform in (
            lambda layer: torch.func.grad(lambda x: layer(x).sin().sum()),
            twice,
            lambda layer: lambda x: torch.func.vmap(layer)(torch.stack([x, 2 * x])),
            lambda layer: lambda x: torch.func.vmap(torch.func.grad(lambda x: layer(x).sin().sum()))(torch.stack([x, 2 * x])),
        ):
            torch.testing.assert_close(wrap(transform(operator))(x), transform(exact)(x), rtol=1e-10, atol=1e-10)
    assert torch.func.vmap(operator)(many).shape == (2, 12, H)


def test_double_backward_of_an_operator() -> None:
    operator, exact, x = _layers()
    found = []
    for layer in (operator, exact):
        input = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(input).sin().sum(), input, create_graph=True)
        found.append(torch.autograd.grad(grad.sin().sum(), input)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_forward_mode_raises() -> None:
    """No tangent is silently zero."""
    operator, _, x = _layers()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(operator, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        operator(torch.autograd.forward_ad.make_dual(x, x))


def test_derivative_of_the_backward_operator_raises() -> None:
    given = arguments("gru")
    out, end, tape = torch.ops.fused_rnn.layer_forward(*given)
    wanted = [1] + [0] * (len(given[2]) + len(given[3]))
    (grad,) = torch.ops.fused_rnn.layer_backward(*given[:-2], out, tape, [end], [0, 1], wanted)
    with pytest.raises(NotImplementedError, match="cannot be differentiated"):
        grad.sum().backward()


def test_operators_share_no_memory() -> None:
    """One step of one row takes the backends' way of its own."""
    given = arguments("gru", recurrences=1, keep=False, requires_grad=False)
    given = (given[0], given[1][:1], [given[2][0][:, :1].contiguous()], *given[3:])
    outputs = torch.ops.fused_rnn.layer_forward(*given)
    pointers = [value.untyped_storage().data_ptr() for value in (given[1], *given[2], *given[3], *outputs) if value.numel()]
    assert len(set(pointers)) == len(pointers)


# --- What else sees operators. ---


@pytest.mark.parametrize("case", MODULES)
def test_fake_tensors_do_not_reach_the_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = flat(make(case)(torch.randn(6, 3, IN, dtype=torch.float64)))
    monkeypatch.setattr(dispatch, "kernels", None)
    with FakeTensorMode() as mode:
        module, x = make(case), torch.randn(6, 3, IN, dtype=torch.float64)
        inside = flat(module(x))
    outside = flat(module(x))
    sum(value.sum() for value in outside).backward()
    for values in (inside, outside):
        for value, like in zip(values, expected, strict=True):
            assert isinstance(value, FakeTensor)
            assert value.fake_mode is mode
            assert (value.shape, value.stride(), value.dtype) == (like.shape, like.stride(), like.dtype)
    assert all(isinstance(parameter.grad, FakeTensor) for parameter in module.parameters())


def test_meta_device() -> None:
    module = make("lstm", device="meta")
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(6, 3, IN, device="meta", dtype=torch.float64))
    assert [value.shape for value in flat(out)] == [(6, 3, H), (1, 3, H), (1, 3, H)]


def test_make_fx() -> None:
    """What it records computes; recorded below the operators it would be a tensor that nobody fills."""
    module, x = make("lstm"), torch.randn(6, 3, IN, dtype=torch.float64)
    traced = make_fx(lambda x: module(x)[0])(x)
    other = torch.randn(6, 3, IN, dtype=torch.float64)
    torch.testing.assert_close(traced(other), module(other)[0], rtol=0, atol=0)


def test_checkpoint_inside_compiled_code() -> None:
    module, x = make("gru"), torch.randn(6, 3, IN, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)[0]

    both = [
        torch.autograd.grad(run(x).sin().sum(), [*module.parameters()])
        for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function)
    ]
    assert_same(*both)
