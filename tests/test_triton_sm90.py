"""What the plan picks on a Hopper chip, compiled without one: registers, spills, shared memory, wgmma."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton_support import H100, Configuration, check_resources, every_configuration, examples, record, usage

from fused_rnn.cells import GRU, LSTM
from fused_rnn.kernels.triton.heuristic import choose
from fused_rnn.kernels.triton.plan import Call

# A load that passes by the first-level cache, where what others wrote would not be seen.
OF_OTHERS = r"tt\.load[^\n]* cg\b"

EXAMPLES = examples(each for each in every_configuration(H100).values() if each.call.dtype == torch.bfloat16)


@pytest.mark.parametrize("configuration", every_configuration(H100).values(), ids=str)
def test_resources(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the heuristic can pick here, of any size."""
    check_resources(configuration, monkeypatch)


def test_only_programs_that_meet_are_launched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cooperative launch is an error where the programs cannot all run at once; without it they would wait for ever."""
    for configuration in EXAMPLES:
        given = record(configuration.call, configuration.plan, False, monkeypatch)
        assert given.get("launch_cooperative_grid", False) == (configuration.plan.regime == "cooperative") == given["MEET"]


@pytest.mark.parametrize("hidden", [64, 256])
def test_tf32_products(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user allows TF32, tensor cores do the product; where not, none does."""
    for tf32 in (True, False):
        call = Call(LSTM, False, hidden, 16, 1, torch.float32, tf32=tf32)
        configuration = Configuration(call, choose(call, H100), H100, everything=False)
        found = usage(configuration, monkeypatch)
        assert ("tf32" in found.ptx) == tf32


def test_nothing_is_moved_before_the_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads h of the others only after the wait, and writes its own before it arrives."""
    call = Call(LSTM, False, 512, 16, 1, torch.bfloat16)
    code = usage(Configuration(call, choose(call, H100), H100, everything=False), monkeypatch).ttgir
    before, _, loop = code.partition("scf.for")
    waited = loop.index("acquire")
    read, product = re.search(OF_OTHERS, loop).start(), loop.index("warp_group_dot")
    written, arrived = loop.index("tt.store"), loop.index("release")
    assert waited < read < product < written < arrived
    assert not re.search(OF_OTHERS, before)


def test_options_change_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plainest call of a configuration takes no more than the one with every option."""
    for configuration in EXAMPLES:
        if configuration.call.cell in (LSTM, GRU):
            check_resources(dataclasses.replace(configuration, everything=False), monkeypatch)
