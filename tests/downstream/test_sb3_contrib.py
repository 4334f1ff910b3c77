"""sb3-contrib: RecurrentPPO, which steps an LSTM through environments and trains it on sequences with resets in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from downstream_support import Swap, assert_same, package

sb3_contrib = package("sb3_contrib")
gymnasium = package("gymnasium")


class Recall(gymnasium.Env):
    """The first observation of an episode shows a cue, and the last action must repeat it; episodes differ in length."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), numpy.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def _observation(self) -> Any:
        shown = self.cue if self.step_count == 0 else 0.0
        return numpy.array([shown, self.step_count / 5, self.length / 5], numpy.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue = float(self.np_random.integers(2) * 2 - 1)
        self.length = int(self.np_random.integers(2, 6))
        self.step_count = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.step_count += 1
        done = self.step_count == self.length
        return self._observation(), float(done and (int(action) == 1) == (self.cue > 0)), done, False, {}


def _agent(policy: dict[str, Any]) -> Any:
    env = package("stable_baselines3.common.env_util").make_vec_env(Recall, n_envs=2, seed=3)
    return sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy",
        env,
        n_steps=16,
        batch_size=16,
        n_epochs=2,
        learning_rate=0.003,
        seed=0,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 6, "net_arch": [5], **policy},
    )


def _judged(agent: Any) -> dict[str, Any]:
    """What the agent does with one sequence of observations, a reset in its middle; and what its last training measured."""
    observations = torch.linspace(-1, 1, 18).view(6, 3).numpy()
    starts = numpy.array([True, False, False, True, False, False])
    state, actions = None, []
    for observation, start in zip(observations, starts, strict=True):
        action, state = agent.predict(observation, state=state, episode_start=start[None], deterministic=True)
        actions.append(int(action))
    logged = agent.logger.name_to_value
    losses = {name: logged[f"train/{name}"] for name in ("loss", "value_loss", "policy_gradient_loss", "entropy_loss")}
    return {"actions": actions, "h": state[0], "c": state[1], **losses}


POLICIES = {
    "own LSTM for the critic": {},
    "shared LSTM": {"shared_lstm": True, "enable_critic_lstm": False},
    "no LSTM for the critic": {"enable_critic_lstm": False},
    "two layers": {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.2}},
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_recurrent_ppo(policy: dict[str, Any]) -> None:
    """Two rollouts, each trained on: the second is drawn with the weights of the first training."""

    def program(swap: Swap) -> dict[str, Any]:
        agent = _agent(policy)
        swap(agent.policy)
        agent.learn(64)
        return _judged(agent)

    assert_same(program)


def test_saved(tmp_path: Path) -> None:
    """torch.nn's agent is loaded, converted and trained on; a converted one is loaded into torch.nn's classes."""

    def program(swap: Swap) -> dict[str, Any]:
        first = _agent({})
        swap(first.policy)
        first.learn(32)
        saved = tmp_path / str(swap.convert)
        first.save(saved)
        second = sb3_contrib.RecurrentPPO.load(saved, env=first.get_env(), device="cpu")
        assert type(second.policy.lstm_actor) is torch.nn.LSTM
        swap(second.policy)
        second.learn(32)
        return _judged(second)

    assert_same(program)
