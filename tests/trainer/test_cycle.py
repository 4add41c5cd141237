"""One whole cycle on a tiny policy: its files, its evidence, its control, and what a kill in the middle costs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cycle_world import HELD_OUT, SETTINGS, make_job
from torch import Tensor

from deploy import lineage
from deploy.card import Judged
from deploy.config import ErasureSettings, PolicySettings
from deploy.gates import Evaluation
from deploy.manifest import read_manifest, verify
from deploy.registry import Registry
from feedback.config import FeedbackSettings, Settings
from feedback.erasure import Asker
from feedback.errors import InvalidInput, SnapshotRedacted, TrainingRefused
from feedback.snapshot import load
from feedback.stores import open_stores
from trainer import distributed, ppo, processor, start
from trainer.config import CycleSettings
from trainer.cycle import CycleResult, run_cycle
from trainer.losses import value_loss
from trainer.policy import Policy
from trainer.schedule import Job, LearningSettings, begin, begun, give_up, ratings_now, should_train, trained
from trainer.stages import NOT_FINITE, nothing_learned


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    return make_job(folder), folder


@pytest.fixture(scope="module")
def result(world: tuple[Job, Path]) -> CycleResult:
    return run_cycle(world[0], SETTINGS, world[1])


@pytest.mark.slow
def test_a_cycle_leaves_an_adapter_with_its_evidence(world: tuple[Job, Path], result: CycleResult) -> None:
    job, folder = world
    assert verify(result.adapter) == result.adapter_id == result.adapter.name
    manifest = read_manifest(result.adapter)
    assert manifest.snapshot == job.snapshot.name and manifest.temperature == 1.0 and manifest.kind == "trained"
    assert manifest.peft["base_model_name_or_path"] is None
    found = Evaluation.model_validate(result.evaluation)
    assert found.reward_gain_base.n == 4 and found.facts is not None and found.facts.n == 3
    assert found.kl_budget_nats == 5.0 and not found.shuffled
    assert found.probes[0].keys() == {"prompt", "base", "candidate", "stable"}
    judged = Judged.model_validate(result.evaluation)
    assert judged.influence is not None and judged.influence.shuffled is not None and judged.answers is not None
    # All raters carry one tag, which nobody can be left out by; four prompts have two answers each, all of which are shown.
    assert [(row.cohort, row.raters, row.ratings, row.pull) for row in judged.influence.cohorts] == [("simulated", 10, 180, None)]
    assert judged.answers.of == len(judged.answers.random) == len(judged.answers.worst) == 8
    changes = [each.change for each in judged.answers.worst]
    assert changes == sorted(changes) and found.length.stable == found.length.base, "stable is the base here"
    reward = json.loads((result.folder / "reward.json").read_text())
    assert reward["choices"] == reward["thumbs"] == 90 and reward["simulated_raters"] == reward["raters"] == 10
    assert reward["second"] and reward["accuracy"]["prompts"]["n"] == 90
    assert reward["first_fold_nll"] is None and reward["foreseen_by"].startswith("ridge's")
    assert manifest.reward_model == reward["id"]
    steps = [json.loads(line)["step"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps))) and len(steps) > 1
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_the_second_seed_is_another_run_beside_the_candidate(world: tuple[Job, Path], result: CycleResult) -> None:
    first, second = (json.loads((folder / "ppo.json").read_text()) for folder in (result.folder, result.folder / "seed-1"))
    assert (first["seed"], second["seed"]) == (0, 1000) and first["steps"] != second["steps"]
    candidate, other = result.evaluation["seeds"]["runs"]
    assert candidate["gain_base"] == result.evaluation["reward_gain_base"] and other["gain_base"] != candidate["gain_base"]
    (apart,) = result.evaluation["seeds"]["against_first"]
    means = [run["gain_base"]["mean"] for run in (candidate, other)]
    assert apart["difference"]["mean"] == pytest.approx(means[1] - means[0], abs=1e-5)
    # One seed alone makes the same adapter: the others change nothing.
    alone = run_cycle(world[0], replace(SETTINGS, cycle=SETTINGS.cycle.model_copy(update={"seeds": 1})), world[1])
    weights = "adapter_model.safetensors"
    assert read_manifest(alone.adapter).files[weights] == read_manifest(result.adapter).files[weights]


@pytest.mark.slow
def test_the_adapter_that_was_judged_is_the_one_that_loads(world: tuple[Job, Path], result: CycleResult) -> None:
    policy = Policy.load(world[0].policy, adapter=result.adapter)
    replies = policy.sample([policy.encode([{"role": "user", "content": " hello"}])] * 4, max_tokens=12, temperature=1.0, seed=0)
    new, _ = policy.logprobs(replies, 1.0)
    base, _ = policy.logprobs(replies, 1.0, reference=True)
    assert not torch.allclose(new, base, atol=1e-4)  # it learned something


@pytest.mark.slow
def test_a_finished_cycle_is_found_again(world: tuple[Job, Path], result: CycleResult) -> None:
    before = {path: path.stat().st_mtime_ns for path in result.folder.iterdir() if path.name != "job.json"}
    again = run_cycle(world[0], SETTINGS, world[1])
    assert again.adapter_id == result.adapter_id and again.evaluation == result.evaluation
    assert {path: path.stat().st_mtime_ns for path in result.folder.iterdir() if path.name != "job.json"} == before


@pytest.mark.slow
def test_with_and_without_a_registry_the_first_process_is_asked_as_often(
    world: tuple[Job, Path], result: CycleResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or several processes of one cycle, of which the first one has the registry, would hear answers to other questions."""
    asked: list[object] = []
    whole = distributed.from_first

    def counting(value: object) -> object:
        asked.append(value)
        return whole(value)

    monkeypatch.setattr(distributed, "from_first", counting)
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=tmp_path)))
    run_cycle(world[0], SETTINGS, world[1], registry=Registry(stores.engine))
    stores.close()
    with_one = len(asked)
    run_cycle(world[0], SETTINGS, world[1])
    assert len(asked) == 2 * with_one


@pytest.mark.slow
def test_a_small_policy_is_trained_on_one_thread(world: tuple[Job, Path], result: CycleResult) -> None:
    torch.set_num_threads(2)
    run_cycle(world[0], SETTINGS, world[1])
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_the_control_is_another_cycle_and_says_so(world: tuple[Job, Path], result: CycleResult) -> None:
    control = replace(SETTINGS, cycle=CycleSettings(evaluation_samples=2, shuffle_labels=True))
    shuffled = run_cycle(world[0], control, world[1])
    assert shuffled.folder != result.folder
    assert Evaluation.model_validate(shuffled.evaluation).shuffled
    assert json.loads((shuffled.folder / "reward.json").read_text())["shuffled"]
    assert shuffled.adapter_id != result.adapter_id
    # Labels that say nothing leave the policy where it was; `result` shows that real ones do not.
    ended = json.loads((shuffled.folder / "ppo.json").read_text())
    assert "so PPO was left out" in ended["stopped_because"] and ended["released"] == 0
    assert not (shuffled.folder / "seed-1").exists()
    assert shuffled.evaluation["kl_nats"] == pytest.approx(0.0, abs=1e-5)


def test_evidence_of_one_standard_error_is_enough_to_try() -> None:
    # 0.05 nats with a standard error of 0.04 leave 0.01; with 0.06 they leave -0.01.
    assert nothing_learned({"mean": 0.05, "low": 0.05 - 1.959964 * 0.04}, 0.0) is None
    assert nothing_learned({"mean": 0.05, "low": 0.05 - 1.959964 * 0.04}, 0.02) is not None
    assert "standard error of 0.060" in str(nothing_learned({"mean": 0.05, "low": 0.05 - 1.959964 * 0.06}, 0.0))
    assert nothing_learned({"mean": 0.05, "low": None}, 0.0) is None


@pytest.mark.slow
def test_what_people_wrote_does_not_outlive_the_cycle(world: tuple[Job, Path], result: CycleResult) -> None:
    # The held-out prompts are the operator's; those that people asked must be gone.
    left = b"".join(path.read_bytes() for path in result.folder.rglob("*") if path.is_file())
    assert b" where tea" in left and b" where shop" not in left
    assert not (result.folder / "ppo.pt").exists()  # nor the checkpoint


def test_bad_jobs_are_refused(world: tuple[Job, Path], tmp_path: Path) -> None:
    job, _ = world
    with pytest.raises(TrainingRefused, match=r"none of 6 fits into 1 tokens"):
        run_cycle(replace(job, max_model_len=13), SETTINGS, tmp_path)
    with pytest.raises(InvalidInput, match=r"policy\.base"):
        run_cycle(replace(job, policy=tmp_path), SETTINGS, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_loss_that_is_no_number_keeps_the_last_checkpoint_and_says_how_to_go_on(
    world: tuple[Job, Path], result: CycleResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, steps = replace(world[0], policy=world[0].policy), 0

    def broken(*arguments: Any, **named: Any) -> Tensor:
        return value_loss(*arguments, **named) * (math.nan if steps == 3 else 1.0)

    def count(what: str, share: float) -> None:
        nonlocal steps
        steps += what == "PPO"

    monkeypatch.setattr(ppo, "value_loss", broken)
    with pytest.raises(
        TrainingRefused, match=r"(?s)in step 3.*it is .*ppo\.pt\).*`plaudit train` goes on there.*ppo\.learning_rate"
    ) as refused:
        run_cycle(job, SETTINGS, tmp_path, progress=count)
    assert refused.value.field in NOT_FINITE
    monkeypatch.undo()
    # The fault has passed: the same cycle goes on at step 3 and ends as if nothing had been.
    heard: list[float] = []
    again = run_cycle(job, SETTINGS, tmp_path, progress=lambda what, share: heard.append(share) if what == "PPO" else None)
    assert heard[0] == pytest.approx(3 / 6)
    weights = "adapter_model.safetensors"
    assert read_manifest(again.adapter).files[weights] == read_manifest(result.adapter).files[weights]


def test_training_is_due_when_enough_was_said(world: tuple[Job, Path]) -> None:
    _, folder = world
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)))
    stores.archive.ingest(stores.logs)
    now = ratings_now(stores.archive)
    assert now == 180
    assert should_train(stores.archive, CycleSettings(min_new_ratings=180), folder)
    assert not should_train(stores.archive, CycleSettings(min_new_ratings=181), folder)
    trained(now, folder)
    assert not should_train(stores.archive, CycleSettings(min_new_ratings=1), folder)
    stores.close()


def test_an_unfinished_cycle_comes_before_new_ratings(tmp_path: Path) -> None:
    assert begun(tmp_path) is None
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    begin(snapshot, 120, tmp_path)
    found = begun(tmp_path)
    assert found is not None and (found.snapshot, found.ratings) == (snapshot, 120)
    trained(120, tmp_path)
    assert begun(tmp_path) is None
    begin(snapshot, 150, tmp_path)
    give_up(tmp_path)  # refused: the next look starts afresh
    assert begun(tmp_path) is None
    begin(snapshot, 150, tmp_path)
    snapshot.rmdir()  # somebody was erased and the snapshot with them
    assert begun(tmp_path) is None


def start_trainer(folder: Path) -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent.parent}:{here}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(here / "cycle_world.py"), str(folder)], env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_killed_trainer_goes_on_at_its_step_and_makes_the_same_adapter(
    world: tuple[Job, Path], result: CycleResult, tmp_path: Path
) -> None:
    make_job(tmp_path)
    trainer = start_trainer(tmp_path)
    deadline = time.monotonic() + 120
    while not (lines := [line for path in tmp_path.glob("cycles/*/metrics.jsonl") for line in path.read_text().splitlines()][1:]):
        assert trainer.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    trainer.send_signal(signal.SIGKILL)
    assert trainer.wait() == -signal.SIGKILL
    (folder,) = (tmp_path / "cycles").iterdir()
    assert not (folder / "ppo.json").exists(), f"killed too late, after {len(lines)} lines"
    done = json.loads(json.dumps(torch.load(folder / "ppo.pt", weights_only=False)["steps"][-1]["step"]))
    heard: list[float] = []
    resumed = run_cycle(make_job(tmp_path), SETTINGS, tmp_path, progress=lambda what, share: heard.append(share) if what == "PPO" else None)
    # The first step it reports is the one after the last that was stored, of 6.
    assert heard[0] == pytest.approx((done + 1) / 6)
    verify(resumed.adapter)
    weights = "adapter_model.safetensors"
    assert read_manifest(resumed.adapter).files[weights] == read_manifest(result.adapter).files[weights]


def test_training_gives_way_and_takes_nothing_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autogroup = tmp_path / "autogroup"
    autogroup.write_text("/autogroup-4 nice 0\n")
    monkeypatch.setattr(processor, "AUTOGROUP", autogroup)
    # One more than now at most, because a test cannot take its niceness back.
    with processor.giving_way(niceness := max(1, os.nice(0))):
        assert autogroup.read_text() == str(niceness)
    assert autogroup.read_text() == "0"
    monkeypatch.setattr(processor, "AUTOGROUP", tmp_path / "not there")
    with processor.giving_way(niceness):
        assert os.nice(0) == niceness


@pytest.mark.slow
def test_somebody_erased_meanwhile_leaves_nothing_in_the_cycle_and_learning_begins_anew(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=tmp_path)), "trainer")
    registry, erased = Registry(stores.engine), False

    def erase_while_it_trains(stage: str, share: float) -> None:
        nonlocal erased
        if stage == "PPO" and not erased:
            erased = True
            lineage.erase(stores, registry, ErasureSettings(), Asker("rater-0", "mara"), "they asked")

    held_out = tmp_path / "held_out.txt"
    held_out.write_text("\n".join(HELD_OUT))
    cycle = CycleSettings(evaluation_samples=2, held_out=held_out)
    asked = PolicySettings(name="tiny", temperature=1.0, max_tokens=12, max_model_len=64)
    settings = LearningSettings(SETTINGS.reward_model, SETTINGS.ppo.model_copy(update={"iterations": 1}), cycle)
    result = start.learn(stores, registry, job.policy, asked, settings, erase_while_it_trains)
    first, second = job.snapshot, tmp_path / "snapshots" / str(read_manifest(result.adapter).snapshot)
    assert erased and second != first and load(first).redacted and not load(second).redacted
    assert {row.rater for row in load(second).rows} == {f"rater-{i}" for i in range(1, 10)}
    assert [path.name for path in (tmp_path / "cycles").iterdir() if path.is_dir()] == [result.folder.name]
    # The erased person's name stands in the audit and in their erasure, and nowhere that learning left.
    assert not [path for path in result.folder.rglob("*") if path.is_file() and b'"rater-0"' in path.read_bytes()]
    assert registry.attestations(result.adapter_id, "erasure") == [] and lineage.affected(stores, registry, "rater-0").adapters == ()
    assert lineage.affected(stores, registry, "rater-1").adapters == (result.adapter_id,)
    with pytest.raises(SnapshotRedacted, match="was erased; train from a new one"):
        run_cycle(job, SETTINGS, tmp_path)
    stores.close()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["labels", "base", "adapter"])
def test_erased_after_any_stage_nothing_goes_to_the_gates(tmp_path: Path, stage: str) -> None:
    job = make_job(tmp_path)
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=tmp_path)), "trainer")
    registry = Registry(stores.engine)

    def erase_after(done: str) -> None:
        if done == stage:
            lineage.erase(stores, registry, ErasureSettings(), Asker("rater-0", "mara"), "they asked")

    with pytest.raises(SnapshotRedacted):
        run_cycle(job, SETTINGS, tmp_path, registry=registry, finished=erase_after)
    left = [path.name for path in (tmp_path / "cycles").rglob("*") if path.is_file()]
    assert not set(left) & {"labels.safetensors", "base.safetensors", "ppo.pt"}
    assert [record for record in registry.adapters() if registry.attestations(record.id, "evaluation")] == []
    for path in (tmp_path / "adapters").glob("*"):  # a finished one is blocked although it was not registered yet
        assert len(registry.attestations(path.name, "erasure")) == 1
    stores.close()


@pytest.mark.slow
def test_what_reports_show_was_asked_by_the_operator(world: tuple[Job, Path], result: CycleResult) -> None:
    asked = {example["prompt"] for example in json.loads((result.folder / "details.json").read_text())["examples"]}
    probed = {probe["prompt"] for probe in result.evaluation["probes"]}
    assert asked == set(HELD_OUT) and probed == set(world[0].probes)
    people = {message["content"] for row in load(world[0].snapshot).rows for message in row.prompt}
    assert not people & (asked - {" hello"})
