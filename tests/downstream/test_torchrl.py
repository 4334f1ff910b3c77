"""TorchRL: LSTMModule and GRUModule, step by step in a rollout and over whole trajectories with resets in their middle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from downstream_support import Swap, assert_same, package
from torch import Tensor, nn

modules = package("torchrl.modules")
tensordict = package("tensordict")

NO_INSTANCE = pytest.mark.xfail(
    strict=True,
    raises=TypeError,
    reason="where rows have resets, a layer that is no instance of torch.nn's is called with `mask`, as TorchRL's own are",
)
CLASSES = pytest.mark.parametrize("keep_class", [True, pytest.param(False, marks=NO_INSTANCE)], ids=["kept", "not kept"])


def _layer(kind: str, **options: Any) -> Any:
    keys = ["h", "c"] if kind == "LSTM" else ["h"]
    return getattr(modules, f"{kind}Module")(
        input_size=3,
        hidden_size=5,
        in_keys=["observation", *keys],
        out_keys=["features", *(("next", key) for key in keys)],
        **options,
    )


def _trajectories() -> tuple[Tensor, Tensor]:
    """Three rows of seven steps: one trajectory, two, and three."""
    is_init = torch.zeros(3, 7, 1, dtype=torch.bool)
    is_init[1, 4] = is_init[2, 1] = is_init[2, 5] = True
    return torch.linspace(-1, 1, 63).view(3, 7, 3), is_init


def _states(kind: str, layers: int, *sizes: int) -> dict[str, Tensor]:
    return {key: torch.full((*sizes, layers, 5), 0.3) for key in ("hc" if kind == "LSTM" else "h")}


@CLASSES
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_trajectories(kind: str, layers: int, keep_class: bool) -> None:
    """Rows with resets are split into one row a trajectory, padded, and packed where the layer is torch.nn's."""

    def program(swap: Swap) -> dict[str, Any]:
        layer = swap(_layer(kind, num_layers=layers), keep_class=keep_class)
        observation, is_init = _trajectories()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        with modules.set_recurrent_mode(True):
            for _ in range(3):
                data = {"observation": observation, "is_init": is_init, **_states(kind, layers, 3, 7)}
                result = layer(tensordict.TensorDict(data, [3, 7]))
                loss = result["features"].square().mean() + result["next", "h"].square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {"loss": loss.item(), "features": result["features"].detach(), "h": result["next", "h"].detach()}

    assert_same(program)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_steps(kind: str) -> None:
    """Step by step, the state from the last step's "next", zero again where a trajectory begins; trained through the loop."""

    def program(swap: Swap) -> dict[str, Any]:
        layer = swap(_layer(kind, num_layers=2))
        observation, is_init = _trajectories()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):
            state = _states(kind, 2, 3)
            outputs = []
            for t in range(7):
                data = {"observation": observation[:, t], "is_init": is_init[:, t], **state}
                result = layer(tensordict.TensorDict(data, [3]))
                state = {key: result["next", key] for key in state}
                outputs.append(result["features"])
            optimizer.zero_grad()
            torch.stack(outputs).square().mean().backward()
            optimizer.step()
        return {"features": torch.stack(outputs).detach()}

    assert_same(program)


@pytest.mark.parametrize(("steps", "keep_class"), [(6, False), (24, True)], ids=["one trajectory", "several"])
def test_rollout_and_ppo(steps: int, keep_class: bool) -> None:
    """An actor and a critic share an LSTM, gather a rollout in an environment, and are trained by PPO's loss."""
    envs, objectives = package("torchrl.envs"), package("torchrl.objectives")
    package("gymnasium")
    sequence, values = package("tensordict.nn"), package("torchrl.objectives.value")

    def program(swap: Swap) -> dict[str, Any]:
        lstm = modules.LSTMModule(input_size=4, hidden_size=6, in_key="observation", out_key="features")
        env = envs.TransformedEnv(
            envs.GymEnv("CartPole-v1", device="cpu"),
            envs.Compose(envs.InitTracker(), lstm.make_tensordict_primer()),
        )
        env.set_seed(0)
        policy = modules.ProbabilisticActor(
            sequence.TensorDictSequential(lstm, sequence.TensorDictModule(nn.Linear(6, 2), ["features"], ["logits"])),
            in_keys=["logits"],
            distribution_class=modules.OneHotCategorical,
            return_log_prob=True,
        )
        value = sequence.TensorDictModule(nn.Linear(6, 1), ["features"], ["state_value"])
        critic = sequence.TensorDictSequential(lstm, value)
        swap(lstm, keep_class=keep_class)
        with torch.no_grad():
            rollout = env.rollout(steps, policy, break_when_any_done=False)
        loss_of = objectives.ClipPPOLoss(actor_network=policy, critic_network=critic)
        # As TorchRL's tutorial of recurrent networks has it: one call over the trajectory, no map over it and its successor.
        advantage = values.GAE(gamma=0.9, lmbda=0.9, value_network=critic, shifted=True)
        optimizer = torch.optim.SGD(loss_of.parameters(), lr=0.05)
        losses = []
        for _ in range(2):
            with modules.set_recurrent_mode(True):
                advantage(rollout)
                parts = loss_of(rollout)
            loss = sum(part for key, part in parts.items() if key.startswith("loss_"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return {"losses": losses, "observations": rollout["observation"], "actions": rollout["action"].float()}

    assert_same(program)
