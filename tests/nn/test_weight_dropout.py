"""``weight_dropout=``: a mask over weight_hh for each call, against the same stack with weights that were masked before."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sequences_support import explicit, given, listed, with_gradients
from stack_support import MODULES, layer_of, states_for
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn

P = 0.3
LENGTHS = [3, 6, 0, 1, 5]


def make(name: str = "lstm", sizes: tuple[int, ...] = (3, 17, 2), p: float = P, **options: Any) -> tuple[Any, int]:
    """Two layers in both directions, where the options do not say otherwise; and how many states it has."""
    build, count = MODULES[name]
    return build(*sizes, **{"bidirectional": True, "dtype": torch.float64, **options}, weight_dropout=p), count


def names(module: Any) -> list[str]:
    return [name for name, _ in module.named_parameters() if name.startswith("weight_hh")]


def masked(module: Any, p: float = P) -> tuple[Any, dict[str, Tensor]]:
    """The stack without the option, its recurrent weights masked as the next call of ``module`` will mask them; the masks."""
    state = torch.get_rng_state()
    masks = {name: nn.functional.dropout(torch.ones_like(getattr(module, name)), p) for name in names(module)}
    torch.set_rng_state(state)
    plain = copy.deepcopy(module)
    plain.weight_dropout = 0.0
    with torch.no_grad():
        for name, mask in masks.items():
            getattr(plain, name).mul_(mask)
    return plain, masks


@pytest.mark.parametrize("name", MODULES)
def test_one_mask_for_all_steps(name: str, backend: str) -> None:
    """Outputs, states and gradients, which reach the raw weights through the mask; with lengths and resets."""
    module, count = make(name)
    x, reset = torch.randn(6, 5, 3, dtype=torch.float64), torch.rand(6, 5) < 0.3
    hx = states_for(module, count, 5)
    options = {"lengths": torch.tensor(LENGTHS), "reset": reset}
    plain, masks = masked(module)

    def results(of: Any, call: Any) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in (x, *hx)]
        return with_gradients(call(leaves[0], leaves[1:]), [*leaves, *of.parameters()])

    def ours(first: Tensor, states: list[Tensor]) -> list[Tensor]:
        out, after = module(first, given(states), **options)
        return [out, *listed(after)]

    def loop(first: Tensor, states: list[Tensor]) -> list[Tensor]:
        ends: list[list[Tensor]] = [[] for _ in states]
        for layer in range(2):
            part = [state[2 * layer : 2 * layer + 2] for state in states]
            first, *rest = explicit(layer_of(plain, layer), first, part, LENGTHS, reset)
            for end, state in zip(ends, rest, strict=False):
                end.append(state)
        return [first, *(torch.cat(end) for end in ends)]

    expected, actual = results(plain, loop), results(module, ours)
    of_parameters = len(expected) - len(list(module.parameters()))
    for place, (parameter, _) in enumerate(module.named_parameters(), of_parameters):
        if parameter in masks:
            expected[place] = expected[place] * masks[parameter]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    module, _ = make(dtype=dtype)
    x = torch.randn(6, 5, 3, dtype=dtype)
    plain, _ = masked(module)
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=1e-2 if dtype != torch.float32 else 1e-6)


def test_the_mask_is_a_dropout(backend: str) -> None:
    """An identity for W_hh, in a relu, shows the mask: zeros with probability p, the others 1 / (1 − p)."""
    module = fused_rnn.RNN(200, 200, nonlinearity="relu", bias=False, dtype=torch.float64, weight_dropout=0.25)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.copy_(torch.eye(200))
    ones = torch.ones(1, 1, 200, dtype=torch.float64)
    seen = []
    for _ in range(20):
        out, _ = module(torch.zeros(3, 1, 200, dtype=torch.float64), ones)
        once = out[0, 0]
        assert set(once.unique().tolist()) == {0.0, 1 / 0.75}
        # The same mask at all steps.
        torch.testing.assert_close(out[:, 0], torch.stack([once, once**2, once**3]))
        seen.append(once)
    assert len({tuple(each.tolist()) for each in seen}) == 20
    kept = torch.stack(seen).count_nonzero() / 4000
    # Four standard deviations.
    assert abs(float(kept) - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5


@pytest.mark.parametrize("hidden", [16, 70, 300])
def test_no_call_computes_with_an_earlier_mask(hidden: int, backend: str) -> None:
    """Masked weights come and go at the same places in memory; each call, and each backward, has its own."""
    module, _ = make("gru", (3, hidden, 2), dtype=torch.float32)
    x = torch.randn(40, 5, 3)
    for _ in range(6):
        plain, masks = masked(module)
        expected, actual = plain(x)[0], module(x)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(actual.sin().sum(), [getattr(module, name) for name in masks])
        wanted = torch.autograd.grad(expected.sin().sum(), [getattr(plain, name) for name in masks])
        scaled = [grad * mask for grad, mask in zip(wanted, masks.values(), strict=True)]
        torch.testing.assert_close(list(found), scaled, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            plain, _ = masked(module)
            torch.testing.assert_close(module(x)[0], plain(x)[0], rtol=1e-4, atol=1e-5)
            module.weight_hh_l0.mul_(0.9)


def test_evaluation_has_none(backend: str) -> None:
    module, _ = make()
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    plain = copy.deepcopy(module)
    plain.weight_dropout = 0.0
    state = torch.get_rng_state()
    torch.testing.assert_close(module.eval()(x), plain(x), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["packed", "batch_first", "unbatched"])
def test_layouts(kind: str, backend: str) -> None:
    module, _ = make(batch_first=kind == "batch_first", dropout=0.4)
    x = torch.randn(6, 6, 3, dtype=torch.float64)
    if kind == "unbatched":
        x = x[0]

    def run(of: Any) -> Any:
        torch.manual_seed(5)
        if kind != "packed":
            return of(x)
        out, after = of(pack_padded_sequence(x, torch.tensor([6, 6, 5, 2, 2, 1])))
        return pad_packed_sequence(out)[0], after

    torch.manual_seed(5)
    plain, _ = masked(module)
    found = run(module)
    # The dropout between layers draws after the masks.
    torch.manual_seed(5)
    for name in names(module):
        nn.functional.dropout(torch.ones_like(getattr(module, name)), P)
    if kind == "packed":
        out, after = plain(pack_padded_sequence(x, torch.tensor([6, 6, 5, 2, 2, 1])))
        torch.testing.assert_close(found, (pad_packed_sequence(out)[0], after))
    else:
        torch.testing.assert_close(found, plain(x))


def test_single_steps_draw_a_mask_each(backend: str) -> None:
    """A loop over steps: gradients of weights that no two steps share."""
    module, _ = make("gru", (3, 5, 1), bidirectional=False)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    h = expected = torch.zeros(1, 2, 5, dtype=torch.float64)
    for step in x:
        mask = masked(module)[1]["weight_hh_l0"]
        _, h = module(step[None], h)
        weights = (module.weight_ih_l0, module.weight_hh_l0 * mask, module.bias_ih_l0, module.bias_hh_l0)
        expected = torch.gru_cell(step, expected[0], *weights)[None]
    torch.testing.assert_close(h, expected)
    both = [torch.autograd.grad(each.sin().sum(), list(module.parameters())) for each in (h, expected)]
    torch.testing.assert_close(*both)


def test_second_derivatives(backend: str) -> None:
    module, _ = make("gru", (2, 3, 1), bidirectional=False)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def same_mask(x: Tensor, weight: Tensor) -> Tensor:
        torch.manual_seed(2)
        return torch.func.functional_call(module, {"weight_hh_l0": weight}, x)[0]

    assert torch.autograd.gradgradcheck(same_mask, (x, module.weight_hh_l0.detach().requires_grad_()))


def test_function_transforms(backend: str) -> None:
    """A mapped batch has one mask with ``randomness="same"``; torch refuses to draw without a word on it."""
    module, _ = make("gru", (3, 5, 2))
    x = torch.randn(4, 6, 2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: module(x)[0])(x)
    torch.manual_seed(2)
    plain, _ = masked(module)
    torch.testing.assert_close(
        torch.func.vmap(lambda x: module(x)[0], randomness="same")(x), torch.stack([plain(each)[0] for each in x])
    )
    parameters = {name: value.detach() for name, value in module.eval().named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, x)[0].sin().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    expected = torch.func.grad(loss)(parameters, x[1])
    torch.testing.assert_close({name: grad[1] for name, grad in per_sample.items()}, expected)


def test_autocast() -> None:
    module, _ = make("lstm", dtype=torch.float32)
    x = torch.randn(6, 5, 3)
    plain, _ = masked(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(x), plain(x))


def test_with_connections(backend: str) -> None:
    module = fused_rnn.LSTM(4, 4, 3, dtype=torch.float64, weight_dropout=P, connections="highway")
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    plain, _ = masked(module)
    assert plain.connections == "highway"
    torch.testing.assert_close(module(x), plain(x))


def test_parametrized_weights() -> None:
    """The mask is drawn over what the parametrization gives."""
    module, _ = make("gru", (3, 5, 1), bidirectional=False)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    mask = nn.functional.dropout(torch.ones_like(module.weight_hh_l0), P)
    weights = fused_rnn.Weights(module.weight_ih_l0, module.weight_hh_l0 * mask, module.bias_ih_l0, module.bias_hh_l0)
    torch.set_rng_state(state)
    torch.testing.assert_close(module(x), fused_rnn.functional.gru(x, [weights]))


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "recurrent"])
def test_what_a_module_keeps(name: str) -> None:
    """Torch's state_dict; a pickle, a copy and the text; and it may be set at any time."""
    module, _ = make(name, dtype=torch.float32)
    plain, _ = make(name, p=0.0)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert "_stack_options" not in vars(plain)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert other.weight_dropout == P
        torch.manual_seed(1)
        expected = module(torch.ones(2, 1, 3))
        torch.manual_seed(1)
        torch.testing.assert_close(other(torch.ones(2, 1, 3)), expected, rtol=0, atol=0)
    assert ", weight_dropout=0.3)" in repr(module)
    assert "weight_dropout" not in repr(plain)
    plain.weight_dropout = 1
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        plain_masked = copy.deepcopy(plain)
        for each in names(plain):
            getattr(plain_masked, each).zero_()
    torch.testing.assert_close(plain(x), plain_masked.eval()(x))
    plain.weight_dropout = 0
    assert "_stack_options" not in vars(plain)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), True, "0.5", None], ids=str)
def test_what_is_no_probability(value: Any) -> None:
    for build in (fused_rnn.GRU, lambda *s, **o: fused_rnn.Recurrent(fused_rnn.cells.gru, *s, **o)):
        with pytest.raises(ValueError, match=f"weight_dropout: expected a probability, 0 to 1, got {value!r}"):
            build(3, 4, weight_dropout=value)
    module = fused_rnn.GRU(3, 4, weight_dropout=0.5)
    with pytest.raises(ValueError, match="weight_dropout: expected a probability"):
        module.weight_dropout = value
    assert module.weight_dropout == 0.5


def test_quantized_modules_have_none() -> None:
    """They are for inference, where it does nothing."""
    pytest.importorskip("fused_rnn._C", reason="the extension is not built here; CI builds it")
    module, _ = make("lstm", dtype=torch.float32)
    expected = module.eval()(torch.ones(3, 2, 3))[0]
    made = fused_rnn.quantize_dynamic(copy.deepcopy(module))
    assert "_stack_options" not in vars(made)
    torch.testing.assert_close(made.train()(torch.ones(3, 2, 3))[0], expected, rtol=0, atol=0.03)
    assert made.dequantize().weight_dropout == 0.0
