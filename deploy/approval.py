"""What a person decides about a rollout: let the adapter answer everybody, or end it."""

from __future__ import annotations

from deploy.config import RolloutSettings
from deploy.gates import withheld
from deploy.records import AdapterRecord, RolloutRecord
from deploy.registry import Registry
from feedback.errors import NotFound, PromotionRefused
from feedback.keys import ApiKey


def another_person(act: str, record: AdapterRecord, key: ApiKey, two_people: bool, may_not: str) -> None:
    """Only people decide and, with `two_people`, not about what they registered. Raises PromotionRefused, which names the act."""
    if not key.person:
        raise PromotionRefused(
            f"{act}: key {key.id} of '{key.owner}' names no person; make one with plaudit keys create --person", field="key"
        )
    if two_people and record.registered_by == key.owner:
        raise PromotionRefused(f"{act}: '{key.owner}' registered {record.id[:16]} and so may not {may_not}", field="key")


def approve(registry: Registry, settings: RolloutSettings, adapter: str, key: ApiKey, rollout: str | None = None) -> RolloutRecord:
    """A person lets the adapter answer everybody; with `rollout`, after what that rollout showed and no other. Raises NotAllowed,
    NotFound and PromotionRefused, each saying what to do next, and Conflict where somebody else was first."""
    key.require("adapters:promote")
    record = registry.adapter(adapter)
    another_person("approval", record, key, settings.two_people, "approve it; another person's key is needed")
    erasure = withheld(registry.attestations(record.id, "erasure"))
    if erasure.verdict != "pass":
        raise PromotionRefused(f"approval: {record.id[:16]}: {erasure.reason}", field="adapter")
    meant = [each for each in registry.rollouts(record.id) if rollout in (None, each.id)]
    waiting = [each for each in meant if each.state == "awaiting"]
    if not waiting:
        last = meant[-1:]
        why = f"its rollout is '{last[0].state}': {last[0].reason}" if last else f"it is '{record.state}': {record.reason}"
        raise PromotionRefused(f"approval: {record.id[:16]} does not wait for approval; {why}", field="adapter")
    registry.promote(waiting[0].id, key.owner)
    return registry.rollout(waiting[0].id)


def stop(registry: Registry, reason: str, key: ApiKey, rollout: str | None = None) -> RolloutRecord:
    """A person ends this rollout, else whichever runs; everybody is answered by stable again. Raises NotAllowed, NotFound, and Conflict
    where it has ended."""
    key.require("adapters:promote")
    running = registry.active_rollout() if rollout is None else registry.rollout(rollout)
    if running is None:
        raise NotFound("stop: no rollout is running", field="rollout")
    registry.end_rollout(running.id, f"stopped by {key.owner}: {reason}", key.owner)
    return registry.rollout(running.id)
