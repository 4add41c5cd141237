"""What contestants measure about themselves, and the reward that all of them see. Under a second, no TRL."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ppo
from benchmarks.harness import Report
from benchmarks.peers import PeerFailed
from benchmarks.peers.meter import Meter, Reached
from benchmarks.peers.rewards import Reward
from benchmarks.ppo import over, summary
from benchmarks.reward import Share, rows

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
    run = {"iterations": rows[:2], "work_s": 12.0, "memory_mb": 100.0, "trainable": 1, "parameters": 2, "updates": 8}
    found = summary([run, {**run, "iterations": rows[:1], "work_s": 4.0, "memory_mb": 120.0, "updates": 4}], rollouts=32)
    assert found["samples_per_s"] == pytest.approx(6.0)  # 3 x 32 / 16
    assert found["memory_mb"] == 120.0
    assert found["updates"] == 4.0  # 12 in 3 iterations
    assert over(6.0, 3.0) == 2.0
    assert over(None, 3.0) is None


class Runs:
    """What `until_target` starts: contestants that have run already, or failed."""

    def __init__(self, report: Report, found: dict[str, object] | None) -> None:
        self.report, self.found = report, found

    def __call__(self, *_: object, **__: object) -> dict[str, object]:
        if self.found is None:
            raise PeerFailed("probability tensor contains nan")
        return self.found


def test_a_contestant_that_fails_has_not_reached_the_target_and_proves_nothing(tmp_path: Path) -> None:
    report = Report("ppo", seed=0, rooms=(), folder=tmp_path)
    failed, worked = Runs(report, None), Runs(report, {"reached": False, "work_s": 9.0, "iterations": [{"score": 0.1}]})
    [(seconds, one)] = ppo.until_target(failed, "TRL PPO", 3e-3, range(1))  # type: ignore[arg-type]
    assert (seconds, ppo.last(one, "score", None)) == (float("inf"), None)
    assert ppo.exchanged(worked, 1e-3)  # type: ignore[arg-type]
    assert not ppo.exchanged(failed, 1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ours", "held"), [(30.0, True), (70.0, False), (None, False)])
def test_where_trl_does_not_get_there_its_time_is_at_least_what_it_took(ours: float | None, held: bool, tmp_path: Path) -> None:
    report = Report("ppo", seed=0, rooms=(), folder=tmp_path)
    mine = {"reached": 5, "median_s": ours}
    # It tried for 60 s: at least 60 / 30 = 2 times as long, or no more than that is known.
    ppo.check_target(report, {"TRL PPO": {"median_s": None, "at_least_s": 60.0}, "ours, adapter critic": mine, "ours, head critic": mine})
    assert [check["ok"] for check in report.checks if "TRL" in str(check["what"])] == [held, held]


def test_contestants_must_have_taken_as_many_steps(tmp_path: Path) -> None:
    report = Report("ppo", seed=0, rooms=(), folder=tmp_path)
    one = {"updates": 4.0, "samples_per_s": 1.0, "memory_mb": 100.0}
    ppo.check_speed(report, dict.fromkeys(ppo.CONTESTANTS, one) | {"TRL PPO": {**one, "updates": 2.0}})
    assert report.checks[0]["ok"] is False
    assert len(report.checks) == 7
    # A quick run has two contestants, and compares those.
    quick = Report("ppo", seed=0, rooms=(), folder=tmp_path)
    ppo.check_speed(quick, dict.fromkeys(ppo.QUICK_RACERS, one))
    told = ["samples/s, head critic, another algorithm, over TRL's PPO", "peak memory above the imports, head critic, over TRL's PPO"]
    assert [check["what"] for check in quick.checks[1:]] == told


def test_the_table_of_reward_models_has_seconds_and_memory_of_each() -> None:
    share = Share(0.6, 0.5, 0.7, 10)
    costs: dict[str, dict[str, object]] = {
        "ours": {"features_s": 5.0, "fit_s": 1.5, "memory_mb": 900.0},
        "TRL": {"train_s": 40.0, "memory_mb": 4000.0, "losses": []},
    }
    table = rows({"ours": share, "length alone": share, "TRL": share}, costs)
    assert [(row["model"], row["s"], row["MB"]) for row in table] == [
        ("ours", 6.5, 900.0),
        ("length alone", None, None),
        ("TRL", 40.0, 4000.0),
    ]


@pytest.mark.parametrize(("work_s", "charged"), [(40.0, True), (10.0, False)])
def test_rest_that_the_clock_does_not_count_is_noticed(work_s: float, charged: bool, tmp_path: Path) -> None:
    row = {"generate_s": 5.0, "score_s": 1.0, "train_s": 4.0}
    runs = Runs(Report("ppo", seed=0, rooms=(), folder=tmp_path), {"work_s": work_s, "iterations": [row]})
    assert ppo.rested(runs) is charged  # type: ignore[arg-type]
