"""Autocast: the dtypes that torch.nn shows, results as near to float64 as its own, gradients in the parameters' dtype."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tolerances import assert_close_to_reference
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
LENGTHS = [5, 2, 4]
modules = pytest.mark.parametrize("name", LAYERS + CELLS)
lower_dtypes = pytest.mark.parametrize("lower", [BF16, F16], ids=str)


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, PackedSequence):
        return [results.data]
    if isinstance(results, Tensor):
        return [results]
    return [tensor for item in results for tensor in flat(item)]


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    ours, theirs = getattr(fused_rnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states_of(module: nn.Module, batch: int, dtypes: tuple[torch.dtype, ...]) -> Any:
    """Initial states: h, and for the LSTM (h, c), of these dtypes."""
    if isinstance(module, nn.RNNBase):
        first = (module.num_layers * (2 if module.bidirectional else 1), batch)
        sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    else:
        first, sizes = (batch,), (module.hidden_size,) * 2
    states = tuple(torch.randn(*first, size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True))
    return states if "LSTM" in type(module).__name__ else states[0]


def dtypes_or_error(module: nn.Module, lower: torch.dtype, input: Any, hx: Any) -> list[torch.dtype] | str:
    try:
        with torch.autocast("cpu", dtype=lower):
            return [tensor.dtype for tensor in flat(module(input, hx))]
    except RuntimeError:
        return "RuntimeError"


FORMS = {"dense": {}, "packed": {"num_layers": 2}, "projected": {"proj_size": 3}, "bidirectional": {"bidirectional": True}}
CASES = [(name, form) for name in LAYERS for form in FORMS if form != "projected" or name == "LSTM"]
CASES += [(name, "dense") for name in CELLS]
STATES = (None, (F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F64, F64))


@lower_dtypes
@pytest.mark.parametrize(("name", "form"), CASES)
def test_dtypes_are_torchs(name: str, form: str, lower: torch.dtype) -> None:
    """Of outputs and states, for every mixture of input, weights and given or absent states; what torch refuses raises."""
    modules = {weight: [module.to(weight) for module in pair(name, 4, 6, **FORMS[form])] for weight in (F32, BF16, F64)}
    for weight, input_dtype, given in itertools.product(modules, (F32, BF16, F16, F64), STATES):
        ours, theirs = modules[weight]
        input: Any = (torch.randn(3, 4) if name in CELLS else torch.randn(5, 3, 4)).to(input_dtype)
        if form == "packed":
            input = pack_padded_sequence(input, LENGTHS, enforce_sorted=False)
        hx = None if given is None else states_of(ours, 3, given)
        got = dtypes_or_error(ours, lower, input, hx)
        case = f"weight {weight}, input {input_dtype}, states {given}: {got}"
        converted = F64 not in (weight, input_dtype, *(given or ()))
        if converted and name == "LSTM" and form in ("dense", "bidirectional"):
            # One piece in autocast's dtype, as torch with oneDNN. Whether oneDNN has a float16 LSTM depends on the machine:
            # without, torch raises, or shows the dtypes of packed sequences.
            assert got == [lower] * 3, case
            if F16 in (lower, input_dtype):
                continue
        expected = dtypes_or_error(theirs, lower, input, hx)
        if converted and expected == "RuntimeError":
            # torch cannot concatenate the packed rows of a half that is not autocast's.
            assert form == "packed", case
            assert input_dtype == (BF16 if lower == F16 else F16), case
            expected = [lower] * len(got) if name == "RNN" else [F32] * len(got)
        assert got == expected, case


def run(module: nn.Module, lower: torch.dtype | None, input: Any, hx: Any, packed: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of input, states and parameters; without autocast where ``lower`` is None."""
    leaves = [tensor.clone().requires_grad_() for tensor in (input, *flat(hx))]
    given: Any = tuple(leaves[1:]) if len(leaves) == 3 else leaves[1]
    with torch.autocast("cpu", dtype=lower or BF16, enabled=lower is not None):
        x = pack_padded_sequence(leaves[0], LENGTHS, enforce_sorted=False) if packed else leaves[0]
        results = flat(module(x, given))
    generator = torch.Generator().manual_seed(5)
    loss = sum((result.double() * torch.randn(result.shape, generator=generator, dtype=F64)).sum() for result in results)
    return results, list(torch.autograd.grad(loss, [*leaves, *module.parameters()]))


@pytest.mark.usefixtures("backend")
@lower_dtypes
@pytest.mark.parametrize(("name", "form"), CASES)
def test_results_and_gradients_against_float64(name: str, form: str, lower: torch.dtype) -> None:
    """As near as torch under autocast, and every gradient in the dtype of its tensor."""
    sizes = (9, 17)
    options = {"bidirectional": True} if name in LAYERS else {}
    ours, theirs = pair(name, *sizes, **{**options, **FORMS[form]})
    exact = copy.deepcopy(theirs).double()
    input = torch.randn(3, 9) if name in CELLS else torch.randn(5, 3, 9)
    hx = states_of(ours, 3, (F32, F32))
    wide = tuple(state.double() for state in hx) if isinstance(hx, tuple) else hx.double()
    packed = form == "packed"
    expected, d_expected = run(exact, None, input.double(), wide, packed)
    got, d_got = run(ours, lower, input, hx, packed)
    if name == "LSTM" and form in ("dense", "bidirectional") and lower == F16:
        # torch has no such kernel on most machines: float32 rounded to it stands in.
        their, d_their = run(theirs, None, input, hx, packed)
        their = [tensor.to(lower) for tensor in their]
    else:
        their, d_their = run(theirs, lower, input, hx, packed)
    assert all(grad.dtype == F32 for grad in d_got)
    names = ["d_input", *["d_h_0", "d_c_0"][: len(flat(hx))], *(f"d_{key}" for key, _ in ours.named_parameters())]
    rows = [(f"result {i}", *each) for i, each in enumerate(zip(got, their, expected, strict=True))]
    rows += list(zip(names, d_got, d_their, d_expected, strict=True))
    for label, actual, theirs_value, reference in rows:
        # Whatever the dtype of a result, autocast computed it from values of the lower one.
        assert_close_to_reference(actual.to(lower), theirs_value.to(lower), reference, f"{name} {form} {label}")


@modules
def test_autocast_inside_out(name: str) -> None:
    """Switched off inside, nothing is left of it: the same bits as without, and the dtype is checked again."""
    module = getattr(fused_rnn, name)(4, 6)
    input = torch.randn(3, 4)
    expected = flat(module(input))
    with torch.autocast("cpu", dtype=BF16):
        outside = flat(module(input))
        with torch.autocast("cpu", enabled=False):
            inside = flat(module(input))
            with pytest.raises((ValueError, RuntimeError), match="dtype"):
                module(input.bfloat16())
    assert [tensor.dtype for tensor in inside] == [F32] * len(expected)
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)
    assert outside[0].dtype == (F32 if name in ("GRU", "GRUCell", "LSTMCell") else BF16)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_inside_autocast_is_the_same(name: str, create_graph: bool) -> None:
    module, input = getattr(fused_rnn, name)(4, 6, 2), torch.randn(5, 3, 4)
    grads = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=BF16):
            loss = module(input)[0].float().square().sum()
        with torch.autocast("cpu", dtype=BF16, enabled=inside):
            grads.append(torch.autograd.grad(loss, list(module.parameters()), create_graph=create_graph))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


@modules
def test_devices_and_sizes_are_checked_all_the_same(name: str) -> None:
    module = getattr(fused_rnn, name)(4, 6)
    with torch.autocast("cpu", dtype=BF16):
        with pytest.raises(RuntimeError, match="device"):
            module(torch.randn(3, 4, device="meta"))
        with pytest.raises(RuntimeError, match=r"input_size|input\.size"):
            module(torch.randn(3, 5))
        with pytest.raises(RuntimeError, match=r"int64|Long"):
            module(torch.ones(3, 4, dtype=torch.int64))
        # Nothing to compute: no row, and no numbers at all.
        assert flat(module(torch.randn(0, 4)[None] if name in LAYERS else torch.randn(0, 4)))[0].numel() == 0
        assert flat(module.to("meta")(torch.randn(3, 4, device="meta")))[0].device.type == "meta"


def test_states_of_a_cell_keep_their_digits() -> None:
    """A loop over a cell carries float32 states: what one step rounds does not add up over many."""
    cell, exact = pair("LSTMCell", 4, 6)
    exact.double()
    state, exact_state = None, None
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        for _ in range(200):
            input = torch.randn(3, 4)
            state, exact_state = cell(input, state), exact(input.double(), exact_state)
    assert [tensor.dtype for tensor in state] == [F32, F32]
    for tensor, expected in zip(state, exact_state, strict=True):
        assert (tensor - expected).abs().max() < 2 * torch.finfo(BF16).eps


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.rnn = nn.LSTM(8, 12, batch_first=True, bidirectional=True)
        self.more = nn.GRU(24, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.more(self.rnn(self.embedding(tokens))[0])[0])


@lower_dtypes
def test_training_with_a_gradient_scaler(lower: torch.dtype) -> None:
    """A converted model under autocast: the loss falls, an overflow skips the step and halves the scale."""
    model = fused_rnn.convert(Tagger())
    tokens = torch.randint(0, 11, (4, 7))
    labels = tokens % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=lower):
            logits = model(tokens)
            assert logits.dtype == lower
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        scaler.scale(loss).backward()
        assert all(parameter.grad.dtype == F32 for parameter in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert scaler.get_scale() == 256.0

    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=lower):
        loss = model(tokens).float().sum() * torch.inf
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    torch.testing.assert_close([parameter.detach() for parameter in model.parameters()], before, rtol=0, atol=0)


@lower_dtypes
def test_everything_has_autocasts_dtype_on_cuda(lower: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By construction: the decision for tensors that say they are on CUDA."""
    from types import SimpleNamespace

    from fused_rnn.cells import CELLS as TABLE
    from fused_rnn.data.cell import Weights
    from fused_rnn.graph import autocast

    tensor: Any = SimpleNamespace(device=torch.device("cuda"), dtype=F32)
    monkeypatch.setattr(autocast, "_on", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", {"cuda": lower}.__getitem__)
    for cell in TABLE.values():
        for dense in (False, True):
            states = (tensor,) * len(cell.states)
            assert autocast.dtypes_of(cell, tensor, states, [Weights(tensor, tensor)], dense) == (lower,) * len(states)


def test_dtypes_do_not_depend_on_the_values_of_lengths() -> None:
    rnn = fused_rnn.LSTM(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        results = [rnn(torch.randn(5, 2, 3), lengths=torch.tensor(lengths)) for lengths in ([5, 5], [5, 2])]
    (full, full_states), (ragged, ragged_states) = results
    assert full.dtype == ragged.dtype
    assert [state.dtype for state in full_states] == [state.dtype for state in ragged_states]
