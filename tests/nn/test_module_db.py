"""PyTorch's own module samples, with our class in place of torch.nn's, and none of torch's expected failures."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from older_torch import checks_of_2_13
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal import common_modules
from torch.testing._internal.common_modules import ErrorModuleInput, ModuleErrorEnum, ModuleInfo, ModuleInput

import fused_rnn

NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
# Number of samples and of error samples in torch 2.13: a list that shrinks unseen would test nothing.
LEAST = {"RNN": (32, 14), "LSTM": (32, 14), "GRU": (16, 14), "RNNCell": (3, 6), "LSTMCell": (2, 4), "GRUCell": (2, 6)}


def _ours(name: str) -> ModuleInfo:
    """Torch's input functions around our class; its decorators, which mark what fails in torch, are left out."""
    theirs = next(info for info in common_modules.module_db if info.module_cls is getattr(torch.nn, name))
    return ModuleInfo(
        getattr(fused_rnn, name),
        module_inputs_func=theirs.module_inputs_func,
        module_error_inputs_func=theirs.module_error_inputs_func,
        train_and_eval_differ=theirs.train_and_eval_differ,
    )


def _samples(name: str, dtype: torch.dtype, training: bool, requires_grad: bool) -> list[ModuleInput]:
    info = _ours(name)
    return list(
        info.module_inputs_func(info, "cpu", dtype, requires_grad, training, with_packed_sequence=name in ("RNN", "GRU"))
    )


def _module(name: str, sample: ModuleInput, dtype: torch.dtype, training: bool) -> torch.nn.Module:
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    return getattr(fused_rnn, name)(*args, **kwargs, dtype=dtype).train(training)


def _twin(name: str, module: torch.nn.Module, sample: ModuleInput, dtype: torch.dtype) -> torch.nn.Module:
    twin = getattr(torch.nn, name)(*sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=dtype)
    twin.load_state_dict(module.state_dict())
    return twin.train(module.training)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in a nest of arguments or results."""
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _flat(value: object) -> list[torch.Tensor]:
    return list(_tensors(value))


def _detached(value: object) -> object:
    if isinstance(value, PackedSequence):
        return value._replace(data=_detached(value.data))
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(item) for item in value)
    return value


each = pytest.mark.parametrize("name", NAMES)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# The mode and the dtype do not meet anywhere, so two of the four pairs stand for all.
modes_and_dtypes = pytest.mark.parametrize(
    ("training", "dtype"), [(True, torch.float32), (False, torch.float64)], ids=["train-float32", "eval-float64"]
)


@checks_of_2_13
@each
def test_sample_counts(name: str) -> None:
    info = _ours(name)
    samples = info.module_inputs_func(info, "cpu", torch.float32, False, True)
    errors = info.module_error_inputs_func(info, "cpu", torch.float32, False, True)
    assert len(samples) >= LEAST[name][0]
    assert len(errors) >= LEAST[name][1]


@each
@modes_and_dtypes
@pytest.mark.usefixtures("backend")
def test_forward_and_gradients(name: str, training: bool, dtype: torch.dtype) -> None:
    """The results and the gradients of every input, state and parameter are torch.nn's, in eval mode too."""
    for sample in _samples(name, dtype, training, requires_grad=True):
        module = _module(name, sample, dtype, training)
        twin = _twin(name, module, sample, dtype)
        args, other = sample.forward_input.args, _detached(sample.forward_input.args)
        results, expected = module(*args), twin(*other)
        assert type(results) is type(expected)
        results, expected = _flat(results), _flat(expected)
        torch.testing.assert_close(results, expected)
        if sample.reference_fn is not None and not isinstance(args[0], PackedSequence):
            torch.testing.assert_close(results, _flat(sample.reference_fn(twin, *_detached(args))))
        d_results = [torch.randn_like(result) for result in results]
        ours = torch.autograd.grad(results, [*_tensors(args), *module.parameters()], d_results)
        theirs = torch.autograd.grad(expected, [*_tensors(other), *twin.parameters()], d_results)
        torch.testing.assert_close(ours, theirs)


@each
@pytest.mark.usefixtures("backend")
def test_non_contiguous_arguments(name: str) -> None:
    """Inputs and states, and then the gradients of results, spread out in memory."""
    for sample in _samples(name, torch.float64, True, requires_grad=True):
        module = _module(name, sample, torch.float64, True)
        args = sample.forward_input.args
        expected = _flat(module(*args))
        d_results = [torch.randn_like(result) for result in expected]
        gradients = torch.autograd.grad(expected, _flat(args), d_results)
        spread = _spread(args)
        results = _flat(module(*spread))
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
        d_spread = [_spread(d_result) for d_result in d_results]
        torch.testing.assert_close(torch.autograd.grad(results, _flat(spread), d_spread), gradients, rtol=1e-12, atol=1e-12)


def _spread(value: object) -> object:
    """The same values with a stride of two in the last dimension."""
    if isinstance(value, PackedSequence):
        return value._replace(data=_spread(value.data))
    if isinstance(value, torch.Tensor):
        spread = value.detach().repeat_interleave(2, dim=-1)[..., ::2]
        assert not spread.is_contiguous() or spread.shape[-1] == 1
        return spread.requires_grad_(value.requires_grad)
    return type(value)(_spread(item) for item in value)


@each
@pytest.mark.usefixtures("backend")
def test_gradcheck(name: str) -> None:
    for sample in _different(_samples(name, torch.float64, True, requires_grad=True)):
        module = _module(name, sample, torch.float64, True)
        _check(torch.autograd.gradcheck, module, sample)


@each
def test_gradgradcheck(name: str) -> None:
    for sample in _different(_samples(name, torch.float64, False, requires_grad=True)):
        module = _module(name, sample, torch.float64, False)
        _check(torch.autograd.gradgradcheck, module, sample)


def _different(samples: list[ModuleInput]) -> list[ModuleInput]:
    """The samples with given states that hold everything the others hold: biases and, in a sequence, both directions."""
    kept = []
    for sample in samples:
        options = sample.constructor_input.kwargs
        whole = options.get("bias", True) and options.get("bidirectional", True) and not options.get("batch_first")
        if whole and len(sample.forward_input.args) > 1:
            kept.append(sample)
    assert kept
    return kept


def _check(check, module: torch.nn.Module, sample: ModuleInput) -> None:
    names = [name for name, _ in module.named_parameters()]
    input, hx = sample.forward_input.args
    states = hx if isinstance(hx, tuple) else (hx,)

    def function(input: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states, parameters = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
        hx = states if len(states) == 2 else states[0]
        return tuple(_tensors(torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (input, hx))))

    # The random projections of the fast mode cover every entry of the Jacobian at the cost of one.
    assert check(function, (input, *states, *module.parameters()), fast_mode=True)


@each
@modes
def test_errors(name: str, training: bool) -> None:
    """Type and message of every error sample, against the sample's own pattern and against what torch.nn says."""
    info = _ours(name)
    errors: list[ErrorModuleInput] = info.module_error_inputs_func(info, "cpu", torch.float32, False, training)
    for error in errors:
        sample = error.module_error_input
        constructor, forward = sample.constructor_input, sample.forward_input
        messages = []
        for cls in (getattr(fused_rnn, name), getattr(torch.nn, name)):
            if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error.error_type, match=error.error_regex) as caught:
                    cls(*constructor.args, **constructor.kwargs)
            else:
                module = cls(*constructor.args, **constructor.kwargs).train(training)
                with pytest.raises(error.error_type, match=error.error_regex) as caught:
                    module(*forward.args, **forward.kwargs)
            messages.append((caught.type, str(caught.value)))
        assert messages[0] == messages[1]


@each
def test_state_dict_pickle_repr_and_factory(name: str) -> None:
    for sample in _samples(name, torch.float32, False, requires_grad=False):
        module = _module(name, sample, torch.float32, False)
        twin = _twin(name, module, sample, torch.float32)
        assert list(module.state_dict()) == list(twin.state_dict())
        assert module.load_state_dict(twin.state_dict()).missing_keys == []
        assert repr(module) == repr(twin)
        expected = _flat(module(*sample.forward_input.args))
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            torch.testing.assert_close(_flat(copied(*sample.forward_input.args)), expected, rtol=0, atol=0)
        constructor = sample.constructor_input
        meta = getattr(fused_rnn, name)(*constructor.args, **constructor.kwargs, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}
        assert [p.shape for p in meta.parameters()] == [p.shape for p in twin.parameters()]
