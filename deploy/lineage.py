"""What learned from a person, and what becomes of it when they are erased.

    person ──▶ snapshots that held their opinions ──▶ cycles and reward models ──▶ adapters, by the snapshot in their manifest

An erased person's rows are gone from the snapshots; which ones held them was written down before (`feedback/erasure.py`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from deploy.config import ErasureSettings
from deploy.manifest import MANIFEST, read_manifest, vllm_name
from deploy.records import AdapterRecord
from deploy.registry import Registry
from feedback import erasure, snapshot
from feedback.erasure import Asker
from feedback.errors import NotDurable, PlauditError
from feedback.events import Model
from feedback.stores import Stores

PRIVATE = ("labels.safetensors", "base.safetensors", "copied.json", "ppo.pt", "*/ppo.pt", "*.tmp", "*/*.tmp")
"""Files of a cycle's folder that hold, or may hold, what people wrote: texts with their features, answers to their prompts, checkpoints."""
EVER = 2**63 - 1
POLL_S = 0.05


class Affected(Model):
    """Everything that used a person's opinions. Ids in full, sorted."""

    subject: str
    snapshots: tuple[str, ...] = ()
    cycles: tuple[str, ...] = ()
    reward_models: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


class Outcome(Model):
    """What an erasure found, and what was done to each adapter."""

    affected: Affected
    complete: bool = True
    """False where snapshots are left to a process with pyarrow."""
    done: dict[str, str]


def affected(stores: Stores, registry: Registry, subject: str) -> Affected:
    """What learned from this person, erased or not. Adapters count from their manifest on, registered or not."""
    data_dir = stores.settings.feedback.data_dir
    held = set(erasure.snapshots_of(stores.engine, subject)) | _holding(data_dir / "snapshots", subject)
    cycles, models = set(), set()
    for folder in _cycles(data_dir, held):
        cycles.add(folder.name)
        models |= _reward_model(folder)
    adapters = set()
    # Registered ones may have been made on another machine, folders may not be registered yet.
    known = [record.manifest for record in registry.adapters() if record.manifest_json or (record.path / MANIFEST).exists()]
    for manifest in [*known, *(read_manifest(path.parent) for path in (data_dir / "adapters").glob(f"*/{MANIFEST}"))]:
        if manifest.snapshot in held:
            adapters.add(manifest.adapter_id)
            models |= {manifest.reward_model} if manifest.reward_model else set()
    found = (tuple(sorted(each)) for each in (held, cycles, models, adapters))
    return Affected(**dict(zip(("snapshots", "cycles", "reward_models", "adapters"), found, strict=True)), subject=subject)


def erase(stores: Stores, registry: Registry, settings: ErasureSettings, asker: Asker, reason: str) -> Outcome:
    """Erase a subject, forget what cycles keep of them, and act on the adapters by the policy.

    Idempotent; what a killed call left is finished."""
    outcome: list[Outcome] = []
    done = erasure.erase(
        stores, asker.subject, asker.by, reason, lambda each: outcome.append(_act(stores, registry, settings, each, asker.by))
    )
    return outcome[0].model_copy(update={"complete": done.complete})


def finish(stores: Stores, registry: Registry, settings: ErasureSettings, asked: Asker | None = None) -> int:
    """Complete erasures that broke off or came from elsewhere, as `erase` does; at once the one that is `asked` for again. How many."""
    by = dict([asked] if asked else [])
    return len(erasure.finish(stores, lambda each: _act(stores, registry, settings, each, by.get(each, erasure.SYSTEM)), asked))


def replay(stores: Stores, registry: Registry, settings: ErasureSettings, erasures: Mapping[str, int]) -> int:
    """After a backup was restored: erase again, as `erase` does, who was erased since. How many."""
    return len(erasure.replay(stores, erasures, lambda each: _act(stores, registry, settings, each, erasure.SYSTEM)))


def _act(stores: Stores, registry: Registry, settings: ErasureSettings, subject: str, by: str) -> Outcome:
    found = affected(stores, registry, subject)
    forget_cycles(stores.settings.feedback.data_dir, found.snapshots)
    known = {record.id: record for record in registry.adapters()}
    reason = "somebody whose ratings it learned from was erased"
    done = {}
    for adapter in found.adapters:
        try:
            done[adapter] = _withhold(registry, settings, known.get(adapter), adapter, (by, reason), found.adapters)
        except PlauditError as exc:  # the others still have to be dealt with; the outcome says what is left
            done[adapter] = f"not done: {exc.message}"
    return Outcome(affected=found, done=done)


def _withhold(
    registry: Registry, settings: ErasureSettings, record: AdapterRecord | None, adapter: str, why: tuple[str, str], tainted: Iterable[str]
) -> str:
    """Act on one adapter by the policy, unless that was done already; in words."""
    by, reason = why
    if settings.policy == "report":
        return "listed only (erasure.policy)"
    retire = settings.policy == "retire" and record is not None
    if registry.attestations(adapter, "erasure") and not (retire and record and record.state != "retired"):
        return "retired before" if record and record.state == "retired" else "blocked before"
    fallback = _fallback(registry, settings, adapter, why, set(tainted)) if retire else None
    if retire and fallback is None and registry.alias("stable") == adapter:
        registry.withhold(adapter, {"reason": reason, "policy": settings.policy}, by, retire=False, fallback=None)
        return "blocked; it is still stable, because no adapter that learned from nobody erased is there: register one and erase again"
    registry.withhold(adapter, {"reason": reason, "policy": settings.policy}, by, retire=retire, fallback=fallback)
    if not retire:
        return "blocked: it will not be promoted any more"
    return f"retired; {fallback[:16]} answers in its place" if fallback else "retired"


def _fallback(registry: Registry, settings: ErasureSettings, adapter: str, why: tuple[str, str], tainted: set[str]) -> str | None:
    """What answers in place of a stable that is taken away: `previous` if it may, else the identity adapter, once replicas hold it."""
    if registry.alias("stable") != adapter:
        return None
    previous = registry.alias("previous")
    if previous and previous not in tainted and not registry.attestations(previous, "erasure"):
        return previous
    identity = next((each.id for each in registry.adapters() if each.kind == "identity"), None)
    if identity is None:
        return None
    registry.stand_by(identity, *why)
    end = time.monotonic() + settings.load_timeout_s
    name = vllm_name(identity)
    # Where no replica lives nothing is held and nobody is answered: there is nothing to wait for.
    while (held := registry.held_everywhere()) and name not in held and time.monotonic() < end:
        time.sleep(POLL_S)
    return identity


def forget_cycles(data_dir: Path, snapshots: Iterable[str]) -> None:
    """Take away what cycles about these snapshots keep of what people wrote. One that is not finished starts anew, without the erased."""
    digests = set(snapshots)
    for folder in _cycles(data_dir, digests):
        if (folder / "adapter.json").exists():
            forget(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            forget(folder)  # what could not be deleted is an error here
    begun = data_dir / "cycles" / "begun.json"
    if begun.exists() and _named(begun, "snapshot") in digests:
        begun.unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """Delete a cycle's private files. Raises NotDurable where one stays."""
    for pattern in PRIVATE:
        for path in folder.glob(pattern):
            try:
                path.unlink(missing_ok=True)
            except OSError as exc:
                raise NotDurable(f"{path} could not be deleted: {exc.strerror}; erase again", retry_after_s=2) from exc


def _holding(folder: Path, subject: str) -> set[str]:
    """Snapshots that hold rows of the subject now, as far as this process can read them."""
    if not folder.exists() or not snapshot.readable():
        return set()
    with snapshot.locked(folder):
        return {path.name for path in snapshot.all_in(folder) if snapshot.rows_of(path, {subject: EVER})}


def _cycles(data_dir: Path, snapshots: set[str]) -> list[Path]:
    """Folders of the cycles about these snapshots."""
    return [path.parent for path in (data_dir / "cycles").glob("*/job.json") if _named(path, "snapshot") in snapshots]


def _reward_model(folder: Path) -> set[str]:
    path = folder / "reward.json"
    return {_named(path, "id")} if path.exists() else set()


def _named(path: Path, field: str) -> str:
    """A field of a cycle's file. Raises NotDurable where it cannot be read: then nobody knows what learned from whom."""
    try:
        return str(json.loads(path.read_text())[field])
    except (OSError, ValueError, TypeError, KeyError) as exc:
        told = f"{path} cannot be read ({exc!r}), so it is not known whom this cycle learned from"
        raise NotDurable(f"{told}; put the file right or delete the cycle's folder, and erase again", field=field) from exc
