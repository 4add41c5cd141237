"""Starting a cycle from what a process has: take the snapshot, name the job, run it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from deploy.config import PolicySettings
from deploy.registry import Registry
from feedback.errors import Conflict, InvalidInput, NotDurable, PlauditError, SnapshotRedacted, TrainingRefused
from feedback.snapshot import build, load
from feedback.stores import Stores
from trainer import distributed, metrics
from trainer.config import CycleSettings
from trainer.cycle import CycleResult, run_cycle
from trainer.facts import read_facts
from trainer.labels import Progress
from trainer.schedule import Job, LearningSettings, begin, begun, cycle_id, give_up, ratings_now, trained
from trainer.stages import NOT_FINITE

BY = "trainer"


def lines_of(path: Path | None, field: str) -> list[str]:
    """One prompt a line. Raises InvalidInput where the file cannot be read."""
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidInput(f"cycle.{field}: {path} cannot be read: {exc}", field=f"cycle.{field}") from exc


def learn(
    stores: Stores,
    registry: Registry,
    policy: Path,
    asked: PolicySettings,
    settings: LearningSettings,
    progress: Progress,
) -> CycleResult:
    """Train on everything that is in the archive, or finish what a killed trainer began; register the candidate.

    Raises TrainingRefused; Conflict where another process trains there; NotDurable where the disk takes no more, as when it is full.

    Of several processes this is the first one's; the others `follow`.
    """
    with _alone(stores.settings.feedback.data_dir / "cycles"):
        return _learn(stores, registry, policy, asked, settings, progress)


@contextlib.contextmanager
def _alone(cycles: Path) -> Iterator[None]:
    """One process at a time writes cycles, and what the disk refuses is one error. Raises Conflict and NotDurable."""
    lock = None
    try:
        cycles.mkdir(parents=True, exist_ok=True)
        lock = os.open(cycles, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            told = f"feedback.data_dir {cycles.parent}: another process trains there now"
            raise Conflict(f"{told}; wait until its cycle has ended, or stop it and run `plaudit train`, which goes on there") from exc
        yield
    except (OSError, SafetensorError) as exc:
        why = (isinstance(exc, OSError) and exc.strerror) or exc
        told = f"the cycle could not be written to {cycles}: {why}; make room there and run `plaudit train`, which goes on where it was"
        raise NotDurable(told) from exc
    finally:
        if lock is not None:
            os.close(lock)


def _learn(
    stores: Stores,
    registry: Registry,
    policy: Path,
    asked: PolicySettings,
    settings: LearningSettings,
    progress: Progress,
) -> CycleResult:
    data_dir = stores.settings.feedback.data_dir
    while True:
        unfinished = begun(data_dir)
        if unfinished is None:
            snapshot = build(stores.archive, stores.subjects, data_dir / "snapshots")
            unfinished = begin(snapshot.path, ratings_now(stores.archive), data_dir)
        job = job_of(registry, policy, asked, unfinished.snapshot, settings.cycle)
        try:
            lead(job, settings, data_dir)
            with metrics.cycle():
                result = run_cycle(job, settings, data_dir, registry=registry, by=BY, progress=progress)
        except SnapshotRedacted:  # somebody was erased meanwhile: begin again without them
            give_up(data_dir)
            stores.ingest()
            continue
        except PlauditError as exc:
            # What was refused would be refused again. Else, as where no rollout server was left, the next try goes on at the checkpoint.
            if isinstance(exc, TrainingRefused | InvalidInput) and exc.field not in NOT_FINITE:
                give_up(data_dir)
            raise
        trained(unfinished.ratings, data_dir)
        return result


def lead(job: Job, settings: LearningSettings, data_dir: Path) -> None:
    """Tell the other processes what to do, and give them what a killed trainer left of it."""
    if distributed.size() > 1:
        folder = data_dir / "cycles" / cycle_id(job, settings, load(job.snapshot).digest)
        left = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        distributed.from_first((job, settings, Path("cycles") / folder.name, left))


def dismiss() -> None:
    """Tell the other processes that nothing comes any more."""
    distributed.from_first(None)


def follow() -> None:
    """What every process but the first one does: the same cycles, with files of its own that go afterwards.

    They see the first one's disk for the policy and the snapshot. An error is the first one's to tell, which then ends them all.
    """
    distributed.start()
    while True:
        work: tuple[Job, LearningSettings, Path, dict[str, bytes]] | None = distributed.from_first(None)
        if work is None:
            return
        job, settings, folder, left = work
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(PlauditError):
            for name, body in left.items():
                path = Path(scratch) / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(body)
            run_cycle(job, settings, Path(scratch), progress=lambda what, share: None)


def job_of(registry: Registry, policy: Path, asked: PolicySettings, snapshot: Path, cycle: CycleSettings) -> Job:
    """What a cycle about this snapshot is about. Raises InvalidInput where a file that the settings name cannot be read."""
    stable_id = registry.alias("stable")
    stable = registry.adapter(stable_id) if stable_id else None
    return Job(
        policy=policy,
        policy_name=asked.name,
        snapshot=snapshot,
        system_prompt=asked.system_prompt,
        temperature=asked.temperature,
        max_tokens=asked.max_tokens,
        max_model_len=asked.max_model_len,
        held_out=lines_of(cycle.held_out, "held_out"),
        probes=lines_of(cycle.probes, "probes"),
        facts=read_facts(cycle.facts) if cycle.facts else [],
        stable=stable.path if stable and stable.kind == "trained" else None,
        answered_by={record.id: record.manifest.base for record in registry.adapters()},
    )
