"""What contestants measure about themselves, and the reward that all of them see. Under a second, no TRL."""

from __future__ import annotations

import pytest

from benchmarks.peers.meter import Meter, Reached
from benchmarks.peers.rewards import Reward
from benchmarks.ppo import over, summary

END = 9
SPEC = {"prompts": [[1, 2, 4], [1, 2, 3]], "asked": ["one", "other"], "world": None, "seed": 0}


def reward(**more: object) -> Reward:
    return Reward({**SPEC, **more}, str, END)


def iteration(meter: Meter, score: float) -> None:
    meter.note("score", [score])
    meter.check()
    meter.close()


def test_the_target_is_for_the_mean_of_two_iterations() -> None:
    meter = Meter(target=1.0)
    meter.start()
    iteration(meter, 1.4)  # alone it says nothing
    iteration(meter, 0.5)  # (1.4 + 0.5) / 2 = 0.95
    assert not meter.reached
    with pytest.raises(Reached):
        iteration(meter, 1.5)  # (0.5 + 1.5) / 2 = 1.0
    assert meter.reached
    assert len(meter.iterations) == 3


def test_without_a_target_nothing_ends() -> None:
    meter = Meter()
    iteration(meter, 100.0)
    iteration(meter, 100.0)
    assert not meter.reached


def test_seconds_of_stages_add_up_to_those_of_the_iteration() -> None:
    meter = Meter()
    meter.start()
    for stage in ("generate", "score", "train"):
        sum(range(20_000))
        meter.lap(stage)
    meter.close()
    [row] = meter.iterations
    assert row["generate_s"] + row["score_s"] + row["train_s"] == pytest.approx(row["seconds"], abs=1e-3)


def test_memory_counts_what_came_after_the_imports() -> None:
    meter = Meter()
    block = bytearray(64 * 1024 * 1024)
    block[::4096] = b"x" * len(block[::4096])  # touched, so that it is there
    memory = meter.result()["memory_mb"]
    assert isinstance(memory, float)
    assert memory == pytest.approx(64, abs=8)


def test_a_sequence_is_told_apart_into_prompt_and_reply() -> None:
    assert reward().split([1, 2, 3, 7, END]) == ((1, 2, 3), [7, END])
    with pytest.raises(KeyError):
        reward().split([5, 5, 5, 5])


def test_the_reward_without_a_world_likes_an_end_and_thirty_tokens() -> None:
    # 20 tokens with their end: 1 - 10/20; 40 without one: 0 - 10/20.
    assert reward().one([1, 2, 4], [7] * 19 + [END]) == pytest.approx(0.5)
    assert reward().one([1, 2, 4], [7] * 40) == pytest.approx(-0.5)


def test_the_control_exchanges_rewards_and_keeps_them_all() -> None:
    scores = [float(i) for i in range(20)]
    exchanged = reward(shuffle_reward=True).given(scores)
    assert exchanged != scores
    assert sorted(exchanged) == scores
    assert reward().given(scores) == scores


def test_a_summary_counts_samples_by_the_time_of_whole_iterations() -> None:
    rows = [{"generate_s": 1.0, "score_s": 1.0, "train_s": 2.0, "reply_tokens": 20.0, "score": 0.0}] * 3
    run = {"iterations": rows, "work_s": 12.0, "memory_mb": 100.0, "trainable": 1, "parameters": 2}
    found = summary([run, {**run, "memory_mb": 120.0}], rollouts=32)
    assert found["samples_per_s"] == pytest.approx(8.0)  # 3 x 32 / 12
    assert found["memory_mb"] == 120.0
    assert over(6.0, 3.0) == 2.0
    assert over(None, 3.0) is None
