"""Every configuration that the plan picks on a Hopper chip, compiled without one: registers, spills, shared memory, wgmma."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton_support import H100, Configuration, check_resources, configurations, examples, record, usage

from fused_rnn.cells import GRU, LSTM, RNN_TANH
from fused_rnn.kernels.triton.heuristic import choose
from fused_rnn.kernels.triton.plan import Call

# A load that passes by the first-level cache, where what others wrote would not be seen.
OF_OTHERS = r"tt\.load[^\n]* cg\b"

HIDDEN = (64, 128, 256, 512, 768, 1024, 1536)
ALL = configurations(H100, HIDDEN, (16, 256, 1024), (LSTM, GRU), (torch.bfloat16,))
FLOAT32 = configurations(H100, (64, 128, 1024), (16, 256), (LSTM,), (torch.float32,))
OTHERS = [
    # Many sequences: the largest tiles of a program that is alone.
    *configurations(H100, (32, 64, 128), (5000,), (LSTM, GRU), (torch.bfloat16,)),
    *configurations(H100, (64,), (5000,), (LSTM,), (torch.float32,)),
    *configurations(H100, (100, 1024), (16, 256), (RNN_TANH,), (torch.bfloat16,)),
    # Sizes that nothing divides: every load has a mask of its own.
    *configurations(H100, (41, 301, 999), (16,), (LSTM, GRU), (torch.float16,)),
    *configurations(H100, (41,), (16,), (GRU,), (torch.float64,)),
]


@pytest.mark.parametrize("configuration", [*ALL, *FLOAT32, *OTHERS], ids=str)
def test_resources(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resources(configuration, H100, monkeypatch)


@pytest.mark.parametrize("configuration", examples(ALL), ids=str)
def test_forward_uses_hopper_products(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights fill the 64 rows of a tile, so that the forward's products are wgmma however few sequences there are."""
    found = usage(configuration, H100, monkeypatch)
    if configuration.plan.regime in ("resident", "cooperative") and not configuration.call.backward:
        assert "wgmma.mma_async" in found.ptx
        assert "mma.sync" not in found.ptx


def test_only_programs_that_meet_are_launched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cooperative launch is an error where the programs cannot all run at once; without it they would wait for ever."""
    for configuration in examples(ALL):
        given = record(configuration.call, configuration.plan, False, monkeypatch)
        assert given.get("launch_cooperative_grid", False) == (configuration.plan.regime == "cooperative") == given["MEET"]


@pytest.mark.parametrize("hidden", [64, 256])
def test_tf32_products(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user allows TF32, tensor cores do the product; where not, none does."""
    for tf32 in (True, False):
        call = Call(LSTM, False, hidden, 16, 1, torch.float32, tf32=tf32)
        configuration = Configuration(call, choose(call, H100), everything=False)
        found = usage(configuration, H100, monkeypatch)
        assert ("tf32" in found.ptx) == tf32


def test_nothing_is_moved_before_the_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads h of the others only after the wait, and writes its own before it arrives."""
    call = Call(LSTM, False, 512, 16, 1, torch.bfloat16)
    code = usage(Configuration(call, choose(call, H100), everything=False), H100, monkeypatch).ttgir
    before, _, loop = code.partition("scf.for")
    waited = loop.index("acquire")
    read, product = re.search(OF_OTHERS, loop).start(), loop.index("warp_group_dot")
    written, arrived = loop.index("tt.store"), loop.index("release")
    assert waited < read < product < written < arrived
    assert not re.search(OF_OTHERS, before)


def test_options_change_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plainest call of a configuration takes no more than the one with every option."""
    for configuration in examples(ALL):
        plain = dataclasses.replace(configuration, everything=False)
        check_resources(plain, H100, monkeypatch)
