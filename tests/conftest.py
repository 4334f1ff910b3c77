"""What every test runs under: two threads, poisoned memory, and one backend at a time."""

import os
from collections.abc import Iterator

# Before OpenMP starts, with torch. Two worker processes of two threads each share the processors with what else runs; a thread
# that spins while it waits for another keeps that one from running, and tests of small layers take five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

import fused_rnn

# `--hypothesis-profile extended`, which `make test-extended` gives, draws many examples and other ones each time.
hypothesis.settings.register_profile("default", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("extended", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")

try:
    from fused_rnn import _C
except ImportError:  # without the extension there is none to try
    ISAS = []
else:
    ISAS = _C.isas()
# The files that take longest, longest first. `make test` gives whole files to its processes in this order: a long one that
# comes last is waited for by all.
LONGEST = (
    "test_triton_interpreted.py",
    "test_triton_sm90.py",
    "test_install.py",
    "test_triton_sm80.py",
    "test_training_jobs.py",
    "test_distributed.py",
    "test_kernels.py",
    "test_backends.py",
    "test_backends_cpp.py",
    "test_compile.py",
    "test_numba.py",
    "test_build.py",
    "test_int8.py",
    "test_benchmarks.py",
    "test_autocast.py",
    "test_export.py",
    "test_benchmarks_gpu.py",
)
CPU_BACKENDS = [name for name, status in fused_rnn.backends().items() if status.available and "cpu" in status.devices]
KERNELS = [(name, isa) for name in CPU_BACKENDS for isa in (ISAS if name == "cpp" else [""])]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order is otherwise as it was."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that the extension has here, one after another."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=KERNELS, ids=lambda kernels: "-".join(filter(None, kernels)))
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every backend that is available on the CPU, and on every instruction set of the extension."""
    name, isa = request.param
    before = _C.isa() if isa else ""
    if isa:
        _C.set_isa(isa)
    with fused_rnn.backend(name):
        yield name
    if isa:
        _C.set_isa(before)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that a read before the first write shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on every backend that is available on the CPU."""
    with fused_rnn.backend(request.param):
        yield request.param
