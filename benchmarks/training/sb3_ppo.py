"""sb3-contrib's own RecurrentPPO, as it is and with its policy converted by one line.

    pip install sb3-contrib
    python -m benchmarks.training.sb3_ppo [--help]

The task needs a memory: the first observation of an episode shows a cue, and the last action must repeat it. Both agents begin
with the same weights, environments and random numbers, and take turns, an update each: a rollout and the training on it. A
rounding may some day choose another action; from there on the two see other episodes, so they are judged by the mean reward
over several seeds, beside its spread.

What is timed is the CPU time of all threads of the process, which other work on the machine disturbs less than wall time. The
file has both, and the machine's load at the start and at the end.

Exit codes: 0 done; 1 the rewards differ by more than their spread over seeds; 2 a wrong option or a package is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

import fused_rnn
from benchmarks.json_file import write_rows
from benchmarks.results import cpu_model
from benchmarks.training import job
from benchmarks.training.command import Parser, add_out, number, size
from benchmarks.training.report import environment

NAME, TORCH, OURS = "sb3_ppo", "torch.nn", "fused_rnn"

# Two means over seeds may lie this far apart even where no seed differs from another.
LEAST_SPREAD = 0.05


def recall(longest: int) -> Any:
    """One copy of the task, a gymnasium.Env. Observation: (cue or 0, time to answer); episodes take 2 to ``longest`` steps."""
    import gymnasium

    class Recall(gymnasium.Env):  # type: ignore[misc, unused-ignore]
        observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), numpy.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def _observe(self) -> Any:
            return numpy.array([self.cue if self.taken == 0 else 0.0, self.taken == self.length - 1], numpy.float32)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            self.cue = float(2 * self.np_random.integers(2) - 1)
            self.length, self.taken = int(self.np_random.integers(2, longest + 1)), 0
            return self._observe(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.taken += 1
            done = self.taken == self.length
            return self._observe(), float(done and (int(action) == 1) == (self.cue > 0)), done, False, {}

    return Recall()


@dataclass
class Agent:
    """One RecurrentPPO with random numbers of its own.

    Attributes:
        model: sb3-contrib's.
        cpu_seconds: of each update, all threads together.
        seconds: wall time of each update.
        rewards: mean reward of the last 100 episodes after each update.
    """

    model: Any
    cpu_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = torch.get_rng_state(), numpy.random.get_state()

    def update(self) -> None:
        """One rollout and the training on it."""
        torch.set_rng_state(self._random[0])
        numpy.random.set_state(self._random[1])
        wall, cpu = time.perf_counter(), time.process_time()
        self.model.learn(self.model.n_steps * self.model.n_envs, reset_num_timesteps=False)
        self.cpu_seconds.append(time.process_time() - cpu)
        self.seconds.append(time.perf_counter() - wall)
        self._random = torch.get_rng_state(), numpy.random.get_state()
        self.rewards.append(statistics.fmean(episode["r"] for episode in self.model.ep_info_buffer))


def make(options: argparse.Namespace, seed: int, converted: bool) -> Agent:
    """Build the agent of a seed; ``converted`` is the whole difference."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    model = RecurrentPPO(
        "MlpLstmPolicy",
        make_vec_env(lambda: recall(options.longest), n_envs=options.envs, seed=seed),
        n_steps=options.rollout,
        batch_size=options.batch,
        n_epochs=options.epochs,
        learning_rate=options.lr,
        seed=seed,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": options.hidden},
    )
    if converted:
        fused_rnn.convert(model.policy)
    return Agent(model)


def race(options: argparse.Namespace, seed: int) -> dict[str, Agent]:
    """Train both agents of a seed in turns; who begins changes from update to update."""
    agents = {TORCH: make(options, seed, converted=False), OURS: make(options, seed, converted=True)}
    for update in range(options.updates):
        for agent in list(agents.values())[:: -1 if update % 2 else 1]:
            agent.update()
    return agents


def rows_of(options: argparse.Namespace, found: Sequence[dict[str, Agent]], load: Sequence[float]) -> list[dict[str, Any]]:
    """Make a row of each provider, all seeds together. The first update of a seed is warm-up and not in the median."""
    common = {
        "job": NAME,
        "task": "",
        # The machine is said here, since the others' figures may be of another one.
        "title": f"sb3-contrib RecurrentPPO, recall: lstm, hidden {options.hidden}; a step is an update, in CPU time on "
        f"{cpu_model()}, {options.threads} thread{'s' * (options.threads > 1)}",
        "settings": job.settings_of(options),
        **environment(),
        "load_at_start": load[0],
        "load_at_end": os.getloadavg()[0],
    }
    for package in ("sb3_contrib", "stable_baselines3", "gymnasium"):
        common["versions"][package] = importlib.import_module(package).__version__
    rows = []
    for name in (TORCH, OURS):
        agents = [pair[name] for pair in found]
        last = [agent.rewards[-1] for agent in agents]
        timed = [seconds for agent in agents for seconds in agent.cpu_seconds[1:]]
        rows.append(
            {
                "provider": name,
                "cpu_seconds": [agent.cpu_seconds for agent in agents],
                "seconds": [agent.seconds for agent in agents],
                "rewards": [agent.rewards for agent in agents],
                "median_seconds": statistics.median(timed),
                "reward": statistics.fmean(last),
                "reward_spread": statistics.stdev(last) if len(last) > 1 else 0.0,
                **common,
            }
        )
    for row in rows:
        row["speed_up"] = rows[0]["median_seconds"] / row["median_seconds"]
    return rows


def parser() -> Parser:
    """Make the command line."""
    made = Parser(prog=NAME, formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=__doc__.split("\n")[0])
    few = number(int, 1, 1 << 16)
    made.add_argument("--seeds", type=few, default=3, help="trainings of each")
    made.add_argument("--updates", type=number(int, 2, 1 << 16), default=12, help="rollouts of a training")
    made.add_argument("--envs", type=few, default=8, help="environments")
    made.add_argument("--rollout", type=few, default=128, help="steps of a rollout in each environment")
    made.add_argument("--batch", type=number(int, 2, 1 << 20), default=256, help="steps of a minibatch")
    made.add_argument("--epochs", type=few, default=4, help="passes over a rollout")
    made.add_argument("--longest", type=number(int, 2, 1 << 16), default=8, help="steps of the longest episode")
    made.add_argument("--hidden", type=size, default=64, help="of the LSTMs of actor and critic")
    made.add_argument("--lr", type=number(float, 0, 1, above=True), default=3e-3, help="Adam's learning rate")
    made.add_argument("--threads", type=number(int, 1, 256), default=1, help="CPU threads")
    add_out(made, NAME)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the rows; returns the exit code."""
    made = parser()
    options = made.parse_args(sys.argv[1:] if arguments is None else arguments)
    if importlib.util.find_spec("sb3_contrib") is None:
        made.error("not installed: sb3-contrib (pip install sb3-contrib)")
    torch.set_num_threads(options.threads)
    load, found = os.getloadavg(), []
    for seed in range(options.seeds):
        found.append(race(options, seed))
        rewards = ", ".join(f"{name} {agent.rewards[-1]:.2f}" for name, agent in found[-1].items())
        print(f"seed {seed}: reward of the last episodes: {rewards}", flush=True)
    rows = rows_of(options, found, load)
    for row in rows:
        print(
            f"{row['provider']}: {row['median_seconds'] * 1e3:.0f} ms of CPU an update, {row['speed_up']:.2f}×, "
            f"reward {row['reward']:.3f} ± {row['reward_spread']:.3f} (guessing: 0.5)"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / f"{NAME}.json", rows)
    allowed = max(LEAST_SPREAD, *(row["reward_spread"] for row in rows))
    agree = abs(rows[0]["reward"] - rows[1]["reward"]) <= allowed
    print(f"the rewards {'agree' if agree else 'DISAGREE'} within {allowed:.3f}; wrote {options.out / f'{NAME}.json'}")
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
