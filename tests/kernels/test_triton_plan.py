"""Which regime a call gets and why, the table of measured choices, forced choices, and what is refused. Nothing is compiled."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_rnn
from benchmarks.gpu import gate
from fused_rnn.cells import CELLS, GRU, LSTM
from fused_rnn.kernels import dispatch
from fused_rnn.kernels import triton as backend
from fused_rnn.kernels.triton import heuristic, plan, tuned
from fused_rnn.kernels.triton.heuristic import choose
from fused_rnn.kernels.triton.plan import Call, Device

A100 = Device("A100", (8, 0), 108, 163 << 10)
H100 = Device("H100", (9, 0), 132, 227 << 10)
SMALL = Device("a small chip", (8, 6), 20, 99 << 10)
MEETING = ("cooperative", "streamed")


def made_for(hidden: int, batch: int, dtype: torch.dtype = torch.bfloat16, device: Device = H100, **options: bool) -> plan.Plan:
    return choose(Call(LSTM, options.pop("backward", False), hidden, batch, 1, dtype, **options), device)


def regime(hidden: int, batch: int, dtype: torch.dtype = torch.bfloat16, device: Device = H100, **options: bool) -> str:
    return made_for(hidden, batch, dtype, device, **options).regime


def beside(made: plan.Plan) -> int:
    """Programs that one processor is sure to run at once: two of four warps have the registers of one of eight."""
    return 2 if made.regime == "cooperative" and made.warps <= 4 else 1


def test_regimes_by_size() -> None:
    """Small layers are alone, middle ones meet, weights beyond registers are streamed; the library does what is left."""
    assert regime(64, 64) == "resident"
    assert regime(128, 512) == "resident"
    assert regime(1024, 16) == regime(1024, 16, backward=True) == "cooperative"
    assert regime(4096, 16) == regime(4096, 16, backward=True) == "streamed"
    assert regime(64, 64, torch.float64) == "library"
    assert regime(64, 64, projected=True) == "library"
    assert regime(2048, 16, device=A100) == "streamed"
    assert regime(4096, 16, device=SMALL) == "library"


def test_what_float32_is_cut_into() -> None:
    """Two numbers of 16 bits where the switch of cuDNN's RNNs lets products be rounded, three where not."""
    assert made_for(64, 8, torch.float32, tf32=True).planes == 2
    assert made_for(64, 8, torch.float32).planes == 3
    assert made_for(64, 8).planes == made_for(64, 8, torch.float16).planes == 1


@settings(deadline=None)
@given(
    cell=st.sampled_from(sorted(CELLS)),
    backward=st.booleans(),
    hidden=st.integers(1, 5000),
    batch=st.integers(1, 5000),
    directions=st.integers(1, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    tf32=st.booleans(),
    device=st.sampled_from([A100, H100, SMALL]),
)
def test_every_plan_fits(
    cell: str, backward: bool, hidden: int, batch: int, directions: int, dtype: torch.dtype, tf32: bool, device: Device
) -> None:
    """Every size gets a plan that covers it; programs that meet are never more than are sure to be co-resident."""
    call = Call(CELLS[cell], backward, hidden, batch, directions, dtype, tf32=tf32)
    made = choose(call, device)
    gates = call.cell.num_gates
    assert made.slices * made.units >= hidden
    assert made.tiles * made.batch >= batch
    assert made.reason
    if made.regime == "library":
        return
    assert made.planes == call.planes
    # What a chip has for all programs of a processor is what one may have and the 1 KiB that each takes beside that.
    assert beside(made) * (heuristic.shared_bytes(call, made) + 1024) <= device.shared_bytes + 1024
    assert made.launches == math.ceil(made.tiles / made.tiles_at_once)
    if made.meets:
        programs = made.slices * math.ceil(made.tiles_at_once / made.tiles_each)
        assert programs * made.directions_at_once <= device.processors * beside(made)
    if made.regime == "resident":
        assert made.slices == 1
        assert made.warps * plan.PILE == made.units
        assert 0 <= made.held <= made.planes * gates
    if made.regime == "cooperative":
        # The rows of a program fill whole instructions; the slices of the warps are all of K, and none more than it has to be.
        assert made.piles * plan.PILE >= made.units * (1 if backward else gates)
        assert made.units <= plan.PILE
        blocks = math.ceil(hidden / plan.PART) * (gates if backward else 1)
        assert made.warps * made.parts >= blocks > made.warps * (made.parts - 1)
        assert 0 <= made.held <= made.planes * made.piles * made.parts


def test_no_launch_has_more_programs_than_can_be_co_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the launches themselves: all of a call's tiles and directions, never more at once than processors."""
    pytest.importorskip("triton", reason="Triton is not installed")
    import triton_support as support

    for (hidden, batch, directions), name in itertools.product(((160, 40, 2), (320, 60, 1), (250, 20, 2)), MEETING):
        for cell, backward in itertools.product((LSTM, GRU), (False, True)):
            call = Call(cell, backward, hidden, batch, directions, torch.bfloat16)
            with plan.force(regime=name, units=16, batch=16):
                made = choose(call, SMALL)
            grids = support.grids(call, made, monkeypatch)
            assert max(math.prod(grid) for grid in grids) <= SMALL.processors * beside(made)
            tiles = made.slices * made.tiles * directions
            assert sum(math.prod(grid) for grid in grids) * made.tiles_each >= tiles > SMALL.processors


def test_explain_says_which_and_why() -> None:
    told = backend.explain("gru", 4096, 1024, dtype=torch.float16, bidirectional=True, device=H100)
    forward, backward = told.splitlines()
    assert forward.startswith("gru forward H=4096 N=1024 D=2 float16: streamed (")
    assert "not resident: H=4096 is more than the 128 units" in forward
    assert "not cooperative: " in forward
    assert "not cooperative: 64 programs must run at once, and a small chip runs " in backend.explain(
        "gru", 1024, 9, device=SMALL
    )
    assert backward.startswith("gru backward")
    assert "a slice of 16 units takes" in backend.explain("lstm", 2048, 16, device=H100)
    assert "KiB of shared memory beside the registers, a program has " in backend.explain("lstm", 2048, 16, device=H100)
    forward, backward = backend.explain("lstm", 1024, 16, dtype=torch.bfloat16, device=H100).splitlines()
    for line in (forward, backward):
        assert "64 programs hold a slice of 16 units each" in line
        assert "not streamed: about " in line
    assert "one program holds all weights" in backend.explain("lstm", 64, 4, dtype=torch.bfloat16, device=H100)


def test_explain_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"cell: expected one of rnn_tanh, rnn_relu, lstm, gru, gru_reset_before, .* or .*, got 'tree'"
    ):
        backend.explain("tree", 4, 4, device=H100)
    with pytest.raises(ValueError, match=r"hidden_size: expected 1 or more, got 0"):
        backend.explain("gru", 0, 4, device=H100)
    monkeypatch.setattr(backend, "unavailable", lambda: "torch sees no CUDA device")
    with pytest.raises(RuntimeError, match=r"torch sees no CUDA device; give a plan\.Device"):
        backend.explain("gru", 4, 4)


def test_forced_choices() -> None:
    call = Call(LSTM, False, 256, 64, 1, torch.bfloat16)
    with plan.force(regime="streamed", batch=32):
        made = choose(call, H100)
    assert (made.regime, made.batch, made.reason) == ("streamed", 32, "it was forced")
    with plan.force(regime="cooperative", units=8, batch=16, warps=4):
        made = choose(call, H100)
    assert (made.units, made.batch, made.warps, made.slices, made.piles, made.parts) == (8, 16, 4, 32, 2, 2)
    with plan.force(regime="resident"), pytest.raises(ValueError, match=r"force\(regime='resident'\): H=256 is more than"):
        choose(call, H100)
    for name in MEETING:
        with (
            plan.force(regime=name, units=16),
            pytest.raises(ValueError, match=r"64 programs must run at once, and a .* runs [24]0"),
        ):
            choose(Call(LSTM, False, 1024, 16, 1, torch.bfloat16), SMALL)
    assert choose(call, H100).reason != "it was forced"
    with pytest.raises(ValueError, match=r"regime: expected one of resident, cooperative, streamed, library, got 'stepwise'"):
        plan.force(regime="stepwise").__enter__()
    with pytest.raises(TypeError, match=r"expected regime, units, batch or warps, got chunk"):
        plan.force(chunk=3).__enter__()


def test_a_forced_choice_is_of_the_process() -> None:
    """On a GPU autograd runs the backward in a thread of its own, which is to plan as the caller has said."""
    call = Call(LSTM, True, 256, 64, 1, torch.bfloat16)
    with concurrent.futures.ThreadPoolExecutor(1) as other, plan.force(regime="library"):
        assert other.submit(choose, call, H100).result().regime == "library"
    assert plan.forced() is None


@pytest.mark.parametrize("regime", plan.REGIMES)
def test_what_the_kernels_cannot_do_is_never_planned(regime: str) -> None:
    """float64 and projections are left to the library, whatever is asked for."""
    for call in (Call(GRU, True, 64, 8, 1, torch.float64), Call(LSTM, False, 64, 8, 1, torch.float32, projected=True)):
        with plan.force(regime=regime):
            if regime == "library":
                assert choose(call, H100).regime == "library"
            else:
                with pytest.raises(ValueError, match=r"left to the library's product|the projection of h is a second product"):
                    choose(call, H100)


@pytest.mark.parametrize("device", [A100, H100, SMALL], ids=lambda device: device.name)
def test_the_gate_can_force_every_regime(device: Device) -> None:
    """What ``python -m benchmarks gpu`` judges first fits every chip, and where programs meet there are several."""
    dtypes = ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False))
    for name, (hidden, batch) in gate.REGIMES.items():
        for cell, (dtype, tf32), backward in itertools.product((LSTM, GRU), dtypes, (False, True)):
            with plan.force(regime=name):
                made = choose(Call(cell, backward, hidden, batch, 2, dtype, tf32=tf32), device)
            assert made.regime == name
            assert (made.slices > 1) == (name != "resident")


def table(tmp_path: Path, *rows: dict[str, object]) -> Path:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"format": tuned.FORMAT, "rows": rows}))
    return path


ROW = {"device": "H100", "cell": "lstm", "backward": False, "dtype": "bfloat16", "hidden": 512, "batch": 64, "directions": 1}


def test_measured_choices_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of the nearest sizes that are no smaller decides; where none is alike, or it does not fit, the heuristic does."""
    rows = [
        {**ROW, "regime": "streamed", "units": 16, "tile": 32, "warps": 8},
        {**ROW, "hidden": 256, "regime": "library", "units": 32, "tile": 64, "warps": 4},
        {**ROW, "hidden": 4096, "regime": "cooperative", "units": 16, "tile": 16, "warps": 8},
    ]
    monkeypatch.setenv(tuned.ENVIRONMENT, str(table(tmp_path, *rows)))

    def made(hidden: int, batch: int, device: Device = H100) -> plan.Plan:
        return choose(Call(LSTM, False, hidden, batch, 1, torch.bfloat16), device)

    assert (made(500, 20).regime, made(500, 20).units, made(500, 20).batch, made(500, 20).warps) == ("streamed", 16, 32, 8)
    assert "fastest for H=512, N=64" in made(500, 20).reason
    assert made(256, 64).regime == "library"
    # What was measured for twice as many units says nothing.
    assert "fastest" not in made(1000, 16).reason
    assert "fastest" not in made(500, 65).reason
    assert "fastest" not in made(500, 20, A100).reason
    # Programs for that many units do not all run at once, whatever a table says.
    assert made(4096, 16).regime == "streamed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a table of tile sizes in JSON"),
        ("[]", "expected a table of tile sizes of format 1"),
        ('{"format": 1, "rows": [{"device": "x"}]}', "a row lacks cell, backward"),
    ],
)
def test_a_broken_table_is_named(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    monkeypatch.setenv(tuned.ENVIRONMENT, str(path))
    with pytest.raises(ValueError, match=message):
        choose(Call(LSTM, False, 256, 16, 1, torch.bfloat16), H100)


def test_the_table_of_the_package_can_be_read() -> None:
    assert isinstance(tuned.rows(tuned.PATH), list)


@pytest.fixture
def _fresh_dispatch() -> None:
    """The dispatcher remembers what it found; these tests change it."""
    caches = (dispatch._unavailable, dispatch._automatic, dispatch._devices, dispatch._load, dispatch._unasked)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("_fresh_dispatch")
def test_a_cuda_tensor_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what is missing and which backend would serve; nothing slow is taken unasked."""
    monkeypatch.setattr(backend, "unavailable", lambda: "Triton cannot be imported (no module)")
    with pytest.raises(RuntimeError, match=r"triton cannot run on cuda here: Triton cannot be imported") as caught:
        dispatch.choose(torch.device("cuda"))
    assert "fused_rnn.backend('reference')" in str(caught.value)
    with fused_rnn.backend("reference"):
        assert dispatch.choose(torch.device("cuda")).name == "reference"


def test_a_cpu_tensor_on_the_triton_backend() -> None:
    """Outside the interpreter it is refused, either way."""
    with pytest.raises(RuntimeError, match="triton"), fused_rnn.backend("triton"):
        fused_rnn.GRU(3, 4)(torch.randn(2, 1, 3))


def test_a_chip_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("fused_rnn.kernels.triton.launch", reason="Triton is not installed")
    monkeypatch.setattr(launch, "_cuda_device", lambda index: Device("Tesla T4", (7, 5), 40, 64 << 10))
    with pytest.raises(RuntimeError, match=r"capability 8\.0 or newer, Tesla T4 has 7\.5; the reference backend serves it"):
        launch.device_of(torch.device("cuda", 0))


def test_only_chips_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is not available, and says which chip would do; one new chip among them is enough."""
    pytest.importorskip("triton", reason="Triton is not installed")
    chips = [("Tesla T4", (7, 5)), ("GTX 1080", (6, 1))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(chips))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: chips[i][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: chips[i][1])
    reason = backend.unavailable.__wrapped__()
    assert reason == "expected a chip of compute capability 8.0 or newer, Tesla T4 has 7.5"
    chips.append(("A100", (8, 0)))
    assert backend.unavailable.__wrapped__() is None
    assert "Tesla T4, GTX 1080, A100" in backend.describe()


def test_importing_the_package_imports_no_triton() -> None:
    """It takes long, and on the CPU nobody needs it."""
    program = "import sys, fused_rnn; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_compiled_kernel_knows_of_a_number() -> None:
    """One is a constant of its code; nothing else may be launched with that, multiples of sixteen least of all."""
    from fused_rnn.kernels.triton.walk import compiled_as

    alike = [{1}, {16, 32, 1024}, {0}, {2, 17, 1000}, {1 << 31, 1 << 32}, {(1 << 31) + 1}]
    names = [{compiled_as(number) for number in numbers} for numbers in alike]
    assert all(len(each) == 1 for each in names)
    assert compiled_as(0) == compiled_as(16)
    assert len({compiled_as(next(iter(numbers))) for numbers in alike}) == 5


@pytest.mark.parametrize("backward", [False, True])
def test_more_sequences_than_a_launch_counts(backward: bool) -> None:
    """A grid has 65,535 programs along the batch, and what is exchanged is counted in 32 bits."""
    for hidden, batch in ((32, 600_000), (100, 1 << 20), (512, 1 << 17)):
        made = choose(Call(LSTM, backward, hidden, batch, 2, torch.float32), H100)
        assert made.tiles_at_once // made.tiles_each <= 65_535
        if made.regime == "cooperative":
            assert 2 * made.planes * 2 * made.tiles * made.batch * made.columns < 1 << 31
