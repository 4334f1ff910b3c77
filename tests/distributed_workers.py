"""Two processes that stay up, and what they run for the tests of scale-out; every wait has an end."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from benchmarks.training.parallel import Processes

SIZE = 2
# A collective that lasts longer, and then a whole call, is a failure: the tests must end.
_COLLECTIVE_SECONDS, _CALL_SECONDS = 60, 120


class Pair:
    """Two worker processes in one gloo group."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._processes, self._pipes = [], []
        for rank in range(SIZE):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, f"{self._folder.name}/store", theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of a module in both processes; return both results, or raise what either raised."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_CALL_SECONDS):
                self.close()
                raise AssertionError(f"process {rank} gave no answer within {_CALL_SECONDS} s")
            # EOFError, if it died.
            answers.append(pickle.loads(pipe.recv_bytes()))
        failures = [f"process {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        if failures:
            # Its group may be out of step.
            self.close()
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    @property
    def alive(self) -> bool:
        """Whether both processes can take a call."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    timeout = datetime.timedelta(seconds=_COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=timeout)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            # The tests have ended.
            os._exit(0)
        try:
            answer = (True, function(*args))
        except Exception:
            # Whatever a test's function raises is raised again in the process of the test: `Pair.run`.
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


class Net(nn.Module):
    """Every kind of recurrent module once, over packed sequences of symbols."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        # Sizes that two processes cannot share evenly.
        self.encoder = getattr(nn, cell)(6, 5, 2, bidirectional=True)
        self.decoder = getattr(nn, cell)(10, 7, batch_first=True)
        self.cell = getattr(nn, f"{cell}Cell")(7, 3)
        self.head = nn.Linear(3, 11)

    def forward(self, symbols: Tensor, lengths: Tensor) -> Tensor:
        """(T, B) and (B,) → logits (B, symbols)."""
        packed = pack_padded_sequence(self.embedding(symbols), lengths, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.encoder(packed)[0], total_length=len(symbols))
        out, state = self.decoder(out.transpose(0, 1))
        last = (state[0] if isinstance(state, tuple) else state)[-1]
        state = None
        for input in (last, out[:, 0], out[:, -1]):
            state = self.cell(input, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@dataclass(frozen=True)
class Job:
    """What is trained, and how it is spread.

    Attributes:
        wrap: ``"alone"``, ``"ddp"`` or ``"fsdp"``.
        options: of the wrapper.
        convert: before or after the wrapper is put around the model; or not at all, which leaves it torch.nn's.
        accumulate: half batches whose gradients are added up without a reduction in between.
        checkpointed: whether the recurrent modules compute their forward again in the backward.
        norm: whether a recurrent weight is under weight_norm.
        first, steps: which global batches are trained on.
        load, save: folders of distributed checkpoints, read before and written after the training.
    """

    cell: str = "LSTM"
    dtype: torch.dtype = torch.float32
    wrap: str = "alone"
    options: dict[str, Any] = field(default_factory=dict)
    convert: str = "before"
    accumulate: int = 1
    checkpointed: bool = False
    norm: bool = False
    first: int = 0
    steps: int = 3
    load: str = ""
    save: str = ""


def build(job: Job) -> tuple[nn.Module, nn.Module]:
    """Make the model: (what is called, what holds the parameters)."""
    torch.manual_seed(5)
    model: nn.Module = Net(job.cell).double().to(job.dtype)
    if job.norm:
        nn.utils.parametrizations.weight_norm(model.encoder, "weight_hh_l0")
    if job.convert == "before":
        fused_rnn.convert(model)
    if job.checkpointed:
        model.encoder, model.decoder = checkpoint_wrapper(model.encoder), checkpoint_wrapper(model.decoder)
    called = model
    if job.wrap == "ddp":
        called = DistributedDataParallel(model, **job.options)
    elif job.wrap == "fsdp":
        # Each as a group of its own, as torch advises; what is left belongs to the root.
        for part in (model.encoder, model.decoder, model.cell):
            fully_shard(part, **job.options)
        fully_shard(model, **job.options)
    if job.convert == "after":
        report: list[fused_rnn.Conversion] = []
        fused_rnn.convert(called, report)
        assert [row.reason for row in report] == [None] * 3
    return called, model


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The global batch of a step: symbols (T, B), lengths and targets (B,)."""
    draw = torch.Generator().manual_seed(step)
    symbols = torch.randint(11, (7, 8), generator=draw)
    return symbols, torch.tensor([7, 2, 5, 1, 7, 3, 3, 4]), torch.randint(11, (8,), generator=draw)


def whole(tensor: Any) -> Any:
    """A tensor put together from its shards, or as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(job: Job) -> dict[str, Tensor]:
    """Train this process's share of the global batches; return the global losses, the gradients and the state at the end."""
    alone = job.wrap == "alone"
    rank, size = (0, 1) if alone else (dist.get_rank(), SIZE)
    called, model = build(job)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    result: dict[str, Tensor] = {}
    if job.load:
        weights, moments = get_state_dict(called, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=job.load)
        set_state_dict(called, optimizer, model_state_dict=weights, optim_state_dict=moments)
    for step in range(job.first, job.first + job.steps):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for part in range(job.accumulate):
            last = part == job.accumulate - 1
            if job.wrap == "ddp":
                called.require_backward_grad_sync = last
            elif job.wrap == "fsdp":
                called.set_requires_gradient_sync(last)
            symbols, lengths, targets = batch(step)
            mine = slice(rank * job.accumulate + part, None, size * job.accumulate)
            logits = called(symbols[:, mine], lengths[mine])
            loss = F.cross_entropy(logits.to(job.dtype), targets[mine]) / job.accumulate
            loss.backward()
            total += loss.detach().double()
        if not alone:
            dist.all_reduce(total)
        result[f"loss {step}"] = (total / size).to(job.dtype)
        for name, parameter in model.named_parameters():
            result[f"gradient {step} of {_plain(name)}"] = whole(parameter.grad).clone()
        optimizer.step()
    if job.save:
        weights, moments = get_state_dict(called, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=job.save)
    return result | {_plain(name): whole(value).detach().clone() for name, value in model.named_parameters()}


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def call_a_part(job: Job) -> list[str]:
    """What a sharded module says that is called on its own, not as part of the model."""
    torch.manual_seed(5)
    model = fused_rnn.convert(Net(job.cell))
    fully_shard(model)
    messages = []
    for module, input in (
        (model.decoder, torch.ones(2, 3, 10)),
        (model.decoder, torch.ones(2, 1, 10)),
        (model.cell, torch.ones(2, 7)),
    ):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                try:
                    module(input)
                except RuntimeError as error:
                    messages.append(str(error))
    return messages


def what_is_seen(job: Job) -> dict[str, Any]:
    """The recurrent modules' weights inside and outside of a forward."""
    called, model = build(job)
    seen: dict[str, list[Any]] = {}
    for name in ("encoder", "decoder"):
        module = getattr(model, name)

        def look(module: Any, *_: Any, name: str) -> None:
            weights = [*module._flat_weights, *(weight for one in module._weights() for weight in one if weight is not None)]
            seen[name] = [(type(weight), weight.dtype, tuple(weight.shape)) for weight in weights]

        # After that of fully_shard.
        module.register_forward_pre_hook(partial(look, name=name))
        seen[f"{name} outside"] = [type(weight) for weight in module._flat_weights]
    symbols, lengths, _ = batch(0)
    called(symbols, lengths)
    return seen


def data_parallel() -> tuple[bool, float, float, list[int]]:
    """What the training jobs' processes agree on: a flag, a loss, its gradient; and each one's share of the streams."""
    group = Processes(dist.get_rank(), SIZE, SIZE)
    model = group.wrap(nn.Linear(1, 1, bias=False))
    input = torch.tensor([[1.0 + group.rank]])
    with torch.no_grad():
        model.module.weight.fill_(1.0)
    loss, _ = group.mean(lambda model, batch, carry: (model(batch).sum(), carry))(model, input, None)
    loss.backward()
    segment = torch.arange(6).expand(3, 6)
    mine, *_ = group.share(lambda step: (segment, segment, True), 6)(0)
    return group.agree(group.rank == 1), loss.item(), model.module.weight.grad.item(), mine[0].tolist()
