"""A whole sequence with resets against the per-step loop of recurrent PPO code.

    python -m benchmarks.resets --batch 64 --steps 128 --hidden 128

Forward and backward of an LSTM. The loop is what such code writes around torch.nn.LSTM: for every step, the state times
``1 - done``, one call, and the outputs put together at the end. Both are compared before they are timed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fused_rnn
from benchmarks.timing import PAUSE

# An episode of a control task has some hundred steps.
EPISODE = 100


def make(batch: int, steps: int, hidden: int) -> dict[str, Callable[[], list[Tensor]]]:
    """The two ways, each a function that returns output, last states and the gradients of parameters and input."""
    loop = torch.nn.LSTM(hidden, hidden)
    fused = fused_rnn.LSTM(hidden, hidden)
    fused.load_state_dict(loop.state_dict())
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    h_0, c_0 = torch.randn(1, batch, hidden), torch.randn(1, batch, hidden)
    done = torch.rand(steps, batch) < 1 / EPISODE
    d_out = torch.randn(steps, batch, hidden)

    def by_loop() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state, outs = (h_0, c_0), []
        for inputs, ended in zip(x, done, strict=True):
            kept = (1.0 - ended.float()).view(1, -1, 1)
            out, state = loop(inputs.unsqueeze(0), (kept * state[0], kept * state[1]))
            outs.append(out)
        return torch.cat(outs), state

    def by_reset() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return fused(x, (h_0, c_0), reset=done)

    def trained(module: torch.nn.Module, run: Callable[[], tuple[Tensor, tuple[Tensor, Tensor]]]) -> list[Tensor]:
        out, state = run()
        return [out, *state, *torch.autograd.grad(out, [x, *module.parameters()], d_out)]

    return {"loop": lambda: trained(loop, by_loop), "fused_rnn": lambda: trained(fused, by_reset)}


def check(ways: dict[str, Callable[[], list[Tensor]]]) -> None:
    """Raise AssertionError unless both give the same; sums over all rows are compared with their own scale."""
    for ours, theirs in zip(ways["fused_rnn"](), ways["loop"](), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max().clamp(min=1)))


def measure(ways: dict[str, Callable[[], list[Tensor]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each way in each round; the ways take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            time.sleep(PAUSE)
            way()
            gc.collect()
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def main(arguments: Sequence[str] | None = None) -> float:
    """Print both times and return how many times faster the fused call is: the median over the rounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resets", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    ways = make(given.batch, given.steps, given.hidden)
    check(ways)
    seconds = measure(ways, given.rounds)
    for name, values in seconds.items():
        print(f"{name:10s} {statistics.median(values) * 1e3:9.2f} ms")
    faster = statistics.median(loop / fused for loop, fused in zip(seconds["loop"], seconds["fused_rnn"], strict=True))
    print(f"fused_rnn is {faster:.1f} times faster: B={given.batch}, T={given.steps}, H={given.hidden}, forward and backward, "
          f"{torch.get_num_threads()} threads, {given.rounds} rounds")  # fmt: skip
    return faster


if __name__ == "__main__":
    main()
