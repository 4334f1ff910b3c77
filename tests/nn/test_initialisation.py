"""Initial values that torch.nn has no options for, as keywords of the constructors and on existing modules."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fused_rnn

LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
every = pytest.mark.parametrize("name", LAYERS + CELLS)
packages = pytest.mark.parametrize("package", [fused_rnn, nn], ids=["fused_rnn", "torch.nn"])
H = 6


def named(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in module.named_parameters() if key.startswith(prefix)}


def forget_sums(module: nn.Module) -> list[Tensor]:
    both = zip(named(module, "bias_ih").values(), named(module, "bias_hh").values(), strict=True)
    return [(ih + hh)[H : 2 * H] for ih, hh in both]


def assert_orthogonal(module: nn.Module, gates: int) -> None:
    """Of every gate's block, the rows or the columns, whichever are fewer, are orthonormal."""
    weights = named(module, "weight_hh")
    assert weights
    for weight in weights.values():
        assert weight.shape[0] == gates * H
        for block in weight.double().split(H):
            # (H, P) with P ≤ H
            torch.testing.assert_close(block.T @ block, torch.eye(block.shape[1], dtype=torch.float64), rtol=0, atol=1e-5)


def options_of(name: str) -> dict[str, Any]:
    return {"recurrent_init": "orthogonal", **({"forget_bias": 1.5} if name.startswith("LSTM") else {})}


FORMS: list[tuple[str, dict]] = [(name, {}) for name in LAYERS + CELLS]
FORMS += [(name, {"num_layers": 2, "bidirectional": True}) for name in LAYERS] + [("LSTM", {"proj_size": 4})]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_constructor(name: str, form: dict) -> None:
    torch.manual_seed(3)
    plain = getattr(nn, name)(5, H, **form)
    torch.manual_seed(3)
    module = getattr(fused_rnn, name)(5, H, **form, **options_of(name))
    assert_orthogonal(module, GATES[name.removesuffix("Cell")])
    if name.startswith("LSTM"):
        for total in forget_sums(module):
            assert total.tolist() == [1.5] * H
        for key, bias in named(module, "bias_hh").items():
            assert bias[H : 2 * H].count_nonzero() == 0, key
    # Everything else is what torch draws with the same seed.
    forget = slice(H, 2 * H)
    for (key, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        if key.startswith("bias") and name.startswith("LSTM"):
            ours, theirs = (torch.cat((bias[: forget.start], bias[forget.stop :])) for bias in (ours, theirs))
        if not key.startswith("weight_hh"):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@every
def test_without_options_nothing_changes(name: str) -> None:
    torch.manual_seed(3)
    plain = getattr(nn, name)(5, H)
    torch.manual_seed(3)
    module = getattr(fused_rnn, name)(5, H)
    after = torch.random.get_rng_state()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert repr(module) == repr(plain)
    assert fused_rnn.init_(module) is module
    assert torch.equal(torch.random.get_rng_state(), after)


@every
def test_options_survive(name: str, tmp_path: Any) -> None:
    """reset_parameters, copies, pickles and a file; a state_dict carries values and no options."""
    module = getattr(fused_rnn, name)(5, H, **options_of(name))
    torch.save(module, tmp_path / "module.pt")
    twins = [
        module,
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(tmp_path / "module.pt", weights_only=False),
    ]
    for twin in twins:
        assert repr(twin) == repr(module)
        before = twin.weight_hh if name in CELLS else twin.weight_hh_l0
        old = before.detach().clone()
        twin.reset_parameters()
        assert not torch.equal(before, old)
        assert_orthogonal(twin, GATES[name.removesuffix("Cell")])
        if name.startswith("LSTM"):
            assert all(total.tolist() == [1.5] * H for total in forget_sums(twin))
    assert repr(module).endswith(("forget_bias=1.5, " if "LSTM" in name else "") + "recurrent_init='orthogonal')")
    plain = getattr(nn, name)(5, H)
    assert module.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(module.state_dict())
    other = getattr(fused_rnn, name)(5, H, **options_of(name))
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(dict(other.named_parameters()), dict(module.named_parameters()), rtol=0, atol=0)


@every
def test_convert_and_revert(name: str) -> None:
    module = getattr(fused_rnn, name)(5, H, **options_of(name))
    parameters = dict(module.named_parameters())
    values = {key: value.detach().clone() for key, value in parameters.items()}
    fused_rnn.revert(module)
    assert type(module) is getattr(nn, name)
    assert "forget_bias" not in vars(module)
    assert "recurrent_init" not in vars(module)
    assert repr(module) == repr(getattr(nn, name)(5, H))
    assert all(value is parameters[key] for key, value in module.named_parameters())
    fused_rnn.convert(module)
    assert (module.forget_bias, module.recurrent_init) == (None, None)
    torch.testing.assert_close(dict(module.named_parameters()), values, rtol=0, atol=0)
    module.reset_parameters()


def test_modules_pickled_before_there_were_options() -> None:
    state = fused_rnn.LSTM(5, H).__getstate__()
    old = fused_rnn.LSTM.__new__(fused_rnn.LSTM)
    old.__setstate__({key: value for key, value in state.items() if key not in ("forget_bias", "recurrent_init")})
    assert (old.forget_bias, old.recurrent_init) == (None, None)
    old.reset_parameters()


@packages
@every
def test_existing_modules(name: str, package: Any) -> None:
    module = getattr(package, name)(5, H)
    parameters = dict(module.named_parameters())
    before = {key: value.detach().clone() for key, value in parameters.items()}
    assert fused_rnn.init_(module, recurrent_init="orthogonal") is module
    assert_orthogonal(module, GATES[name.removesuffix("Cell")])
    for key, value in module.named_parameters():
        assert value is parameters[key]
        assert value.requires_grad
        assert value.is_leaf
        assert torch.equal(value, before[key]) != key.startswith("weight_hh")
    if name.startswith("LSTM"):
        recurrent = {key: value.clone() for key, value in named(module, "weight").items()}
        fused_rnn.init_(module, forget_bias=-2)
        assert all(total.tolist() == [-2.0] * H for total in forget_sums(module))
        torch.testing.assert_close(named(module, "weight"), recurrent, rtol=0, atol=0)
    # Nothing is remembered.
    module.reset_parameters()
    if name.startswith("LSTM"):
        assert not any(total.tolist() == [-2.0] * H for total in forget_sums(module))


@packages
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(package: Any, dtype: torch.dtype) -> None:
    module = fused_rnn.init_(package.LSTM(5, H, dtype=dtype), forget_bias=1.5, recurrent_init="orthogonal")
    assert all(parameter.dtype == dtype for parameter in module.parameters())
    assert all(total.tolist() == [1.5] * H for total in forget_sums(module))
    block = module.weight_hh_l0.detach().double()[:H]
    tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(block @ block.T, torch.eye(H, dtype=torch.float64), rtol=0, atol=tolerance)


def test_generator_makes_it_repeatable() -> None:
    drawn = [
        fused_rnn.init_(nn.GRU(5, H), recurrent_init="orthogonal", generator=torch.Generator().manual_seed(4)).weight_hh_l0
        for _ in range(2)
    ]
    assert torch.equal(*drawn)


def test_gates_are_drawn_apart() -> None:
    blocks = fused_rnn.LSTM(5, H, recurrent_init="orthogonal").weight_hh_l0.detach().split(H)
    assert not any(torch.allclose(a, b) for i, a in enumerate(blocks) for b in blocks[:i])


def test_meta_device_then_real() -> None:
    """As large models are made: no memory at first, then empty memory, then values."""
    module = fused_rnn.LSTM(5, H, 2, device="meta", forget_bias=1.0, recurrent_init="orthogonal")
    module.to_empty(device="cpu").reset_parameters()
    assert_orthogonal(module, 4)
    assert all(total.tolist() == [1.0] * H for total in forget_sums(module))


def test_parametrized_weights() -> None:
    module = parametrizations.weight_norm(nn.LSTM(5, H), "weight_hh_l0")
    fused_rnn.init_(module, recurrent_init="orthogonal", forget_bias=1.0)
    assert parametrize.is_parametrized(module, "weight_hh_l0")
    block = module.weight_hh_l0.detach()[:H]
    torch.testing.assert_close(block @ block.T, torch.eye(H), rtol=0, atol=1e-5)
    with pytest.warns(FutureWarning, match="weight_norm"):
        hooked = nn.utils.weight_norm(nn.GRU(5, H), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0: expected a parameter, or one under"):
        fused_rnn.init_(hooked, recurrent_init="orthogonal")


def test_subclasses() -> None:
    class Mine(nn.LSTM):
        pass

    class Own(fused_rnn.LSTM):
        def __init__(self) -> None:
            super().__init__(5, H, forget_bias=1.0)

    assert all(total.tolist() == [3.0] * H for total in forget_sums(fused_rnn.init_(Mine(5, H), forget_bias=3.0)))
    assert all(total.tolist() == [1.0] * H for total in forget_sums(Own()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forget_bias": "1"}, TypeError, "forget_bias: expected a number or None, got str"),
        ({"forget_bias": True}, TypeError, "forget_bias: expected a number or None, got bool"),
        ({"forget_bias": torch.ones(())}, TypeError, "forget_bias: expected a number or None, got Tensor"),
        ({"forget_bias": float("nan")}, ValueError, "forget_bias: expected a finite number, got nan"),
        ({"forget_bias": float("inf")}, ValueError, "forget_bias: expected a finite number, got inf"),
        ({"forget_bias": 10**400}, ValueError, "forget_bias: expected a finite number, got 1000"),
        ({"recurrent_init": 1}, TypeError, "recurrent_init: expected a str or None, got int"),
        ({"recurrent_init": "ortho"}, ValueError, "recurrent_init: expected one of orthogonal or None, got 'ortho'"),
    ],
    ids=str,
)
def test_bad_values(options: dict, error: type[Exception], message: str) -> None:
    for make in (lambda: fused_rnn.LSTM(5, H, **options), lambda: fused_rnn.LSTMCell(5, H, **options)):
        with pytest.raises(error, match=message):
            make()
    module = nn.LSTM(5, H)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(error, match=message):
        fused_rnn.init_(module, **options)
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


def test_what_has_no_forget_bias() -> None:
    for make in (lambda: fused_rnn.GRU(5, H, forget_bias=1.0), lambda: fused_rnn.init_(nn.RNNCell(5, H), forget_bias=1.0)):
        with pytest.raises(ValueError, match=r"forget_bias: expected None for a module without a forget gate, got 1\.0"):
            make()
    with pytest.raises(TypeError, match="forget_bias"):
        fused_rnn.GRUCell(5, H, forget_bias=1.0)
    for make in (
        lambda: fused_rnn.LSTM(5, H, bias=False, forget_bias=1.0),
        lambda: fused_rnn.LSTMCell(5, H, False, forget_bias=1),
    ):
        with pytest.raises(ValueError, match="forget_bias: expected None for a module with bias=False, got 1"):
            make()
    with pytest.raises(TypeError, match="module: expected an RNN, LSTM, GRU or one of their cells, got Linear"):
        fused_rnn.init_(nn.Linear(5, H), recurrent_init="orthogonal")
    with pytest.raises(TypeError, match="positional"):
        fused_rnn.LSTM(5, H, 1, True, False, 0.0, False, 0, None, None, 1.0)


def test_no_hidden_units() -> None:
    with warnings.catch_warnings():
        # torch warns that there is nothing to initialise.
        warnings.simplefilter("ignore")
        fused_rnn.LSTMCell(5, 0, forget_bias=1.0, recurrent_init="orthogonal")
