"""Which adapters learned from somebody who was erased, and that none of them is promoted after it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from good_evaluation import GOOD
from rollout_world import MARA, Ring
from sqlalchemy import text

from deploy import approval, lineage
from deploy.config import ErasureSettings, RolloutSettings
from deploy.manifest import ManifestFields, base_digests, write_adapter
from deploy.votes import votes
from feedback import audit, erasure, snapshot
from feedback.erasure import Asker
from feedback.errors import NotDurable, PromotionRefused
from feedback.events import Event, FeedbackGiven, FinishedText, InteractionFinished, InteractionStarted, StartedText

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]
BLOCK, RETIRE, REPORT = (ErasureSettings(policy=policy, load_timeout_s=5) for policy in ("block", "retire", "report"))


class World(Ring):
    """The ring, with people whose ratings were learned from."""

    def rated(self, *people: str) -> str:
        """Each asks and rates once more; the snapshot of everything after that."""
        for who in people:
            number = self.stores.archive.counts().get("feedback.given", 0)
            sealed = [
                self.stores.subjects.seal((who,), text) for text in (StartedText(messages=[]), FinishedText(answer=f"{who} {number}"))
            ]
            about: dict[str, Any] = {"interaction_id": f"{who}-{number}", "subject": who}
            kind: dict[str, Any] = {"subject_kind": "named", "model": "plaudit", "adapter": self.base}
            events: list[Event] = [
                InteractionStarted(event_id=f"started-{who}-{number}", **about, **kind, sealed=sealed[0]),
                InteractionFinished(event_id=f"finished-{who}-{number}", **about, finish_reason="stop", sealed=sealed[1]),
                FeedbackGiven(event_id=f"up-{who}-{number}", target=f"{who}-{number}", rater=who, slot="rating", value="up"),
            ]
            self.happened(*events)
        return snapshot.build(self.stores.archive, self.stores.subjects, self.folder / "snapshots").digest

    def learned(self, digest: str, seed: int, *, register: bool = True) -> str:
        """An adapter that says that it learned from this snapshot, and the cycle behind it."""
        fields = ManifestFields(
            kind="trained",
            base_model="test",
            base=base_digests(self.policy),
            temperature=1.0,
            snapshot=digest,
            reward_model=f"r{seed}",
            seed=seed,
        )
        adapter, path = write_adapter(self.registry.adapter(self.base).path, self.folder / "adapters", fields)
        cycle = self.folder / "cycles" / f"cycle-{seed}"
        cycle.mkdir(parents=True)
        (cycle / "job.json").write_text(json.dumps({"snapshot": digest}))
        (cycle / "reward.json").write_text(json.dumps({"id": f"r{seed}"}))
        (cycle / "adapter.json").write_text("{}")
        if register:
            self.registry.register(adapter, path, "trainer")
            self.registry.attest(adapter, "evaluation", GOOD, "trainer")
        return adapter

    def erase(self, who: str, settings: ErasureSettings = BLOCK) -> lineage.Outcome:
        return lineage.erase(self.stores, self.registry, settings, Asker(who, "mara"), "they asked")


@pytest.fixture
def world(tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter) -> Iterator[World]:
    made = World(tmp_path / "data", tiny_policy, make_adapter)
    yield made
    made.stores.close()
    made.stores.engine.dispose()


def actions(world: World) -> list[tuple[str, str]]:
    """Audit rows since the adapters were registered."""
    kinds = ("subject.erased", "adapter.blocked", "adapter.retired")
    return [(row["action"], row["subject"]) for row in audit.read(world.stores.engine) if row["action"] in kinds]


def test_everything_that_used_somebody_is_listed_and_nothing_else(world: World) -> None:
    early = world.rated("anna", "ben")
    both = world.rated("cleo")
    from_early, from_both = world.learned(early, 1), world.learned(both, 2, register=False)
    before = lineage.affected(world.stores, world.registry, "anna")
    assert before.snapshots == tuple(sorted((early, both))) and before.reward_models == ("r1", "r2")
    assert before.adapters == tuple(sorted((from_early, from_both))) and before.cycles == ("cycle-1", "cycle-2")
    assert lineage.affected(world.stores, world.registry, "cleo").adapters == (from_both,)
    outcome = world.erase("anna")
    assert outcome.affected == before == lineage.affected(world.stores, world.registry, "anna")
    assert lineage.affected(world.stores, world.registry, "dora") == lineage.Affected(subject="dora")


def test_a_blocked_adapter_is_refused_by_name_wherever_it_stands(world: World) -> None:
    digest = world.rated("anna")
    candidate, on_canary = world.learned(digest, 1, register=False), world.learned(digest, 2)
    world.look(2)  # the gates pass and the canary answers
    assert world.running().state == "canary" and world.registry.alias("canary") == on_canary
    outcome = world.erase("anna")
    assert set(outcome.done) == {candidate, on_canary} and all(each.startswith("blocked: it will not") for each in outcome.done.values())
    assert world.registry.active_rollout() is None and world.registry.alias("canary") is None
    assert world.registry.adapter(on_canary).state == "refused"
    world.registry.register(candidate, world.folder / "adapters" / candidate, "trainer")  # its trainer was a moment behind
    world.registry.attest(candidate, "evaluation", GOOD, "trainer")
    world.look(2)
    last = world.registry.rollouts(candidate)[-1]
    assert (last.state, last.reason) == (
        "stopped",
        "erasure: somebody whose ratings it learned from was erased; train again without them",
    )
    with pytest.raises(PromotionRefused, match=r"somebody whose ratings it learned from was erased"):
        approval.approve(world.registry, RolloutSettings(), on_canary, MARA)
    assert sorted(actions(world)) == sorted([("subject.erased", "anna"), ("adapter.blocked", candidate), ("adapter.blocked", on_canary)])
    assert world.erase("anna").done == {candidate: "blocked before", on_canary: "blocked before"}
    assert len(actions(world)) == 3


def test_a_canary_that_waits_for_approval_cannot_be_approved_any_more(world: World) -> None:
    adapter = world.learned(world.rated("anna"), 1)
    world.look(3)
    world.compare(raters=24, votes=3)
    world.look()
    assert world.running().state == "awaiting"
    world.erase("anna")
    with pytest.raises(PromotionRefused, match="was erased"):
        approval.approve(world.registry, RolloutSettings(), adapter, MARA)


def promoted(world: World, digest: str, seed: int) -> str:
    adapter = world.learned(digest, seed)
    world.look(3)
    world.compare(raters=24, votes=3)
    world.look()
    approval.approve(world.registry, RolloutSettings(), adapter, MARA)
    return adapter


def test_report_only_lists_and_block_leaves_stable_where_it_is(world: World) -> None:
    stable = promoted(world, world.rated("anna", "ben"), 1)
    assert world.erase("anna", REPORT).done == {stable: "listed only (erasure.policy)"}
    assert world.registry.attestations(stable, "erasure") == []
    world.erase("ben", BLOCK)
    assert world.registry.alias("stable") == stable and world.registry.adapter(stable).state == "stable"
    assert len(world.registry.attestations(stable, "erasure")) == 1


def test_retire_takes_it_off_stable_to_what_learned_from_nobody_erased(world: World) -> None:
    first = promoted(world, world.rated("ben"), 1)
    second = promoted(world, world.rated("anna"), 2)
    assert (world.registry.alias("stable"), world.registry.alias("previous")) == (second, first)
    outcome = world.erase("anna", RETIRE)
    assert outcome.done == {second: f"retired; {first[:16]} answers in its place"}
    assert (world.registry.alias("stable"), world.registry.alias("previous")) == (first, None)
    assert (world.registry.adapter(second).state, world.registry.adapter(first).state) == ("retired", "stable")
    kinds = [event.type for event in world.registry.unsent() if getattr(event, "adapter", "") == second]
    assert kinds.count("adapter.retired") == 1 and kinds.count("adapter.attested") == 1  # its evaluation was sent before
    # Ben goes too: nothing trained is left, so the identity adapter answers, which replicas hold before anybody is sent there.
    original = world.registry.held_everywhere

    def held() -> set[str]:
        asyncio.run(world.agent.step())
        return original()

    world.registry.held_everywhere = held  # type: ignore[method-assign]  # the agent's loop, without its waiting
    outcome = world.erase("ben", RETIRE)
    assert world.registry.routing().stable.adapter == world.base and world.registry.routing().stable.name in original()
    assert world.erase("ben", RETIRE).done.keys() == outcome.done.keys() and set(world.erase("ben", RETIRE).done.values()) == {
        "retired before"
    }


def test_a_stable_with_nothing_to_replace_it_is_blocked_and_told(world: World) -> None:
    stable = promoted(world, world.rated("anna"), 1)
    with world.stores.engine.begin() as db:
        db.execute(text("UPDATE adapters SET kind = 'trained'"))
        db.execute(text("UPDATE aliases SET adapter = NULL WHERE name = 'previous'"))
    assert world.erase("anna", RETIRE).done[stable].startswith("blocked; it is still stable")
    assert world.registry.alias("stable") == stable and len(world.registry.attestations(stable, "erasure")) == 1


def test_a_rollout_against_a_stable_that_is_retired_ends(world: World) -> None:
    promoted(world, world.rated("anna"), 1)
    world.candidate(7)  # learned from nobody here
    world.look(2)
    assert world.running().state == "canary"
    world.erase("anna", RETIRE)
    assert world.registry.active_rollout() is None and world.registry.alias("canary") is None
    assert world.registry.alias("stable") == world.base


def test_what_cycles_keep_of_somebody_goes_and_an_unfinished_one_starts_anew(world: World) -> None:
    digest, other = world.rated("anna"), "0" * 64
    for number, about in ((1, digest), (2, digest), (3, other)):
        world.learned(about, number, register=False)
        for name in ("labels.safetensors", "base.safetensors", "ppo.pt", "labels.tmp"):
            (world.folder / "cycles" / f"cycle-{number}" / name).write_text("what Anna wrote")
    (world.folder / "cycles" / "cycle-2" / "adapter.json").unlink()
    (world.folder / "cycles" / "begun.json").write_text(json.dumps({"snapshot": digest, "ratings": 1}))
    world.erase("anna")
    left = {str(path.relative_to(world.folder / "cycles")) for path in (world.folder / "cycles").rglob("*") if path.is_file()}
    kept = {"job.json", "reward.json", "adapter.json"}
    private = {"labels.safetensors", "base.safetensors", "ppo.pt", "labels.tmp"}
    assert left == {f"cycle-1/{name}" for name in kept} | {f"cycle-3/{name}" for name in kept | private}


@pytest.mark.parametrize("text", ["", "[]", '{"snapshot"', "{}"])
def test_a_cycle_that_cannot_be_read_stops_the_erasure_by_name_until_it_is_gone(world: World, text: str) -> None:
    digest = world.rated("anna")
    world.learned(digest, 1, register=False)
    job = world.folder / "cycles" / "cycle-1" / "job.json"
    job.write_text(text)
    with pytest.raises(NotDurable, match=re.escape(str(job))):
        world.erase("anna")
    shutil.rmtree(job.parent)
    assert world.erase("anna").affected.snapshots == (digest,)


def test_a_private_file_that_stays_stops_the_erasure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.learned(world.rated("anna"), 1, register=False)
    folder = world.folder / "cycles" / "cycle-1"
    (folder / "adapter.json").unlink()
    (folder / "ppo.pt").mkdir()  # no file, so it cannot be unlinked, as on a disk that is read-only
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(NotDurable, match=r"ppo\.pt could not be deleted"):
        world.erase("anna")
    monkeypatch.undo()
    world.erase("anna")
    assert not folder.exists()


def test_an_erasure_that_came_from_elsewhere_is_acted_on_as_well(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = world.learned(world.rated("anna"), 1)
    monkeypatch.setattr(erasure, "_complete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        world.erase("anna")
    monkeypatch.undo()
    world.stores.ingest()
    monkeypatch.setattr(erasure, "FOREIGN_MS", 0)
    assert lineage.finish(world.stores, world.registry, BLOCK) == 1 and lineage.finish(world.stores, world.registry, BLOCK) == 0
    assert len(world.registry.attestations(adapter, "erasure")) == 1


def test_the_votes_of_who_withdrew_do_not_count(world: World) -> None:
    world.learned(world.rated("anna"), 1)
    world.look(3)
    world.compare(raters=2, votes=1)
    running = world.running()
    assert set(votes(world.stores.archive, running.id, 3)) == {"rater 0", "rater 1"}
    erasure.withdraw(world.stores, "rater 0", "the person", "asked for")
    assert set(votes(world.stores.archive, running.id, 3)) == {"rater 1"}
