"""torch.compile, torch.export and other tracers of modules: the same results as eager code, traced once."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_support import IN, MODULES, H, assert_same, flat, fresh, make, packed, results, states_of  # noqa: F401
from older_torch import dynamo_with_values
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn.kernels import dispatch


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("rnn_relu", "dense"),
        ("lstm_proj", "dense"),
        pytest.param("lstm", "packed", marks=dynamo_with_values),
        pytest.param("gru", "packed", marks=dynamo_with_values),
    ],
)
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


@dynamo_with_values
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


@dynamo_with_values
def test_packed_sequence_made_inside() -> None:
    module, data, sizes = _FromBatchSizes(), torch.randn(7, IN, dtype=torch.float64), torch.tensor([4, 2, 1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(flat(compiled(data, sizes)), flat(module(data, sizes)))


@dynamo_with_values
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


@pytest.mark.parametrize("kind", ["dense", pytest.param("packed", marks=dynamo_with_values)])
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
    for way, kind in itertools.product(
        ("forward", "backward"), {type(dispatch._load(name)) for name in ("reference", "numba")}
    ):
        real = getattr(kind, way)

        def spy(backend: Any, *args: Any, real: Any = real, way: str = way, **options: Any) -> Any:
            used.append(f"{way} {backend.name}")
            return real(backend, *args, **options)

        monkeypatch.setattr(kind, way, spy)
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


def test_wrong_batch_sizes_raise_when_the_program_runs() -> None:
    module = _FromBatchSizes()
    data, sizes = torch.randn(7, IN, dtype=torch.float64), torch.tensor([4, 2, 1])
    compiled = torch.compile(module, backend="aot_eager")
    compiled(data, sizes)
    for wrong, message in (
        (sizes + 1, "add up to 10 rows"),
        (sizes.flip(0), "decreasing order"),
        (sizes.int(), "1D int64 tensor on the CPU"),
    ):
        with pytest.raises(RuntimeError, match=message):
            compiled(data, wrong)


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
    # In both directions, so that the reverse direction's own masks are traced too.
    "reset": (("reset", "return_cell_states"), True),
    "lengths": (("lengths",), False),
    "all": (("lengths", "reset", "return_cell_states"), True),
}


@pytest.mark.parametrize("case", ["reset", *(pytest.param(case, marks=dynamo_with_values) for case in ("lengths", "all"))])
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


@dynamo_with_values
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_in_inductor(batch_first: bool) -> None:
    module = make("gru", batch_first=batch_first, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for lengths in ([2, 4, 0], [5, 6]):
        x = torch.randn(*((len(lengths), 6) if batch_first else (6, len(lengths))), IN, dtype=torch.float64)
        both = [functools.partial(each, lengths=torch.tensor(lengths)) for each in (compiled, module)]
        assert_same(*(results(each, module, x, None, []) for each in both))


@dynamo_with_values
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


@dynamo_with_values
def test_packed_resets() -> None:
    """Checked when the program runs; two directions, whose masks differ."""
    module = fused_rnn.GRU(IN, H, 2, bidirectional=True, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    given = packed(torch.randn(4, 3, IN, dtype=torch.float64), [2, 4, 1], enforce_sorted=False)
    reset = packed(torch.rand(4, 3) < 0.4, [2, 4, 1], enforce_sorted=False)
    assert_same(flat(compiled(given, reset=reset)), flat(module(given, reset=reset)))
    with pytest.raises(ValueError, match="reset: expected the batch_sizes of the input"):
        compiled(given, reset=packed(torch.rand(4, 3) < 0.4, [2, 3, 2], enforce_sorted=False))
