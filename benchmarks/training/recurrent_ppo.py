"""Recurrent PPO: the rollout one step at a time, the training on whole sequences with resets.

    python -m benchmarks.training.recurrent_ppo

The task needs a memory: the first observation of an episode shows a cue, and after a delay the agent must answer with it.
Episodes end in the middle of a rollout, each in its own step. In the rollout the state is carried from step to step; in the
training one call with ``reset=`` walks the whole rollout, where such code usually has a Python loop over the steps that
multiplies the state by ``1 - done``.

Source: Schulman et al. 2017 (PPO); Schulman et al. 2016 (generalised advantage estimation); the layout is that of CleanRL.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fused_rnn

State = tuple[Tensor, Tensor]


class RecallEnvs:
    """N copies of the task. Observation: (cue, time to answer); action: 0 or 1; reward 1 for the cue's action at the end."""

    def __init__(self, count: int, longest: int = 6, seed: int = 0) -> None:
        self.count, self.longest = count, longest
        self.generator = torch.Generator().manual_seed(seed)
        self.cue = torch.zeros(count, dtype=torch.int64)
        self.left = torch.zeros(count, dtype=torch.int64)

    def _draw(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (self.count,), generator=self.generator)

    def _observe(self, new: Tensor) -> Tensor:
        shown = torch.where(new, 2.0 * self.cue - 1, 0.0)
        return torch.stack([shown, (self.left == 0).float()], 1)

    def reset(self) -> Tensor:
        """Begin an episode in every copy; returns the observations, (N, 2)."""
        self.cue, self.left = self._draw(0, 2), self._draw(1, self.longest)
        return self._observe(torch.ones(self.count, dtype=torch.bool))

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Act; returns the next observations, the rewards and where an episode ended, whose next one begins at once."""
        done = self.left == 0
        reward = (done & (action == self.cue)).float()
        cue, left = self._draw(0, 2), self._draw(1, self.longest)
        self.cue, self.left = torch.where(done, cue, self.cue), torch.where(done, left, self.left - 1)
        return self._observe(done), reward, done


class Agent(nn.Module):
    """An encoder, an LSTM, a policy and a value."""

    def __init__(self, observations: int = 2, actions: int = 2, hidden: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(observations, hidden), nn.Tanh())
        self.lstm = fused_rnn.LSTM(hidden, hidden)
        self.policy = nn.Linear(hidden, actions)
        self.value = nn.Linear(hidden, 1)

    def start(self, count: int) -> State:
        """The state before the first episode, (1, N, H) each."""
        zeros = torch.zeros(1, count, self.lstm.hidden_size)
        return zeros, zeros.clone()

    def forward(self, observation: Tensor, state: State, new: Tensor) -> tuple[Tensor, Tensor, State]:
        """Walk any number of steps: one in the rollout, all of them in the training.

        Args:
            observation: (T, N, ·).
            state: h and c before the first step, (1, N, H) each.
            new: where an episode begins, so that the state of the one before must not be seen: (T, N) bool.

        Returns:
            the policy's logits (T, N, actions), the values (T, N), and the state after the last step.
        """
        out, state = self.lstm(self.encoder(observation), state, reset=new)
        return self.policy(out), self.value(out).squeeze(-1), state


@dataclass
class Rollout:
    """T steps of N environments; (T, N, ·) each."""

    state: State  # before the first step
    observation: Tensor
    new: Tensor  # where an episode begins
    action: Tensor
    log_prob: Tensor
    value: Tensor
    reward: Tensor
    advantage: Tensor


@dataclass
class Runner:
    """The environments and where they stand: a rollout goes on where the last one ended."""

    envs: RecallEnvs
    observation: Tensor
    new: Tensor
    state: State

    @staticmethod
    def of(envs: RecallEnvs, agent: Agent) -> Runner:
        """Begin."""
        return Runner(envs, envs.reset(), torch.ones(envs.count, dtype=torch.bool), agent.start(envs.count))

    @torch.no_grad()
    def rollout(self, agent: Agent, steps: int, discount: float = 0.99, trace: float = 0.95) -> Rollout:
        """Act for ``steps`` steps, one call of the agent for each, with the state carried along."""
        before, kept = self.state, []
        for _ in range(steps):
            logits, value, self.state = agent(self.observation[None], self.state, self.new[None])
            choice = torch.distributions.Categorical(logits=logits[0])
            action = choice.sample()
            observation, new = self.observation, self.new
            self.observation, reward, self.new = self.envs.step(action)
            kept.append((observation, new, action, choice.log_prob(action), value[0], reward))
        observation, new, action, log_prob, value, reward = (torch.stack(each) for each in zip(*kept, strict=True))

        # The value of what comes after the last step; where an episode ended there, it is not used.
        _, after, _ = agent(self.observation[None], self.state, self.new[None])
        advantage, running = torch.zeros_like(reward), torch.zeros(self.envs.count)
        for t in reversed(range(steps)):
            next_value, ended = (after[0], self.new) if t == steps - 1 else (value[t + 1], new[t + 1])
            goes_on = 1.0 - ended.float()
            delta = reward[t] + discount * next_value * goes_on - value[t]
            running = delta + discount * trace * goes_on * running
            advantage[t] = running
        return Rollout(before, observation, new, action, log_prob, value, reward, advantage)


def loss(agent: Agent, rollout: Rollout, envs: Tensor, clip: float = 0.2) -> Tensor:
    """PPO's loss on whole sequences of some environments: one walk over all steps, episodes kept apart by ``reset``."""
    state = rollout.state[0][:, envs], rollout.state[1][:, envs]
    logits, value, _ = agent(rollout.observation[:, envs], state, rollout.new[:, envs])
    choice = torch.distributions.Categorical(logits=logits)
    advantage = rollout.advantage[:, envs]
    returns = advantage + rollout.value[:, envs]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (choice.log_prob(rollout.action[:, envs]) - rollout.log_prob[:, envs]).exp()
    of_policy = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    return of_policy + 0.5 * (value - returns).square().mean() - 0.01 * choice.entropy().mean()


def train(updates: int = 40, envs: int = 16, steps: int = 32, epochs: int = 4, parts: int = 2, seed: int = 0) -> list[float]:
    """Train an agent; returns the share of right answers in each rollout."""
    torch.manual_seed(seed)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    runner = Runner.of(RecallEnvs(envs, seed=seed), agent)
    shares = []
    for _ in range(updates):
        rollout = runner.rollout(agent, steps)
        ends = torch.cat([rollout.new[1:], runner.new[None]]).sum()
        shares.append(float(rollout.reward.sum() / ends.clamp(min=1)))
        for _ in range(epochs):
            # Parts of the environments, never of the time: a sequence stays whole.
            for part in torch.randperm(envs).chunk(parts):
                optimizer.zero_grad()
                loss(agent, rollout, part).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    return shares


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description="Recurrent PPO on a task that needs a memory.")
    parser.add_argument("--updates", type=int, default=40)
    shares = train(parser.parse_args().updates)
    for update, share in enumerate(shares):
        if update % 5 == 0 or update == len(shares) - 1:
            print(f"update {update:3d}: {share:4.0%} right (guessing: 50%)")


if __name__ == "__main__":
    main()
