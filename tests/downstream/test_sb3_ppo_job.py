"""The training job with sb3-contrib's RecurrentPPO; without the package only its command line is tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from jobs_support import keep_torch_settings  # noqa: F401, a fixture for every test

from benchmarks import jobs
from benchmarks.training import sb3_ppo

TINY = "--seeds 2 --updates 2 --envs 2 --rollout 8 --batch 8 --epochs 2 --hidden 4 --longest 3".split()


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sb3_ppo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        sb3_ppo.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "sb3_ppo: not installed: sb3-contrib (pip install sb3-contrib)\n"


def test_the_task_pays_for_the_cue() -> None:
    pytest.importorskip("gymnasium")
    env = sb3_ppo.recall(4)
    for seed in range(6):
        observation, _ = env.reset(seed=seed)
        cue, right, rewards, done = observation[0], seed % 2 == 0, [], False
        assert abs(cue) == 1
        while not done:
            seen = observation
            observation, reward, done, _, _ = env.step(int((cue > 0) == right))
            rewards.append(reward)
        assert seen[1] == 1
        assert 2 <= len(rewards) <= 4
        assert rewards == [0.0] * (len(rewards) - 1) + [float(right)]


def test_both_agents_train_alike_in_turns() -> None:
    """The same actions, so the same episodes, and weights that differ by roundings of float32 in two small trainings."""
    pytest.importorskip("sb3_contrib")
    agents = sb3_ppo.race(sb3_ppo.parser().parse_args(TINY), 1)
    base, ours = (agents[name] for name in (sb3_ppo.TORCH, sb3_ppo.OURS))
    assert type(base.model.policy.lstm_actor) is torch.nn.LSTM
    assert type(ours.model.policy.lstm_actor).__module__.startswith("fused_rnn")
    assert base.rewards == ours.rewards
    numpy.testing.assert_array_equal(base.model.rollout_buffer.actions, ours.model.rollout_buffer.actions)
    fresh = sb3_ppo.make(sb3_ppo.parser().parse_args(TINY), 1, converted=False).model.policy.state_dict()
    theirs, found = (agent.model.policy.state_dict() for agent in (base, ours))
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found["lstm_actor.weight_hh_l0"], fresh["lstm_actor.weight_hh_l0"])


def test_rows_become_a_line_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sb3_contrib")
    assert sb3_ppo.main([*TINY, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "sb3_ppo.json").read_text())
    assert [row["provider"] for row in rows] == ["torch.nn", "fused_rnn"]
    for row in rows:
        assert [len(seconds) for seconds in row["cpu_seconds"]] == [2, 2]
        assert {"cpu", "threads", "commit", "date", "load_at_start", "load_at_end"} <= row.keys()
        assert "sb3_contrib" in row["versions"]
    assert rows[0]["speed_up"] == 1
    (line,) = jobs.table(jobs.load_jobs(tmp_path))[2:]
    assert line.startswith("| sb3-contrib RecurrentPPO, recall: lstm, hidden 4; a step is an update, in CPU time on ")
    assert "the rewards agree" in capsys.readouterr().out
