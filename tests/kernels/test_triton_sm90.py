"""What the plan picks on a Hopper chip, compiled without one: registers, spills, shared memory, products, what is read when."""

from __future__ import annotations

import dataclasses
import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from triton_choices import BFLOAT16, FLOAT16, FLOAT64, FORMS, THREE_PLANES, TWO_PLANES, drawn, largest, representative
from triton_support import H100, Configuration, check_resources, record, usage

from fused_rnn.kernels.triton.plan import REGIMES

REGISTERS, MEET = ("resident", "cooperative"), ("cooperative", "streamed")

CHOSEN = [
    *representative(H100, ("lstm", "gru"), FORMS, (*REGISTERS, "streamed"), aligned=True),
    *representative(H100, ("rnn_tanh",), (BFLOAT16, TWO_PLANES), (*REGISTERS, "streamed"), aligned=True),
    *representative(H100, ("gru",), (FLOAT16,), (*REGISTERS, "streamed"), aligned=True),
    *representative(H100, ("gru",), (FLOAT64,), ("library",), aligned=True),
]


@pytest.mark.parametrize("configuration", CHOSEN, ids=str)
def test_resources(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for all that the heuristic can pick here."""
    check_resources(configuration, monkeypatch)


@pytest.mark.parametrize("configuration", drawn(H100), ids=str)
def test_resources_of_choices_at_random(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many more as ``FUSED_RNN_TRITON_DRAWN`` says; ``make test-extended`` does."""
    check_resources(configuration, monkeypatch)


def example(cell: str, backward: bool, regime: str) -> Configuration:
    """The one that is compiled already."""
    return next(
        each
        for each in CHOSEN
        if (each.call.cell.name, each.call.backward, each.plan.regime) == (cell, backward, regime) and each.plan.planes == 1
    )


@pytest.mark.parametrize("regime", REGIMES)
def test_only_programs_that_meet_are_launched_together(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cooperative launch is an error where the programs cannot all run at once; without it they would wait for ever."""
    for backward in (False, True):
        configuration = largest(H100, "gru", backward, FLOAT64 if regime == "library" else BFLOAT16, regime, True, True)
        assert configuration is not None
        _, given = record(configuration.call, configuration.plan, False, monkeypatch)
        assert given.get("launch_cooperative_grid", False) == (regime in MEET)


@pytest.mark.parametrize(("backward", "form", "precision"), [(False, TWO_PLANES, "tf32"), (True, THREE_PLANES, "tf32x3")])
def test_precision_of_float32(
    backward: bool, form: tuple[object, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed products are rounded to TF32 only where the user allows it; elsewhere each is three, which make up for it."""
    found = next(
        each
        for each in CHOSEN
        if (each.call.cell.name, each.call.backward, each.plan.regime) == ("lstm", backward, "streamed")
        and (each.call.dtype, each.call.tf32) == form
    )
    _, arguments = record(found.call, found.plan, False, monkeypatch)
    assert arguments["PRECISION"] == precision
    code = usage(found, monkeypatch)
    assert "tf32" in code.ptx
    products = code.ttgir.count("warp_group_dot ") + code.ttgir.count("tt.dot ")
    assert (products >= 3) == (precision == "tf32x3")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_nothing_is_moved_before_the_wait(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads of the others only after the wait; its threads meet between their stores and its arrival."""
    code = usage(example("lstm", backward, "cooperative"), monkeypatch).ptx
    where = {
        name: [found.start() for found in re.finditer(pattern, code)]
        for name, pattern in (
            ("wait", r"ld\.acquire\.gpu"),
            ("read", r"ld\.global\.cg\.v4"),
            ("multiply", r"mma\.sync"),
            ("store", r"st\.global"),
            ("meet", r"bar\.sync"),
            ("arrive", r"(?:atom|red)[.\w:]*release"),
        )
    }
    assert min(where["wait"]) < min(where["read"]) < min(where["multiply"])
    # A group of reads follows each wait.
    for wait, after in zip(where["wait"], [*where["wait"][1:], len(code)], strict=True):
        assert any(wait < read < after for read in where["read"])
    # The threads of a program meet after their stores and before one of them says so.
    assert where["arrive"]
    for arrive in where["arrive"]:
        stored = max((at for at in where["store"] if at < arrive), default=0)
        assert any(stored < meet < arrive for meet in where["meet"])


def test_a_streamed_step_reads_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where h goes through shared memory: no copy of it is under way before the wait."""
    code = usage(example("lstm", False, "streamed"), monkeypatch).ttgir
    before, _, loop = code.partition("scf.for")
    of_others = r"(?:tt\.load|async_copy_global_to_local)[^\n]*(?: cg\b|cacheModifier = cg)"
    waited, read = loop.index("ld.acquire.gpu"), re.search(of_others, loop)
    assert read is not None
    written, arrived = loop.index("tt.store"), loop.index("release")
    assert waited < read.start() < written < arrived
    assert not re.search(of_others, before)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_options_change_no_limit(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plainest call of a configuration takes no more than the one with every option."""
    for cell, regime in (("lstm", "cooperative"), ("gru", "resident")):
        check_resources(dataclasses.replace(example(cell, backward, regime), everything=False), monkeypatch)
