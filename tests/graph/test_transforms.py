"""torch.func and forward mode: every transform against the same transform of the plain reference, on every backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree

import fused_rnn
from fused_rnn.graph import autograd, batching, derivatives
from fused_rnn.kernels import dispatch
from fused_rnn.kernels.protocol import LayerCall

NAMES = ("RNN", "LSTM", "GRU")
each = pytest.mark.parametrize("name", NAMES)
Module = torch.nn.Module


def make(name: str, **options: Any) -> Module:
    module: Module = getattr(fused_rnn, name)(3, 4, dtype=torch.float64, **options)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@contextmanager
def plain() -> Iterator[None]:
    """Every layer in plain torch operations, which torch transforms on its own."""

    def layer(*arguments: Any, backend: object = None) -> Any:
        *described, _ = arguments if len(arguments) == 10 else (*arguments, None)
        return derivatives.plain(*described, *(None, False, False)[len(described) - 6 :])

    fused, autograd.layer = autograd.layer, layer
    try:
        yield
    finally:
        autograd.layer = fused


def assert_as_plain(function: Callable[[], Any], tolerance: float = 1e-9) -> None:
    actual = pytree.tree_leaves(function())
    with plain():
        expected = pytree.tree_leaves(function())
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    # What is compared is not nothing: silent zeros would agree with zeros.
    assert any(value.abs().max() > 1e-6 for value in expected)


def state(module: Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def call(module: Module, parameters: dict[str, Tensor], x: Tensor, index: int = 0) -> Any:
    return functional_call(module, parameters, (x,))[index]


def loss(module: Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    out, states = functional_call(module, parameters, (x,))
    ends = sum(value.sin().sum() for value in pytree.tree_leaves(states))
    return out.square().sum() + ends


def members(module: Module) -> dict[str, Tensor]:
    return {name: torch.stack([value, value * 0.5, value * 1.5]) for name, value in state(module).items()}


def dual(module: Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        out = module(forward_ad.make_dual(x, x.cos()))[0]
        return forward_ad.unpack_dual(out).tangent


def dual_without_grad(module: Module, x: Tensor) -> Any:
    with torch.no_grad():
        return dual(module, x)


def forward_over_reverse(module: Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        leaf = x.clone().requires_grad_()
        value = module(forward_ad.make_dual(leaf, x.cos()))[0].square().sum()
        (first,) = torch.autograd.grad(value, leaf)
        return forward_ad.unpack_dual(first).tangent


def reverse_over_forward(module: Module, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(leaf, x.cos()))[0]).tangent
        return torch.autograd.grad(tangent.square().sum(), [leaf, module.weight_hh_l0])


def many_gradients(module: Module, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    out = module(leaf)[0]
    inputs = [leaf, *module.parameters()]
    first = torch.autograd.grad(out, inputs, draw(4, *out.shape), is_grads_batched=True, create_graph=True)
    second = sum(value.square().sum() for value in first)
    return first, torch.autograd.grad(second, inputs, allow_unused=True, materialize_grads=True)


def pull_without_grad(module: Module, x: Tensor) -> Any:
    out, pull = vjp(lambda x: module(x)[0], x)
    with torch.no_grad():
        return pull(torch.ones_like(out))


def push_of_all(module: Module, x: Tensor) -> Any:
    parameters = state(module)
    tangents = {name: value.cos() for name, value in parameters.items()}
    return jvp(lambda p, x: functional_call(module, p, (x,)), (parameters, x), (tangents, x.cos()))


def changed_in_place(module: Module, x: Tensor) -> Any:
    return grad(lambda p: call(module, p, x).mul_(2).square().sum())(state(module))


def nested(module: Module, x: Tensor) -> Any:
    xs = torch.stack([x, x * 2])
    per_sample = vmap(grad(lambda p, x: loss(module, p, x)), (None, 1))
    return vmap(per_sample, (None, 0))(state(module), xs)


# name -> (module, x (T, N, I)) -> tensors.
CASES: dict[str, Callable[[Module, Tensor], Any]] = {
    "grad": lambda m, x: grad(lambda p: loss(m, p, x))(state(m)),
    "grad of grad": lambda m, x: grad(lambda x: grad(lambda x: m(x)[0].pow(3).sum())(x).square().sum())(x),
    "grad, output changed in place": changed_in_place,
    "vjp, pulled without grad": pull_without_grad,
    "vmap of batches": lambda m, x: vmap(m)(torch.stack([x, x * 2, x.cos()])),
    "vmap of sequences": lambda m, x: vmap(lambda x: m(x)[0], 1, 1)(x),
    "vmap of the last dimension": lambda m, x: vmap(lambda x: m(x)[0], -1)(torch.stack([x, x * 2], -1)),
    "vmap of vmap": lambda m, x: vmap(vmap(lambda x: m(x)[0], 1))(torch.stack([x, x * 2, x.cos()])),
    "grad of vmap": lambda m, x: grad(lambda p: vmap(lambda x: loss(m, p, x), 1)(x).sum())(state(m)),
    "per-sample gradients": lambda m, x: vmap(grad(lambda p, x: loss(m, p, x)), (None, 1))(state(m), x),
    "per-batch gradients": lambda m, x: vmap(grad(lambda p, x: loss(m, p, x)), (None, 0))(state(m), torch.stack([x, 2 * x])),
    "nested per-sample gradients": nested,
    "per-sample norms' gradient": lambda m, x: grad(
        lambda x: sum(g.square().sum() for g in vmap(grad(lambda p, x: loss(m, p, x)), (None, 1))(state(m), x).values())
    )(x),
    "jvp of per-sample gradients": lambda m, x: jvp(
        lambda x: vmap(grad(lambda p, x: loss(m, p, x)), (None, 1))(state(m), x), (x,), (x.cos(),)
    ),
    "ensemble": lambda m, x: vmap(lambda p: functional_call(m, p, (x,)))(members(m)),
    "ensemble, an input each": lambda m, x: vmap(lambda p, x: call(m, p, x))(members(m), torch.stack([x, x * 2, x.cos()])),
    "ensemble's gradients": lambda m, x: vmap(grad(lambda p: loss(m, p, x)))(members(m)),
    "gradient of an ensemble": lambda m, x: grad(lambda ps: vmap(lambda p: loss(m, p, x))(ps).sum())(members(m)),
    "ensemble of batches": lambda m, x: vmap(lambda p: vmap(lambda x: call(m, p, x), 1)(x))(members(m)),
    "ensemble's per-sample gradients": lambda m, x: vmap(vmap(grad(lambda p, x: loss(m, p, x)), (None, 1)), (0, None))(
        members(m), x
    ),
    "jacrev": lambda m, x: jacrev(lambda x: m(x)[0])(x),
    "jacrev of weights": lambda m, x: jacrev(lambda p: call(m, p, x))(state(m)),
    "jacrev of jacrev": lambda m, x: jacrev(jacrev(lambda x: m(x)[0].square().sum()))(x[:2, :1]),
    "is_grads_batched": many_gradients,
    "jvp": push_of_all,
    "linearize": lambda m, x: linearize(lambda x: m(x)[0], x)[1](x.cos()),
    "jacfwd": lambda m, x: jacfwd(lambda x: m(x)[0])(x),
    "jacfwd of jacfwd": lambda m, x: jacfwd(jacfwd(lambda x: m(x)[0].square().sum()))(x[:2, :1]),
    "jacrev of jacfwd": lambda m, x: jacrev(jacfwd(lambda x: m(x)[0].square().sum()))(x[:2, :1]),
    "hessian": lambda m, x: hessian(lambda x: m(x)[0].square().sum())(x[:2, :1]),
    "hessian of weights": lambda m, x: hessian(lambda p: loss(m, p, x[:2, :1]))(state(m))["weight_hh_l0"],
    "vmap of hessian": lambda m, x: vmap(hessian(lambda x: m(x)[0].square().sum()), 1)(x[:2]),
    "dual numbers": dual,
    "dual numbers without grad": dual_without_grad,
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@each
@pytest.mark.parametrize("case", CASES)
def test_transform(case: str, name: str, backend: str) -> None:
    module, x = make(name), draw(3, 2, 3)
    assert_as_plain(lambda: CASES[case](module, x))


@pytest.mark.parametrize("case", ["grad", "nested per-sample gradients", "ensemble's gradients", "jvp", "jacrev"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNN", {"nonlinearity": "relu", "bias": False}),
        ("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
    ],
)
def test_transform_of_a_stack(case: str, name: str, options: dict[str, Any], backend: str) -> None:
    module, x = make(name, **options), draw(3, 2, 3)
    assert_as_plain(lambda: CASES[case](module, x))


CELLS: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "vmap": lambda f, x: vmap(f)(x),
    "per-sample gradients": lambda f, x: vmap(grad(f))(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "hessian": lambda f, x: hessian(f)(x),
}


@each
@pytest.mark.parametrize("case", CELLS)
def test_transform_of_a_cell(case: str, name: str, backend: str) -> None:
    cell, x = make(f"{name}Cell"), draw(2, 3)
    assert_as_plain(lambda: CELLS[case](lambda x: pytree.tree_leaves(cell(x))[-1].square().sum(), x))


@each
def test_states_alone_are_mapped(name: str, backend: str) -> None:
    module, x, h, c = make(name, bidirectional=True), draw(3, 2, 3), draw(5, 2, 2, 4), draw(2, 2, 4)
    assert_as_plain(lambda: vmap(lambda h: module(x, (h, c) if name == "LSTM" else h))(h))
    if name == "LSTM":
        assert_as_plain(lambda: vmap(lambda c: module(x, (h[0], c)), 2)(draw(2, 2, 5, 4)))
    assert_as_plain(lambda: jacfwd(lambda h: module(x, (h, c) if name == "LSTM" else h)[0])(h[0]))


PACKED: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "vmap": lambda f, data: vmap(f)(torch.stack([data, data * 2])),
    "vmap of grad": lambda f, data: vmap(grad(lambda d: f(d)[0].square().sum()))(torch.stack([data, data * 2])),
    "jacrev": lambda f, data: jacrev(lambda d: f(d))(data),
    "hessian": lambda f, data: hessian(lambda d: f(d)[1].square().sum())(data),
}


@each
@pytest.mark.parametrize("case", PACKED)
def test_packed_data(case: str, name: str, backend: str) -> None:
    """The rows of a PackedSequence are mapped, with one set of lengths for all members."""
    module = make(name, bidirectional=True)
    packed = pack_padded_sequence(draw(3, 2, 3), [1, 3], enforce_sorted=False)

    def function(data: Tensor) -> list[Tensor]:
        out, states = module(PackedSequence(data, *packed[1:]))
        return [out.data, *pytree.tree_leaves(states)]

    assert_as_plain(lambda: PACKED[case](function, packed.data))


def test_packed_per_sample_gradients(backend: str) -> None:
    module = make("LSTM", proj_size=2)
    packed = pack_padded_sequence(draw(3, 2, 3), [1, 3], enforce_sorted=False)

    def value(parameters: dict[str, Tensor], data: Tensor) -> Tensor:
        out: Tensor = functional_call(module, parameters, (PackedSequence(data, *packed[1:]),))[0].data
        return out.square().sum()

    data = torch.stack([packed.data, packed.data.cos(), packed.data * 2])
    assert_as_plain(lambda: vmap(grad(value), (None, 0))(state(module), data))


def test_mapped_lengths_raise() -> None:
    module, data = make("GRU"), draw(2, 4, 3)
    with pytest.raises(RuntimeError, match=r"vmap cannot map over the batch_sizes of a PackedSequence"):
        vmap(lambda d, sizes: module(PackedSequence(d, sizes))[0].data)(data, torch.tensor([[2, 1, 1], [2, 2, 0]]))


class Count:
    """Counts calls of the fused forward, and the sequences of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards: list[int] = []
        self.backwards: list[int] = []
        backend = type(dispatch.choose(torch.device("cpu")))
        monkeypatch.setattr(backend, "forward", self.counted(backend.forward, self.forwards))
        monkeypatch.setattr(backend, "backward", self.counted(backend.backward, self.backwards))

    def counted(self, function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
        def counting(backend: Any, call: LayerCall, *args: Any, **kwargs: Any) -> Any:
            calls.append(call.layer.steps.batch)
            return function(backend, call, *args, **kwargs)

        return counting


@each
def test_mapped_batches_are_one_fused_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, xs = make(name), draw(5, 3, 2, 3)
    count = Count(monkeypatch)
    vmap(module)(xs)
    assert count.forwards == [10]
    vmap(grad(lambda p, x: loss(module, p, x)), (None, 0))(state(module), xs)
    assert count.forwards[1:] == count.backwards == [10]
    # One forward, and the shared tape is copied for as many members as fit into the bound.
    count.forwards.clear(), count.backwards.clear()
    jacrev(lambda x: module(x)[0])(xs[0])
    assert (count.forwards, count.backwards) == ([2], [48])
    monkeypatch.setattr(batching, "_COPIED_BYTES", 1)
    expected = jacrev(lambda x: module(x)[0])(xs[0])
    assert count.backwards[1:] == [2] * 24
    assert_as_plain(lambda: jacrev(lambda x: module(x)[0])(xs[0]))
    assert_as_plain(lambda: jacrev(lambda p: call(module, p, xs[0]))(state(module)))
    assert expected.abs().max() > 0


@each
def test_first_gradients_are_the_kernels(name: str, backend: str) -> None:
    """Under torch.func and with create_graph too: the same bits as a plain backward."""
    module, x = make(name, bidirectional=True), draw(3, 2, 3)
    parameters = dict(module.named_parameters())
    out = module(x)[0].square().sum()
    expected = torch.autograd.grad(out, list(parameters.values()), retain_graph=True)
    recorded = torch.autograd.grad(out, list(parameters.values()), create_graph=True)
    transformed = grad(lambda p: call(module, p, x).square().sum())(state(module))
    for a, b, c in zip(expected, recorded, transformed.values(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_stacked_modules() -> None:
    """The idiom of torch's ensembling tutorial, with a base module on the meta device."""
    modules = [fused_rnn.LSTM(3, 4, num_layers=2, bidirectional=True) for _ in range(3)]
    parameters, buffers = stack_module_state(modules)  # type: ignore[arg-type]
    base, x = copy.deepcopy(modules[0]).to("meta"), torch.randn(5, 2, 3)
    out = vmap(lambda p, b: functional_call(base, (p, b), (x,))[0])(parameters, buffers)
    for module, actual in zip(modules, out, strict=True):
        assert torch.equal(module(x)[0], actual)


@each
def test_dropout_between_layers(name: str, backend: str) -> None:
    module, x = make(name, num_layers=2, dropout=0.5), draw(3, 2, 3)
    xs = torch.stack([x, x])
    different = vmap(lambda x: module(x)[0], randomness="different")(xs)
    assert not torch.equal(*different)
    same = vmap(lambda x: module(x)[0], randomness="same")(xs)
    torch.testing.assert_close(*same, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: module(x)[0])(xs)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_narrow_dtypes(name: str, dtype: torch.dtype, backend: str) -> None:
    """Against float64 from the same rounded numbers, within a few roundings of what is stored."""
    narrow = make(name).to(dtype)
    wide, x = copy.deepcopy(narrow).double(), draw(3, 2, 3).to(dtype)
    for case in ("per-sample gradients", "ensemble's gradients", "jvp"):
        actual = pytree.tree_leaves(CASES[case](narrow, x))
        expected = pytree.tree_leaves(CASES[case](wide, x.double()))
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            # x.cos() and the products by 0.5 and 1.5 round once more in the narrow dtype.
            bound = 16 * torch.finfo(dtype).eps * b.abs().max().clamp(min=1)
            assert (a.double() - b).abs().max() <= bound, case


def test_empty_batches_and_maps() -> None:
    module = make("LSTM")
    assert vmap(lambda x: module(x)[0])(draw(2, 3, 0, 3)).shape == (2, 3, 0, 4)
    gradients = vmap(grad(lambda p, x: loss(module, p, x)), (None, 0))(state(module), draw(2, 3, 0, 3))
    assert all(value.shape[0] == 2 and not value.any() for value in gradients.values())
