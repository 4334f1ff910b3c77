"""Scale-out on torch's own engine: two processes compute what one does with the whole batch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from older_torch import shards_on_the_cpu
from tolerances import assert_close_to_reference
from torch import Tensor

import fused_rnn
from benchmarks.training import language_model

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("two processes need gloo, which this torch was built without", allow_module_level=True)

from distributed_workers import SIZE, Job, Pair, call_a_part, data_parallel, train, what_is_seen
from torch.distributed.fsdp import MixedPrecisionPolicy

cells = pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
fsdp = pytest.param("fsdp", marks=shards_on_the_cpu)


@pytest.fixture(scope="module")
def _pairs() -> Iterator[list[Pair]]:
    pairs: list[Pair] = []
    yield pairs
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(_pairs: list[Pair]) -> Pair:
    """Two processes; new ones where a test has left the last ones unusable."""
    if not _pairs or not _pairs[-1].alive:
        _pairs.append(Pair())
    return _pairs[-1]


@functools.cache
def _alone(cell: str, dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    """One process, the whole batch, torch.nn."""
    threads = torch.get_num_threads()
    result = train(Job(cell, dtype, convert="no", **changes))
    assert torch.get_num_threads() == threads
    return result


def _check(pair: Pair, job: Job, **changes: Any) -> None:
    """Train with two processes; judge losses, gradients and parameters, the numbers rule with torch.nn in one process."""
    results = pair.run(train, job)
    expected, reference = (_alone(job.cell, dtype, norm=job.norm, **changes) for dtype in (job.dtype, torch.float64))
    for result in results:
        assert result.keys() == expected.keys()
        for name, value in result.items():
            assert_close_to_reference(value, expected[name], reference[name], name)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), f"{name} differs between the processes"


@pytest.mark.parametrize("convert", ["before", "after"])
@pytest.mark.parametrize("wrap", ["ddp", fsdp])
@cells
def test_gradients_equal_those_of_one_process(pair: Pair, cell: str, wrap: str, convert: str) -> None:
    """Converted before or after the model is wrapped and sharded."""
    _check(pair, Job(cell, torch.float32, wrap, convert=convert))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float64},
        {"norm": True},
        {"norm": True, "convert": "after"},
        {"checkpointed": True},
        {"accumulate": 2},
    ],
    ids=lambda changes: " ".join(map(str, changes)),
)
@pytest.mark.parametrize("wrap", ["ddp", fsdp])
def test_with_other_features(pair: Pair, wrap: str, changes: dict[str, Any]) -> None:
    _check(pair, Job("GRU", wrap=wrap, **changes))


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        ("ddp", {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True}),
        ("ddp", {"static_graph": True}),
        ("ddp", {"find_unused_parameters": True}),
        pytest.param("fsdp", {"reshard_after_forward": False}, marks=shards_on_the_cpu),
        pytest.param("fsdp", {"reshard_after_forward": True}, marks=shards_on_the_cpu),
    ],
    ids=str,
)
def test_options_of_the_wrapper(pair: Pair, wrap: str, options: dict[str, Any]) -> None:
    _check(pair, Job("LSTM", wrap=wrap, options=options))


@shards_on_the_cpu
@cells
def test_mixed_precision(pair: Pair, cell: str) -> None:
    """Weights in bfloat16, reduction in float32: all in all as near to the reference as torch.nn under the same policy."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    job = Job(cell, wrap="fsdp", options={"mp_policy": policy}, steps=1)
    actual, expected = (pair.run(train, dataclasses.replace(job, convert=convert))[0] for convert in ("before", "no"))
    reference = _alone(cell, torch.float64, steps=1)
    names = [name for name in actual if name.startswith("gradient")]
    together = (torch.cat([each[name].flatten() for name in names]) for each in (actual, expected, reference))
    assert_close_to_reference(*together, "all gradients")
    assert actual["loss 0"].item() == pytest.approx(reference["loss 0"].item(), rel=2**-8)


@shards_on_the_cpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_modules_see_gathered_weights(pair: Pair, dtype: torch.dtype | None) -> None:
    job = Job("LSTM", wrap="fsdp", options={"mp_policy": MixedPrecisionPolicy(param_dtype=dtype)})
    for seen in pair.run(what_is_seen, job):
        for name, module in (("encoder", fused_rnn.LSTM(6, 5, 2, bidirectional=True)), ("decoder", fused_rnn.LSTM(10, 7))):
            weights = [(torch.nn.Parameter, dtype or torch.float32, tuple(weight.shape)) for weight in module._flat_weights]
            assert seen[name] == weights * 2
            assert {kind.__name__ for kind in seen[f"{name} outside"]} == {"DTensor"}


@cells
def test_a_sharded_module_on_its_own_says_so(pair: Pair, cell: str) -> None:
    """Its weights are not there; no kernel may read what is."""
    for messages in pair.run(call_a_part, Job(cell)):
        assert len(messages) == 6
        assert all("DTensor" in message for message in messages)


@pytest.mark.parametrize("save", ["ddp", fsdp])
def test_checkpoints_of_two_processes_load_in_one(pair: Pair, tmp_path: Path, save: str) -> None:
    """Sharded or not, with the optimizer's state: the training goes on as if it had never stopped, converted or not."""
    pair.run(train, Job("LSTM", wrap=save, save=str(tmp_path)))
    whole, reference = (_alone("LSTM", dtype, steps=5) for dtype in (torch.float32, torch.float64))
    for convert in ("before", "no"):
        rest = train(Job("LSTM", convert=convert, load=str(tmp_path), first=3, steps=2))
        for name, value in rest.items():
            assert_close_to_reference(value, whole[name], reference[name], name)


@shards_on_the_cpu
def test_a_checkpoint_of_one_process_loads_in_two(pair: Pair, tmp_path: Path) -> None:
    train(Job("GRU", convert="no", save=str(tmp_path)))
    whole, reference = (_alone("GRU", dtype, steps=5) for dtype in (torch.float32, torch.float64))
    for rest in pair.run(train, Job("GRU", wrap="fsdp", load=str(tmp_path), first=3, steps=2)):
        for name, value in rest.items():
            assert_close_to_reference(value, whole[name], reference[name], name)


@pytest.mark.parametrize("make", [lambda: fused_rnn.LSTM(6, 5), lambda: fused_rnn.GRUCell(6, 5)])
def test_no_call_ties_down_the_memory_of_a_weight(make: Callable[[], torch.nn.Module]) -> None:
    """Sharding frees a gathered weight by resizing its storage to nothing, which ``Tensor.numpy`` would forbid for good."""
    module = make()
    for input in (torch.randn(4, 6), torch.randn(1, 6)):
        module(input)[0].sum().backward()
        with torch.no_grad():
            module(input)
    assert all(parameter.untyped_storage().resizable() for parameter in module.parameters())


# torchrun on the language model


def _torchrun(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the job with two processes; return the exit code and what was printed."""
    text = folder / "text.txt"
    text.write_text("".join(f"def name_{i % 7}(x): return {i % 11} + x\n" for i in range(120)), encoding="utf-8")
    command = f"-m torch.distributed.run --standalone --nproc_per_node {SIZE} -m benchmarks.training.language_model".split()
    run = subprocess.Popen(
        [sys.executable, *command, "--text", str(text), "--out", str(folder / "two"), *TINY, *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            # It ends its processes when it is asked to, and cannot when it is killed.
            run.terminate()
            run.wait(60)
    return run.returncode, out, err


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in json.loads((folder / "language_model.json").read_text(encoding="utf-8"))}


TINY = "--hidden 12 --embedding 8 --batch 4 --bptt 9 --steps 12 --lr 0.03 --sample-length 30 --threads 1 --layers 1".split()


def test_torchrun_trains_as_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the batch in each of two processes: the same losses, the same model, and one report."""
    code, out, err = _torchrun(tmp_path)
    assert code == 0, err
    assert "2 processes × 1 threads" in out
    assert out.count("Character-level language model") == out.count("wrote ") == 1
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        code = language_model.main(["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "one"), *TINY])
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert code == 0
    assert " processes " not in capsys.readouterr().out
    two, one = _rows(tmp_path / "two"), _rows(tmp_path / "one")
    assert {row["processes"] for row in two.values()} == {2}
    for provider in ("torch.nn", "fused_rnn"):
        assert len(two[provider]["losses"]) == 12
        assert two[provider]["losses"] == pytest.approx(one[provider]["losses"], rel=1e-4)
        assert two[provider]["held_out_loss"] == pytest.approx(one[provider]["held_out_loss"], rel=1e-4)
    assert two["trigram"]["held_out_loss"] == one["trigram"]["held_out_loss"]


def test_torchrun_stops_all_processes_at_once(tmp_path: Path) -> None:
    """A loss that is not finite ends the training in every process, and the first one still reports."""
    code, out, _ = _torchrun(tmp_path, *"--lr 900 --clip-norm 0 --cell rnn_relu --steps 200".split())
    assert code == 1
    assert "is not finite at step" in out
    assert out.count("wrote ") == 1


def test_torchrun_wants_a_batch_that_can_be_split(tmp_path: Path) -> None:
    code, _, err = _torchrun(tmp_path, "--batch", "5")
    assert code == 1
    assert "argument --batch: expected a multiple of the 2 processes, got 5" in err
    assert not list((tmp_path / "two").iterdir())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the threads of a process are counted in Linux's /proc")
def test_the_threads_of_the_group_end_with_it() -> None:
    """One that outlives the group may abort the process when it ends."""
    program = """if True:
        import dataclasses
        from pathlib import Path
        import torch
        from benchmarks.training.parallel import processes
        def threads():
            return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        def train(group):
            model = group.wrap(torch.nn.Linear(3, 2))
            model(torch.ones(4, 3)).sum().backward()
            print([name for name in threads() if "gloo" in name])
        with processes() as group:
            train(dataclasses.replace(group, size=2))
        print([name for name in threads() if "gloo" in name])
    """
    command = "-m torch.distributed.run --standalone --nproc_per_node 1 --no-python".split()
    run = subprocess.run(
        [sys.executable, *command, sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    within, after = map(ast.literal_eval, run.stdout.splitlines())
    assert within
    assert not after


def test_the_first_process_decides_and_the_loss_is_that_of_all(pair: Pair) -> None:
    results = pair.run(data_parallel)
    assert [flag for flag, *_ in results] == [False, False]
    assert [loss for _, loss, *_ in results] == [1.5, 1.5]
    assert [gradient for *_, gradient, _ in results] == [1.5, 1.5]
    assert results[0][-1] + results[1][-1] == list(range(6))
