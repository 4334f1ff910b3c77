"""A training step beside a DataLoader whose two workers never rest, with ``torch.nn`` and with ``fused_rnn``."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers import OURS, fused
from benchmarks.timing import PAUSE, quantiles

TORCH = "torch"


@dataclass(frozen=True)
class Loader:
    """The sizes: sequences of tokens, tagged; ``words`` is what a worker shuffles for each of them, so that it never rests."""

    batch: int = 16
    length: int = 64
    hidden: int = 128
    vocabulary: int = 1000
    tags: int = 20
    words: int = 20000
    workers: int = 2

    @property
    def case(self) -> str:
        """The name of its rows."""
        return f"tagger/lstm/{self.batch}x{self.length}x{self.hidden}/dataloader"


LOADER = Loader()


class _Sentences(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, sizes: Loader) -> None:
        self._sizes = sizes

    def __len__(self) -> int:
        # More than anybody reads.
        return 10**9

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # What a worker does in Python for a sample: augmentation, tokenizing.
        words = list(range(self._sizes.words))
        random.Random(index).shuffle(words)
        tokens = torch.tensor(words[: self._sizes.length]) % self._sizes.vocabulary
        return tokens, tokens % self._sizes.tags


class _Tagger(nn.Module):
    def __init__(self, sizes: Loader, lstm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.lstm = lstm(sizes.hidden, sizes.hidden, batch_first=True)
        self.out = nn.Linear(sizes.hidden, sizes.tags)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the tags, (B, tags, T)."""
        scores: Tensor = self.out(self.lstm(self.embedding(tokens))[0])
        return scores.transpose(1, 2)


def _training_step(sizes: Loader, lstm: Callable[..., nn.Module]) -> Callable[[Tensor, Tensor], None]:
    torch.manual_seed(0)
    model = _Tagger(sizes, lstm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(tokens: Tensor, tags: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tags).backward()
        optimizer.step()

    return step


def _mean_step(step: Callable[[Tensor, Tensor], None], batch: Callable[[], Sequence[Tensor]], seconds: float) -> float:
    """Mean seconds of a training step alone, without the waiting for its batch, over a slice of so long."""
    time.sleep(PAUSE)
    step(*batch())
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        tokens, tags = batch()
        begin = time.perf_counter()
        step(tokens, tags)
        times.append(time.perf_counter() - begin)
    return statistics.fmean(times)


def loader_rows(sizes: Loader, threads: int, info: Mapping[str, Any], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rows without workers (one batch, again and again) and with them."""
    steps = {OURS: _training_step(sizes, fused.package().LSTM), TORCH: _training_step(sizes, nn.LSTM)}
    loads = (0, sizes.workers)
    times: dict[tuple[int, str], list[float]] = {(load, name): [] for load in loads for name in steps}
    again = next(iter(DataLoader(_Sentences(sizes), batch_size=sizes.batch)))
    for i in range(rounds):
        order = list(steps) if i % 2 == 0 else list(steps)[::-1]
        for name in order:
            times[0, name].append(_mean_step(steps[name], lambda: again, seconds))
        # Spawned: processes that were forked would inherit threads that are not there.
        loader = DataLoader(
            _Sentences(sizes), batch_size=sizes.batch, num_workers=sizes.workers, multiprocessing_context="spawn"
        )
        batches = iter(loader)
        for name in order:
            times[sizes.workers, name].append(_mean_step(steps[name], lambda it=batches: next(it), seconds))  # type: ignore[misc]
        # Ends the workers.
        del batches, loader
    rows = []
    for load in loads:
        for name in steps:
            own = times[load, name]
            row: dict[str, Any] = {
                "case": f"{sizes.case}/busy={load}",
                "mode": "training",
                "cell": "lstm",
                "shape": {"name": f"{sizes.batch}x{sizes.length}x{sizes.hidden}", "B": sizes.batch, "T": sizes.length}
                | {"I": sizes.hidden, "H": sizes.hidden, "origin": "small tagger"},
                "dtype": "float32",
                "options": ["dataloader"],
                "threads": threads,
                "device": info.get("device", "cpu"),
                "provider": name,
                "status": "ok",
                "busy": load,
                "ms": quantiles([time * 1e3 for time in own]),
                "rounds": len(own),
                "over_quiet": statistics.median(own) / statistics.median(times[0, name]),
            }
            if name != OURS:
                row["ratio"] = quantiles([a / b for a, b in zip(own, times[load, OURS], strict=True)])
            rows.append(row)
    return rows
