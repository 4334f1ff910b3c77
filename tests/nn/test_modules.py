"""The contract of torch.nn's modules beyond their results: construction, state machinery, errors, odd shapes."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from older_torch import checks_of_2_13
from tolerances import assert_close_to_reference
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fused_rnn

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
layers = pytest.mark.parametrize("name", LAYERS)
cells = pytest.mark.parametrize("name", CELLS)


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Our module and torch.nn's, with the same parameters."""
    ours, theirs = getattr(fused_rnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def zeros(name: str, *shape: int, **kwargs: Any) -> Any:
    """A state of zeros, a pair of them for the LSTM."""
    state = torch.zeros(*shape, **kwargs)
    return (state, state.clone()) if name.startswith("LSTM") else state


def flat(results: Any) -> list[torch.Tensor]:
    if isinstance(results, PackedSequence):
        return [results.data]
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for item in results for tensor in flat(item)]


def raised(function: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.type, str(caught.value)


# (constructor arguments, constructor keywords): what torch.nn refuses.
BAD_CONSTRUCTORS = [
    pytest.param((8, 16), {"bias": 1}, marks=checks_of_2_13),
    pytest.param((8, 16), {"batch_first": "yes"}, marks=checks_of_2_13),
    ((8.0, 16), {}),
    ((8, "16"), {}),
    pytest.param((0, 16), {}, marks=checks_of_2_13),
    ((8, -1), {}),
    ((8, 16, 0), {}),
    ((8, 16), {"proj_size": -1}),
    ((8, 16), {"proj_size": 16}),
    ((8, 16), {"dropout": 1.5}),
    ((8, 16), {"dropout": True}),
    ((8, 16), {"dtype": torch.int64}),
    ((8, 16), {"wrong": 1}),
    ((8,), {}),
    # Products beyond 2^63: of elements, and of the gates alone.
    ((2**40, 2**40), {}),
    ((2**40, 2**40), {"device": "meta"}),
]


@layers
@pytest.mark.parametrize(("args", "kwargs"), BAD_CONSTRUCTORS)
def test_constructor_errors_are_torchs(name: str, args: tuple, kwargs: dict) -> None:
    ours = raised(lambda: getattr(fused_rnn, name)(*args, **kwargs))
    assert ours == raised(lambda: getattr(nn, name)(*args, **kwargs))


@layers
def test_a_size_beyond_64_bits_raises(name: str) -> None:
    with pytest.raises((TypeError, RuntimeError), match=r"[Oo]verflow"):
        getattr(fused_rnn, name)(2**62, 2**62)


def test_nonlinearity_errors_are_torchs() -> None:
    assert raised(lambda: fused_rnn.RNN(8, 16, nonlinearity="x")) == raised(lambda: nn.RNN(8, 16, nonlinearity="x"))
    assert fused_rnn.RNN(8, 16, 1, "relu").mode == "RNN_RELU"
    input = torch.randn(3, 8)
    ours, theirs = (module.RNNCell(8, 16, nonlinearity="x") for module in (fused_rnn, nn))
    assert raised(lambda: ours(input)) == raised(lambda: theirs(input))


@layers
def test_dropout_with_one_layer_warns(name: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        getattr(fused_rnn, name)(8, 16, dropout=0.5)


# (input, state), each made when the test runs; the state's shape is given, or None for no state.
BAD_FORWARDS: dict[str, Callable[[str], tuple]] = {
    "rank": lambda name: (torch.randn(1, 4, 3, 8),),
    "dtype": lambda name: (torch.randn(4, 3, 8).double(),),
    "integers": lambda name: (torch.ones(4, 3, 8, dtype=torch.int64),),
    "features": lambda name: (torch.randn(4, 3, 7),),
    "hidden": lambda name: (torch.randn(4, 3, 8), zeros(name, 1, 3, 15)),
    "batch": lambda name: (torch.randn(4, 3, 8), zeros(name, 1, 2, 16)),
    "layers": lambda name: (torch.randn(4, 3, 8), zeros(name, 2, 3, 16)),
    "batched state rank": lambda name: (torch.randn(4, 3, 8), zeros(name, 1, 16)),
    "unbatched state rank": lambda name: (torch.randn(4, 8), zeros(name, 1, 3, 16)),
    "unbatched hidden": lambda name: (torch.randn(4, 8), zeros(name, 1, 15)),
    "no steps": lambda name: (torch.randn(0, 3, 8),),
    "no steps, no sequences": lambda name: (torch.randn(0, 0, 8),),
    "device of the input": lambda name: (torch.randn(4, 3, 8, device="meta"),),
    "device of the state": lambda name: (torch.randn(4, 3, 8), zeros(name, 1, 3, 16, device="meta")),
    "no tensor": lambda name: (None,),
}


@layers
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=checks_of_2_13 if case in ("dtype", "integers") else ()) for case in BAD_FORWARDS]
)
def test_forward_errors_are_torchs(name: str, case: str) -> None:
    ours, theirs = pair(name, 8, 16)
    arguments = BAD_FORWARDS[case](name)
    assert raised(lambda: ours(*arguments)) == raised(lambda: theirs(*arguments))


def test_lstm_takes_a_pair() -> None:
    ours, theirs = pair("LSTM", 8, 16)
    input, state = torch.randn(4, 3, 8), torch.zeros(1, 3, 16)
    assert raised(lambda: ours(input, (state,) * 3)) == raised(lambda: theirs(input, (state,) * 3))
    torch.testing.assert_close(flat(ours(input, [state, state])), flat(theirs(input, [state, state])))
    with pytest.raises(TypeError, match="must be tuple of Tensors, not Tensor"):
        ours(input, torch.zeros(2, 1, 3, 16))
    cell = fused_rnn.LSTMCell(8, 16)
    plain = nn.LSTMCell(8, 16)
    stacked = torch.zeros(2, 3, 16)
    assert raised(lambda: cell(input[0], stacked)) == raised(lambda: plain(input[0], stacked))


@layers
def test_dtype_of_a_state_is_checked(name: str) -> None:
    # torch.nn.LSTM on the CPU fails inside oneDNN here; the message is the one that torch gives on other devices.
    with pytest.raises(RuntimeError, match="found input tensor with Float and hidden tensor with Double"):
        getattr(fused_rnn, name)(8, 16)(torch.randn(4, 3, 8), zeros(name, 1, 3, 16, dtype=torch.float64))


@layers
def test_shapes_and_dtypes_of_weights_are_checked(name: str) -> None:
    module = getattr(fused_rnn, name)(8, 16)
    module.weight_hh_l0 = nn.Parameter(torch.randn(10, 16))
    with pytest.raises(RuntimeError, match=r"weight_hh of layer 0, direction 0: expected shape \(\d+, 16\), got \(10, 16\)"):
        module(torch.randn(4, 3, 8))
    module = getattr(fused_rnn, name)(8, 16, 2)
    module.weight_ih_l1 = nn.Parameter(module.weight_ih_l1.double())
    with pytest.raises(RuntimeError, match="found input tensor with Float and parameter tensor with Double"):
        module(torch.randn(4, 3, 8))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_complex_numbers_are_refused(name: str) -> None:
    module = getattr(fused_rnn, name)(8, 16, dtype=torch.complex64)
    with pytest.raises(NotImplementedError, match="complex64"):
        module(torch.randn(3, 8, dtype=torch.complex64))


BAD_CELLS: dict[str, Callable[[str], tuple]] = {
    "rank": lambda name: (torch.randn(1, 3, 8),),
    "state rank": lambda name: (torch.randn(3, 8), zeros(name, 1, 3, 16)),
    "dtype": lambda name: (torch.randn(3, 8).double(),),
    "state dtype": lambda name: (torch.randn(3, 8), zeros(name, 3, 16, dtype=torch.float64)),
    "features": lambda name: (torch.randn(3, 7),),
    "hidden": lambda name: (torch.randn(3, 8), zeros(name, 3, 15)),
    "batch": lambda name: (torch.randn(3, 8), zeros(name, 5, 16)),
    "unbatched input": lambda name: (torch.randn(8), zeros(name, 1, 16)),
    "unbatched state": lambda name: (torch.randn(3, 8), zeros(name, 16)),
    "device of the input": lambda name: (torch.randn(3, 8, device="meta"), zeros(name, 3, 16)),
    "device of the state": lambda name: (torch.randn(3, 8), zeros(name, 3, 16, device="meta")),
}


@cells
@pytest.mark.parametrize("case", BAD_CELLS)
def test_cell_errors_are_torchs(name: str, case: str) -> None:
    ours, theirs = pair(name, 8, 16)
    arguments = BAD_CELLS[case](name)
    assert raised(lambda: ours(*arguments)) == raised(lambda: theirs(*arguments))


@layers
@pytest.mark.parametrize("case", ["too few rows", "too many rows", "growing", "negative", "int32", "empty", "hidden"])
def test_malformed_packed_sequences_raise(name: str, case: str) -> None:
    module = getattr(fused_rnn, name)(8, 16)
    rows, sizes, dtype = {
        "too few rows": (7, [3, 3, 2], torch.int64),
        "too many rows": (9, [3, 3, 2], torch.int64),
        "growing": (8, [2, 3, 3], torch.int64),
        "negative": (5, [3, 3, -1], torch.int64),
        "int32": (8, [3, 3, 2], torch.int32),
        "empty": (0, [], torch.int64),
        "hidden": (8, [3, 3, 2], torch.int64),
    }[case]
    hx = zeros(name, 1, 2, 16) if case == "hidden" else None
    with pytest.raises(RuntimeError, match=r"batch_sizes|Expected (hidden|sequence)"):
        module(PackedSequence(torch.randn(rows, 8), torch.tensor(sizes, dtype=dtype)), hx)


@layers
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("sorted_already", [True, False])
def test_packed_sequences(name: str, sorted_already: bool) -> None:
    ours, theirs = pair(name, 3, 5, 2, bidirectional=True)
    lengths = [4, 4, 2, 1] if sorted_already else [2, 4, 1, 4]
    sequences = [torch.randn(length, 3) for length in lengths]
    packed = pack_sequence(sequences, enforce_sorted=sorted_already)
    hx = zeros(name, 4, 4, 5)
    hx = tuple(torch.randn_like(h) for h in hx) if name == "LSTM" else torch.randn_like(hx)
    for state in (None, hx):
        got, expected = ours(packed, state), theirs(packed, state)
        torch.testing.assert_close(flat(got), flat(expected))
        assert isinstance(got[0], PackedSequence)
        torch.testing.assert_close(got[0][1:], expected[0][1:])


@layers
@pytest.mark.usefixtures("backend")
def test_batch_of_nothing(name: str) -> None:
    ours, theirs = pair(name, 8, 16, 2, bidirectional=True)
    input = torch.randn(4, 0, 8, requires_grad=True)
    got = flat(ours(input))
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in flat(theirs(input))]
    got[0].sum().backward()
    assert input.grad.shape == input.shape
    assert all(parameter.grad is None or parameter.grad.count_nonzero() == 0 for parameter in ours.parameters())


@cells
def test_cell_of_nothing(name: str) -> None:
    for sizes, rows in (((8, 16), 0), ((8, 0), 3), ((0, 8), 3)):
        with warnings.catch_warnings():
            # Initialising a parameter without elements warns, in torch.nn too.
            warnings.simplefilter("ignore")
            ours, theirs = pair(name, *sizes)
        input = torch.randn(rows, sizes[0])
        torch.testing.assert_close(flat(ours(input)), flat(theirs(input)))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_meta_device(name: str) -> None:
    ours, theirs = pair(name, 8, 16, device="meta")
    input = torch.randn(5, 8, device="meta")
    got, expected = ([(t.shape, t.device, t.dtype) for t in flat(module(input))] for module in (ours, theirs))
    assert got == expected


@layers
def test_dropout_draws_as_torch(name: str) -> None:
    """The same seed gives the same masks; the probability can be set later; none in eval mode."""
    ours, theirs = pair(name, 8, 16, 3, dropout=0.5, batch_first=True)
    input = torch.randn(2, 5, 8)
    for probability in (0.5, 0.25, 1.0):
        ours.dropout = theirs.dropout = probability
        torch.manual_seed(1)
        expected = flat(theirs(input))
        torch.manual_seed(1)
        torch.testing.assert_close(flat(ours(input)), expected)
    ours.dropout = theirs.dropout = 2.0
    assert raised(lambda: ours(input)) == raised(lambda: theirs(input))
    torch.testing.assert_close(flat(ours.eval()(input)), flat(theirs.eval()(input)))


@layers
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_results_against_float64(name: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(name, 9, 17, 2, bidirectional=True, batch_first=True, dtype=dtype)
    reference = copy.deepcopy(theirs).double()
    input = torch.randn(3, 7, 9, dtype=dtype)
    results = [flat(module(input.to(next(module.parameters()).dtype))) for module in (ours, theirs, reference)]
    for index, triple in enumerate(zip(*results, strict=True)):
        assert_close_to_reference(*triple, name=f"{name} result {index}")
    d_results = [torch.randn_like(tensor) for tensor in results[0]]
    grads = [
        torch.autograd.grad(result, list(module.parameters()), [d.to(result[0].dtype) for d in d_results])
        for result, module in zip(results, (ours, theirs, reference), strict=True)
    ]
    for (parameter, _), *triple in zip(ours.named_parameters(), *grads, strict=True):
        assert_close_to_reference(*triple, name=f"{name} d_{parameter}")


@layers
def test_arguments_are_not_written(name: str) -> None:
    module = getattr(fused_rnn, name)(3, 5)
    input = torch.randn(4, 2, 3)
    hx = zeros(name, 1, 2, 5)
    before = [tensor.clone() for tensor in (input, *flat(hx), *module.parameters())]
    module(input, hx)[0].sum().backward()
    after = [tensor.detach() for tensor in (input, *flat(hx), *module.parameters())]
    torch.testing.assert_close(after, [tensor.detach() for tensor in before], rtol=0, atol=0)


@layers
def test_flatten_parameters_says_nothing(name: str) -> None:
    module = getattr(fused_rnn, name)(3, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.flatten_parameters() is None
        module(torch.randn(4, 2, 3))
    assert module._flat_weights[1] is module.weight_hh_l0
    assert module.all_weights == [[getattr(module, n) for n in names] for names in module._all_weights]


@layers
def test_weights_are_found_where_they_are(name: str) -> None:
    """After a deletion and reassignment, tying, a cast, and under functional_call."""
    ours, theirs = pair(name, 4, 4, 2)
    input = torch.randn(5, 2, 4)
    weight = torch.randn_like(ours.weight_hh_l0)
    for module in (ours, theirs):
        del module.weight_hh_l0
        module.weight_hh_l0 = nn.Parameter(weight.clone())
        module.weight_ih_l1 = module.weight_ih_l0
    torch.testing.assert_close(flat(ours(input)), flat(theirs(input)))
    assert len(list(ours.parameters())) == 7
    # A plain tensor in the place of the parameter, as weight dropping does it.
    del ours.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        ours(input)
    ours.weight_hh_l0 = weight.clone()
    torch.testing.assert_close(flat(ours(input)), flat(theirs(input)))

    ours, theirs = pair(name, 4, 4)
    replaced = {key: torch.randn_like(value) for key, value in ours.named_parameters()}
    expected = flat(torch.func.functional_call(theirs, replaced, (input,)))
    torch.testing.assert_close(flat(torch.func.functional_call(ours, replaced, (input,))), expected)
    torch.testing.assert_close(flat(ours.double()(input.double())), flat(theirs.double()(input.double())))
    assert ours.half().weight_hh_l0.dtype == torch.float16


@layers
def test_parametrized_weights(name: str) -> None:
    ours, theirs = pair(name, 4, 4)
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
        with torch.no_grad():
            module.parametrizations.weight_hh_l0.original0.mul_(1.5)
    input = torch.randn(5, 2, 4)
    results = [flat(module(input)) for module in (ours, theirs)]
    torch.testing.assert_close(*results)
    grads = [torch.autograd.grad(r[0].sum(), list(m.parameters())) for r, m in zip(results, (ours, theirs), strict=True)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(flat(copy.deepcopy(ours)(input)), results[0])
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is getattr(fused_rnn, name)
    torch.testing.assert_close(flat(ours(input)), results[0])


@layers
def test_pickles(name: str) -> None:
    module = getattr(fused_rnn, name)(4, 4, 2, bidirectional=True)
    input = torch.randn(5, 2, 4)
    expected = flat(module(input))
    torch.testing.assert_close(flat(pickle.loads(pickle.dumps(module))(input)), expected, rtol=0, atol=0)
    # As torch pickled before it had proj_size and kept names in all_weights.
    state = module.__getstate__()
    state.pop("proj_size")
    state.pop("_flat_weights_names")
    state["all_weights"] = [list(weights) for weights in module.all_weights]
    state["_flat_weights"] = module._flat_weights
    state.pop("_all_weights")
    old = type(module).__new__(type(module))
    old.__setstate__(state)
    assert old.proj_size == 0
    assert "_flat_weights" not in vars(old)
    torch.testing.assert_close(flat(old(input)), expected, rtol=0, atol=0)


@layers
def test_replicas_of_data_parallel(name: str) -> None:
    """A replica has plain tensors for parameters, and leaves its module alone."""
    module = getattr(fused_rnn, name)(4, 4)
    input = torch.randn(5, 2, 4)
    expected = flat(module(input))
    replica = module._replicate_for_data_parallel()
    for key, parameter in module.named_parameters():
        setattr(replica, key, parameter * 2)
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(flat(replica(input)), flat(doubled(input)))
    torch.testing.assert_close(flat(module(input)), expected, rtol=0, atol=0)


def test_packed_padded_sequences_with_projections() -> None:
    ours, theirs = pair("LSTM", 3, 5, proj_size=2, batch_first=True)
    packed = pack_padded_sequence(torch.randn(3, 4, 3), [4, 2, 2], batch_first=True)
    torch.testing.assert_close(flat(ours(packed)), flat(theirs(packed)))
