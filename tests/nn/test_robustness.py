"""What surrounds a call: processes, threads, modes and defaults of torch, and tensors that are not plain contiguous memory."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fused_rnn

LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
modules = pytest.mark.parametrize("name", LAYERS + CELLS)
layers = pytest.mark.parametrize("name", LAYERS)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork has no forked child")
ROOT = Path(__file__).parents[2]


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [tensor for item in results for tensor in flat(item)]


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    ours, theirs = getattr(fused_rnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def trained(module: nn.Module, input: Tensor) -> list[Tensor]:
    """Results and the gradients of the parameters."""
    results = flat(module(input))
    loss = sum(result.square().sum() for result in results)
    return [result.detach() for result in results] + list(torch.autograd.grad(loss, list(module.parameters())))


def _train_in_child(module: nn.Module, input: Tensor, expected: list[Tensor]) -> None:
    with torch.no_grad():
        results = flat(module(input))
    torch.testing.assert_close(results, expected[: len(results)], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained(module, input), expected, rtol=1e-4, atol=1e-4)


def run_child(method: str, module: nn.Module, input: Tensor, expected: list[Tensor]) -> None:
    child = multiprocessing.get_context(method).Process(target=_train_in_child, args=(module, input, expected))
    child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the child hangs")
    assert child.exitcode == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["cpp", "numba"])
def test_forked_child_after_the_parent_used_its_threads(name: str) -> None:
    """A matrix product of torch's own would hang there, waiting for threads that are gone; ours sees it and uses one thread."""
    status = fused_rnn.backends()[name]
    if not status.available:
        pytest.skip(f"{name} cannot run here: {status.detail}")
    module, input = fused_rnn.LSTM(128, 128), torch.randn(40, 32, 128)
    with fused_rnn.backend(name):
        expected = trained(module, input)
        run_child("fork", module, input, expected)
        # The parent is as it was.
        torch.testing.assert_close(trained(module, input), expected, rtol=1e-5, atol=1e-5)
    assert torch.get_num_threads() == 2


@needs_fork
def test_forked_child_says_that_it_uses_one_thread() -> None:
    program = (
        "import os, sys, torch, warnings, fused_rnn\n"
        "torch.set_num_threads(2); module, input = fused_rnn.GRU(64, 64), torch.randn(30, 32, 64); module(input)\n"
        "if (child := os.fork()) == 0:\n"
        "    with warnings.catch_warnings(record=True) as caught:\n"
        "        warnings.simplefilter('always')\n"
        "        if {set_first}: torch.set_num_threads(1)\n"
        "        module(input); module(input)\n"
        "    found = [str(w.message) for w in caught if 'forked' in str(w.message)]\n"
        "    os._exit(0 if len(found) == {warnings} and torch.get_num_threads() == 1 else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    for set_first, warned in ((False, 1), (True, 0)):
        text = program.format(set_first=set_first, warnings=warned)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=ROOT, timeout=120, check=False)
        assert done.returncode == 0, (set_first, done.returncode)


def test_spawned_child() -> None:
    module, input = fused_rnn.GRU(16, 24, 2, bidirectional=True), torch.randn(5, 3, 16)
    run_child("spawn", module, input, trained(module, input))


def test_many_python_threads_at_once() -> None:
    """Eight threads, each with a module of its own and one that all share, forward and backward, many times."""
    input = torch.randn(9, 5, 12)
    shared = fused_rnn.LSTM(12, 40, 2)
    own = [getattr(fused_rnn, LAYERS[i % 3])(12, 17 + 8 * i, bidirectional=i % 2 == 1) for i in range(8)]
    expected = [trained(module, input) for module in own]
    expected_shared = trained(shared, input)

    def work(index: int) -> None:
        for _ in range(15):
            torch.testing.assert_close(trained(own[index], input), expected[index], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(trained(shared, input), expected_shared, rtol=1e-4, atol=1e-4)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, index) for index in range(8)]:
            done.result(timeout=120)


def test_backward_in_another_thread() -> None:
    module, input = fused_rnn.LSTM(12, 20), torch.randn(9, 5, 12)
    expected = trained(module, input)
    results = flat(module(input))
    loss = sum(result.square().sum() for result in results)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        grads = pool.submit(torch.autograd.grad, loss, list(module.parameters())).result()
    torch.testing.assert_close(list(grads), expected[len(results) :])


@modules
def test_inference_mode(name: str) -> None:
    """Results can be read and fed back; to use them in a graph is torch's error."""
    ours, theirs = pair(name, 4, 6)
    input = torch.randn(3, 4)
    with torch.inference_mode():
        results = flat(ours(input))
        assert all(result.is_inference() for result in results)
        torch.testing.assert_close(results, flat(theirs(input)))
        state = results if name == "LSTMCell" else results[1:] if name == "LSTM" else results[-1]
        torch.testing.assert_close(flat(ours(input, state)), flat(theirs(input, state)))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ours(input, state)
    with torch.no_grad():
        ours(input, state)


@modules
def test_default_dtype_and_device(name: str) -> None:
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        ours, theirs = pair(name, 4, 6)
        input = torch.randn(3, 4)
        torch.testing.assert_close(trained(ours, input), trained(theirs, input))
        assert flat(ours(input))[0].dtype == torch.float64
        # An explicit dtype wins, and the states follow the input, not the default.
        ours, theirs = pair(name, 4, 6, dtype=torch.float32)
        torch.testing.assert_close(flat(ours(input.float())), flat(theirs(input.float())))
    finally:
        torch.set_default_dtype(default)
    with torch.device("meta"):
        module = getattr(fused_rnn, name)(4, 6)
        assert module(torch.randn(3, 4))[0].device.type == "meta"
    # Tensors on the CPU while the default is another device: no helper tensor may follow the default.
    ours, theirs = pair(name, 4, 6)
    input = torch.randn(3, 4)
    try:
        torch.set_default_device("meta")
        got = trained(ours, input)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, trained(theirs, input))


@layers
def test_packed_under_another_default_device(name: str) -> None:
    ours, theirs = pair(name, 4, 6, bidirectional=True)
    packed = nn.utils.rnn.pack_sequence([torch.randn(length, 4) for length in (2, 5, 3)], enforce_sorted=False)
    try:
        torch.set_default_device("meta")
        out, _ = ours(packed)
        grads = torch.autograd.grad(out.data.sum(), list(ours.parameters()))
    finally:
        torch.set_default_device(None)
    expected = theirs(packed)[0].data
    torch.testing.assert_close(out.data, expected)
    torch.testing.assert_close(list(grads), list(torch.autograd.grad(expected.sum(), list(theirs.parameters()))))


@pytest.mark.usefixtures("backend")
@modules
def test_deterministic_mode_gives_the_same_bits(name: str) -> None:
    module, input = getattr(fused_rnn, name)(12, 20), torch.randn(7, 12)
    given = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        first, second = trained(module, input), trained(module, input)
        torch.use_deterministic_algorithms(False)
        third = trained(module, input)
    finally:
        torch.use_deterministic_algorithms(given)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(third, first, rtol=0, atol=0)


class Tagged(Tensor):
    """A tensor subclass without a rule of its own, as libraries make them for bookkeeping."""


class Weight(nn.Parameter):
    pass


@pytest.mark.usefixtures("backend")
@modules
def test_tensor_subclasses(name: str) -> None:
    ours, theirs = pair(name, 4, 6)
    input = torch.randn(3, 4)
    expected = trained(theirs, input)
    torch.testing.assert_close([t.as_subclass(Tensor) for t in trained(ours, input.as_subclass(Tagged))], expected)
    for key, parameter in list(ours.named_parameters()):
        setattr(ours, key, Weight(parameter.detach()))
    torch.testing.assert_close(trained(ours, input), expected)


@pytest.mark.usefixtures("backend")
@modules
def test_negated_views(name: str) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the numbers with the other sign."""
    ours, theirs = pair(name, 4, 6)
    spectrum = torch.randn(3, 4, dtype=torch.complex64)
    input = spectrum.conj().imag
    assert input.is_neg()
    torch.testing.assert_close(trained(ours, input), trained(theirs, input))
    # And a gradient that is such a view.
    results = [flat(module(input))[0] for module in (ours, theirs)]
    d_out = torch.randn_like(results[0], dtype=torch.float32)
    grads = [
        torch.autograd.grad(result, list(module.parameters()), torch._neg_view(d_out), allow_unused=True)
        for result, module in zip(results, (ours, theirs), strict=True)
    ]
    torch.testing.assert_close(*map(list, grads))


@pytest.mark.usefixtures("backend")
@modules
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_read_only_memory(name: str, tmp_path: Path) -> None:
    """Weights and input that lie in a file mapped for reading only: a write would end the process."""
    ours, theirs = pair(name, 4, 6)
    input = torch.randn(3, 4)
    with torch.no_grad():
        expected = flat(theirs(input))
        for key, parameter in list(ours.named_parameters()):
            np.save(tmp_path / f"{key}.npy", parameter.numpy())
            setattr(ours, key, nn.Parameter(torch.from_numpy(np.load(tmp_path / f"{key}.npy", mmap_mode="r"))))
        np.save(tmp_path / "input.npy", input.numpy())
        torch.testing.assert_close(flat(ours(torch.from_numpy(np.load(tmp_path / "input.npy", mmap_mode="r")))), expected)
    torch.testing.assert_close(trained(ours, input), trained(theirs, input))


@pytest.mark.usefixtures("backend")
@modules
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("grad", [False, True])
def test_weights_in_any_layout(name: str, rows: int, grad: bool) -> None:
    """Transposed memory, views of one flat buffer, every second row or column, one row seen many times."""
    ours, theirs = pair(name, 4, 6)
    input = torch.randn(rows, 4)
    layouts = {
        "transposed": lambda w: w.t().contiguous().t() if w.dim() == 2 else w,
        "flat": lambda w: torch.cat((torch.zeros(3), w.flatten()))[3:].view(w.shape),
        "rows": lambda w: w.repeat_interleave(2, 0)[::2],
        "columns": lambda w: w.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda w: w[:1].expand(w.shape),
    }
    for label, layout in layouts.items():
        results = []
        for module in (ours, theirs):
            twin = copy.deepcopy(module)
            for key, parameter in list(twin.named_parameters()):
                setattr(twin, key, nn.Parameter(layout(parameter.detach())))
            if grad:
                results.append(trained(twin, input))
            else:
                with torch.no_grad():
                    results.append(flat(twin(input)))
        torch.testing.assert_close(*results, msg=lambda text, label=label: f"{label}: {text}")


@modules
def test_frozen_parts(name: str) -> None:
    """Some parameters frozen, as in fine-tuning: the others' gradients are as in torch, the frozen have none."""
    ours, theirs = pair(name, 4, 6)
    input = torch.randn(3, 4)
    for frozen in ("weight_ih", "weight_hh", "bias", "weight"):
        for module in (ours, theirs):
            module.zero_grad(set_to_none=True)
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(not key.startswith(frozen))
            sum(result.square().sum() for result in flat(module(input))).backward()
        for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (mine.grad is None) == key.startswith(frozen) == (other.grad is None), key
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad)


@modules
def test_copies_are_independent(name: str) -> None:
    module, input = getattr(fused_rnn, name)(4, 6), torch.randn(3, 4)
    expected = [tensor.detach() for tensor in flat(module(input))]
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close([tensor.detach() for tensor in flat(module(input))], expected, rtol=0, atol=0)
    assert not any(mine is other for mine, other in zip(module.parameters(), twin.parameters(), strict=True))


@modules
def test_modules_pickled_without_what_came_later(name: str) -> None:
    """A state with torch.nn's own attributes alone, as a pickle of an older version has."""
    module, theirs = pair(name, 4, 6)
    input = torch.randn(3, 4)
    state = dict(theirs.__getstate__())
    old = type(module).__new__(type(module))
    old.__setstate__(state)
    torch.testing.assert_close(flat(old(input)), flat(module(input)), rtol=0, atol=0)
    assert repr(old) == repr(module)
    old.reset_parameters()
    # Strict loading of torch.nn's state_dict, both ways, with nothing missing and nothing new.
    assert module.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(module.state_dict())
