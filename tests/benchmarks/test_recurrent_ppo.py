"""The recurrent-PPO program: what it says is so."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from benchmarks.training import recurrent_ppo
from benchmarks.training.recurrent_ppo import Agent, RecallEnvs, Rollout, Runner, State


class LoopAgent(Agent):
    """The same agent as such code writes it without ``reset=``: one step at a time, the state times 1 - done."""

    def forward(self, observation: Tensor, state: State, new: Tensor) -> tuple[Tensor, Tensor, State]:
        outs = []
        for inputs, begins in zip(self.encoder(observation), new, strict=True):
            kept = 1.0 - begins.to(inputs.dtype).view(1, -1, 1)
            out, state = self.lstm(inputs[None], (kept * state[0], kept * state[1]))
            outs.append(out)
        out = torch.cat(outs)
        return self.policy(out), self.value(out).squeeze(-1), state


def second_rollout(agent: Agent) -> Rollout:
    """One that starts within episodes, with the state of the first."""
    runner = Runner.of(RecallEnvs(7, seed=3), agent)
    runner.rollout(agent, 11)
    rollout = runner.rollout(agent, 13)
    assert not rollout.new[0].all()
    assert rollout.new[1:].any(0).all()
    assert all(state.any() for state in rollout.state)
    return rollout


@pytest.mark.usefixtures("backend")
def test_training_sees_what_the_rollout_saw() -> None:
    """One walk with resets gives the values and the probabilities of the steps."""
    agent = Agent()
    rollout = second_rollout(agent)
    logits, value, _ = agent(rollout.observation, rollout.state, rollout.new)
    log_prob = torch.distributions.Categorical(logits=logits).log_prob(rollout.action)
    torch.testing.assert_close(value, rollout.value)
    torch.testing.assert_close(log_prob, rollout.log_prob)


@pytest.mark.usefixtures("backend")
def test_training_has_the_gradients_of_the_loop() -> None:
    agent, loop = Agent().double(), LoopAgent().double()
    loop.load_state_dict(agent.state_dict())
    rollout = second_rollout(Agent())
    rollout.state = (rollout.state[0].double(), rollout.state[1].double())
    rollout.observation = rollout.observation.double()
    envs = torch.tensor([4, 1, 6])
    losses = [recurrent_ppo.loss(each, rollout, envs) for each in (agent, loop)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-9)
    expected = torch.autograd.grad(losses[1], list(loop.parameters()))
    for ours, theirs in zip(torch.autograd.grad(losses[0], list(agent.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["recurrent_ppo", "--updates", "2"])
    recurrent_ppo.main()
    assert capsys.readouterr().out.count("right (guessing: 50%)") == 2
