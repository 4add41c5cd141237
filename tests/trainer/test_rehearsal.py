"""A dry run says what a cycle would do and refuse, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cycle_world import HELD_OUT, SETTINGS, make_job

from deploy.config import PolicySettings
from deploy.registry import Registry
from feedback.config import FeedbackSettings, Settings
from feedback.stores import Stores, open_stores
from trainer.rehearsal import PROBED, Costs, Rehearsal, _seconds, rehearse
from trainer.schedule import Job, LearningSettings, begin

ASKED = PolicySettings(name="tiny", temperature=1.0, max_tokens=12, max_model_len=64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, Stores, Path]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rehearsal")
    job = make_job(folder)
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)), "trainer")
    stores.ingest()
    yield job, stores, folder
    stores.close()


def rehearsed(world: tuple[Job, Stores, Path], asked: PolicySettings = ASKED, **cycle: object) -> Rehearsal:
    job, stores, _ = world
    settings = LearningSettings(SETTINGS.reward_model, SETTINGS.ppo, SETTINGS.cycle.model_copy(update=cycle), "test")
    return rehearse(stores, Registry(stores.engine), job.policy, asked, settings)


def test_it_says_what_would_be_done_and_changes_nothing(world: tuple[Job, Stores, Path]) -> None:
    folder = world[2]
    (folder / "held_out.txt").write_text("\n".join(HELD_OUT))
    before = sorted(str(path) for path in folder.rglob("*") if path.suffix not in (".sqlite-wal", ".sqlite-shm"))
    found = rehearsed(world, held_out=folder / "held_out.txt")
    assert sorted(str(path) for path in folder.rglob("*") if path.suffix not in (".sqlite-wal", ".sqlite-shm")) == before
    assert found.refused == []
    said = "\n".join(found.lines)
    assert "180 ratings of finished answers (90 choices, 90 thumbs; 180 simulated) by 10 raters; 180 new since the last cycle" in said
    # A fourth of ten raters is rounded to two.
    assert "180 ratings (90 choices) by 10 raters; a second one by 2 of them may stop PPO earlier" in said
    assert "PPO: 2 x at most 6 iterations of 8 rollouts, on 6 of 6 prompts" in said
    assert "the KL target is 5.0 nats a reply and training stops at 7.5" in said
    assert "4 held-out prompts x 2 answers of base and candidate, 0 probes, 0 facts" in said and "no facts are given" in said
    assert "180 of 180 rated answers" not in said  # unknown adapters are named per answer, of which a thumb has one and a choice two
    assert "270 of 270 rated answers were given by adapters that this registry does not know" in said
    assert f"time, by {PROBED} replies just made and read: labels" in said


def test_it_names_everything_that_would_be_refused(world: tuple[Job, Stores, Path]) -> None:
    found = rehearsed(world, ASKED.model_copy(update={"max_model_len": 17}))
    assert [reason.split(":")[0] for reason in found.refused] == ["evaluation"]
    found = rehearsed(world, ASKED.model_copy(update={"max_tokens": 14, "max_model_len": 16}), shuffle_labels=True)
    assert [reason.split(":")[0] for reason in found.refused] == ["prompts", "evaluation"]
    assert any("the ratings are shuffled, as a control" in line for line in found.lines)
    found = rehearsed(world, held_out=world[2] / "missing.txt")
    assert found.refused[0].startswith("cycle.held_out:")


def test_a_cycle_that_was_begun_is_what_it_would_go_on_with(world: tuple[Job, Stores, Path]) -> None:
    begin(world[0].snapshot, 180, world[2])
    assert rehearsed(world).lines[0].endswith("which was begun and has nothing yet")
    (world[2] / "cycles" / "begun.json").unlink()


def test_the_time_is_counted_as_the_stages_count(world: tuple[Job, Stores, Path]) -> None:
    # One second to make a reply, none to read or to learn from it: PPO makes 2 seeds x (6 + 1) iterations x 8 replies, the base
    # 4 answers to each of 6 prompts, the evaluation 4 prompts x 2 answers of base, candidate and the second seed, and 2 probes' answers.
    found = _seconds([], 6, Costs(1.0, 0.0, 0.0, 12.0), world[0], SETTINGS)
    assert found == {"labels": 0.0, "base": 24.0, "ppo": 112.0, "evaluation": 24.0 + 2.0}
    # Only learning: 2 seeds x 6 iterations x 8 replies x 2 epochs.
    assert _seconds([], 6, Costs(0.0, 0.0, 1.0, 12.0), world[0], SETTINGS)["ppo"] == 192.0
