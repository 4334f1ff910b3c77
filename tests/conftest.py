"""What every test runs under: two threads, poisoned memory, and one backend at a time."""

from collections.abc import Iterator

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
CPU_BACKENDS = [name for name, status in fused_rnn.backends().items() if status.available and "cpu" in status.devices]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that the extension has here, one after another."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
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
