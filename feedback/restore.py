"""A data folder made again from a backup (`backup.py`), with what happened since and what must not come back.

    verify ─▶ copy beside the data folder ─▶ bring over what the replaced folder still has ─▶ read Kafka ─▶ erase again ─▶ audit ─▶ swap

Everything happens in a folder beside the old one, which is untouched until two renames put the new one in its place; only then it is
deleted. Erasures made since the backup are looked for in the replaced folder (archive, keys, list), in Kafka's topic and in lists that were
kept elsewhere, and are made again before anybody sees the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from feedback import audit, erasure
from feedback.backup import Manifest, copy_file, manifest_digest, read_manifest
from feedback.config import Settings
from feedback.database import transaction
from feedback.errors import ConfigError, Conflict, InvalidInput, NotDurable
from feedback.files import sync, sync_folders
from feedback.kafka_log import KafkaLog
from feedback.sqlite_log import parse
from feedback.stores import Stores, open_stores

BATCH = 1_000
Replay = Callable[[Stores, Mapping[str, int]], object]
"""Erases these subjects again, by the stamps of their erasures, with all that follows from it (`deploy/lineage.py`)."""


@dataclass
class Restored:
    """What a restore did."""

    files: int
    newer: int = 0
    """Events that the backup did not have: from the replaced folder and from Kafka."""
    erased: tuple[str, ...] = ()
    """Subjects that were erased again."""
    problems: list[str] = field(default_factory=list)
    """What the replaced folder could not give any more."""


def restore(
    source: Path,
    settings: Settings,
    who: Callable[[Stores], str],
    replay: Replay,
    *,
    replace: bool = False,
    lists: Sequence[Path] = (),
    keys: Path | None = None,
) -> Restored:
    """Make `feedback.data_dir` from the backup. `who` says who asks for it, from the restored keys, or refuses by raising.

    With `replace` a folder that is there gives its newer events and keys first and is deleted at the end. Raises InvalidInput or NotFound
    for what is no backup, Conflict where the folder is in use or may not be replaced, NotDurable where the disk or Kafka fail; the folder
    is then as it was.
    """
    manifest = read_manifest(source)
    target = settings.feedback.data_dir.absolute()
    _refuse(manifest, settings, target, replace)
    fresh = target.with_name(f".{target.name}.restored.{secrets.token_hex(4)}")
    old = target if target.is_dir() and any(target.iterdir()) else None
    inside = settings.model_copy(update={"feedback": settings.feedback.model_copy(update={"data_dir": fresh})})
    try:
        _copy_verified(source, manifest, fresh)
        _place_keys(manifest, fresh, keys or (old / "keys" if old else None))
        _move_adapters(fresh / "registry.sqlite", Path(manifest.data_dir), target)
        restored = Restored(files=len(manifest.files))
        if old is not None and not _same_deployment(old / "keys", fresh / "keys"):
            told = f"{old} has other keys, so it is another deployment's: nothing of it is brought over"
            restored.problems.append(told)
        kin = old if not restored.problems else None
        stores = open_stores(inside, "restore")
        try:
            by = who(stores)
            _catch_up(stores, kin, restored)
            _erase_again(stores, kin, lists, replay, restored)
            if kin is not None:
                _carry_keys(stores, kin, by, restored)
            audit.open_audit(stores.engine)
            with transaction(stores.engine) as db:
                done = f"from {source.resolve()}; {restored.newer} newer events, {len(restored.erased)} erasures made again"
                audit.record(db, by, "backup.restored", manifest_digest(manifest), done + (_old_chain(kin, restored) if kin else ""))
        finally:
            stores.close()
        _swap(fresh, target, old)
    except OSError as exc:
        raise NotDurable(f"{target} could not be restored: {exc.strerror} ({exc.filename}); it is as it was") from exc
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return restored


def _refuse(manifest: Manifest, settings: Settings, target: Path, replace: bool) -> None:
    if "registry" in manifest.without and settings.registry.url is None:
        raise ConfigError(
            "the backup holds no registry: restore that database with its own tool and set registry.url", field="registry.url"
        )
    if "registry" not in manifest.without and settings.registry.url is not None:
        raise ConfigError("the backup holds a registry of its own, registry.sqlite: unset registry.url to use it", field="registry.url")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        return
    if not target.is_dir():
        raise InvalidInput(f"feedback.data_dir {target} is no folder", field="feedback.data_dir")
    if any(target.iterdir()) and not replace:
        told = f"feedback.data_dir {target} is not empty; restore with --replace, which keeps its newer events, or choose another folder"
        raise Conflict(told, field="feedback.data_dir")
    for lock in sorted((target / "log").glob("*.lock")):
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                told = f"process '{lock.stem}' works on {target}; stop it, then restore"
                raise Conflict(told, field="feedback.data_dir") from exc


def _copy_verified(source: Path, manifest: Manifest, fresh: Path) -> None:
    for name, entry in manifest.files.items():
        place = fresh / name
        if not place.resolve().is_relative_to(fresh.resolve()):
            raise InvalidInput(f"the backup names a file outside of itself: {name}", field="backup")
        try:
            found = copy_file(source / name, place)
        except FileNotFoundError as exc:
            raise InvalidInput(f"the backup is not whole: {name} is missing; use another one", field="backup") from exc
        if found != entry:
            told = f"{name} has {found.size_bytes} bytes and digest {found.sha256[:16]}, the manifest says {entry.size_bytes}"
            raise InvalidInput(f"the backup is damaged: {told} and {entry.sha256[:16]}; use another one", field="backup")


def _place_keys(manifest: Manifest, fresh: Path, keys: Path | None) -> None:
    """The keys that a backup was made without."""
    if "keys" not in manifest.without:
        return
    if keys is None or not (keys / "kek").is_file():
        raise InvalidInput("the backup was made without keys, which open what it holds: give their folder with --keys", field="keys")
    for path in sorted(keys.iterdir()):
        if path.is_file():
            copy_file(path, fresh / "keys" / path.name)


def _same_deployment(one: Path, other: Path) -> bool:
    """Whether pseudonyms and people's keys of one data folder mean something in the other."""
    return all(
        (folder / name).is_file() and (one / name).read_bytes() == (other / name).read_bytes()
        for name in ("kek", "pseudonym")
        for folder in (one, other)
    )


def _move_adapters(registry: Path, before: Path, now: Path) -> None:
    """The registry (`deploy/tables.py`) names the folders of adapters in full, also after the data folder has moved."""
    if not registry.exists() or before == now.resolve():
        return
    prefix = f"{before}/"
    try:
        with contextlib.closing(sqlite3.connect(registry)) as db, db:
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'adapters'").fetchone():
                moved = "UPDATE adapters SET path = ? || substr(path, ?) WHERE substr(path, 1, ?) = ?"
                db.execute(moved, (f"{now.resolve()}/", len(prefix) + 1, len(prefix), prefix))
    except sqlite3.Error as exc:
        raise NotDurable(f"the restored registry could not be written: {exc}") from exc


def _catch_up(stores: Stores, old: Path | None, restored: Restored) -> None:
    """Events that the backup does not have yet."""
    stores.archive.ingest(stores.logs)
    if old is not None:
        with _reading(old / "archive.sqlite", restored) as db:
            rows = db.execute("SELECT value FROM events")
            while some := rows.fetchmany(BATCH):
                restored.newer += stores.archive.keep([event for (value,) in some if (event := parse(value)) is not None])
        mark = secrets.token_hex(4)
        for number, path in enumerate(sorted((old / "log").glob("*.sqlite"))):
            # As partitions of their own, because offsets were given twice: whoever reads or sends them de-duplicates by event_id.
            copied = stores.logs.folder / f"replaced-{mark}-{number}.sqlite"
            with _reading(path, restored) as db:
                with contextlib.closing(sqlite3.connect(copied.with_suffix(".copying"))) as copy:
                    db.backup(copy)
                copied.with_suffix(".copying").rename(copied)
        restored.newer += stores.archive.ingest(stores.logs)
        stores.clock.observe(stores.logs.last_stamp())
    if stores.settings.kafka.bootstrap is not None:
        kafka = KafkaLog(stores.settings.kafka, stores.clock)
        try:
            restored.newer += stores.archive.ingest(kafka)
        finally:
            kafka.close()


def _erase_again(stores: Stores, old: Path | None, lists: Sequence[Path], replay: Replay, restored: Restored) -> None:
    """Erasures that anybody knows of and this folder has not made."""
    known = [stores.archive.erasures(), stores.subjects.erasures(), *(erasure.listed(path) for path in lists)]
    for path in {stores.settings.feedback.data_dir / "erased.jsonl", erasure.erased_file(stores.settings.feedback)}:
        known += [erasure.listed(path)] if path.exists() else []
    if old is not None:
        known += [erasure.listed(old / "erased.jsonl")] if (old / "erased.jsonl").exists() else []
        for name, query in (
            ("archive.sqlite", "SELECT subject, stamp FROM farewells WHERE kind = 'erased'"),
            ("registry.sqlite", "SELECT subject, stamp FROM erasures"),
        ):
            with _reading(old / name, restored) as db:
                known.append(dict(db.execute(query)))
    latest: dict[str, int] = {}
    for each in known:
        for subject, stamp in each.items():
            latest[subject] = max(latest.get(subject, 0), stamp)
    made = stores.subjects.erasures()
    missing = {
        subject: stamp for subject, stamp in latest.items() if stores.archive.erased(subject) < stamp or made.get(subject, 0) < stamp
    }
    replay(stores, missing)
    restored.erased = tuple(sorted(missing))


def _carry_keys(stores: Stores, old: Path, by: str, restored: Restored) -> None:
    """People's keys that were made since, without which their newer events stay closed, and API keys that were disabled since."""
    with _reading(old / "registry.sqlite", restored) as db:
        stores.subjects.adopt(db.execute("SELECT subject, generation, wrapped, created_ms, erased_ms FROM subject_keys").fetchall())
    with _reading(old / "registry.sqlite", restored) as db:
        disabled = {row[0] for row in db.execute("SELECT id FROM api_keys WHERE disabled")}
        for key in stores.api_keys.list():
            if key.id in disabled and not key.disabled:
                stores.api_keys.disable(key.id, by=by, reason="was disabled after the backup that is restored")


def _old_chain(old: Path, restored: Restored) -> str:
    """Where the audit ended that the restored one does not go on from."""
    told = ""
    with _reading(old / "registry.sqlite", restored) as db:
        for rows, digest in db.execute("SELECT rows, digest FROM audit_head"):
            told = f"; the replaced audit had {rows} records, head {digest}"
    return told


@contextlib.contextmanager
def _reading(path: Path, restored: Restored) -> Iterator[sqlite3.Connection]:
    """A database of the replaced folder, which may be why somebody restores: what it cannot give is told, not fatal."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as db:
            yield db
    except sqlite3.Error as exc:
        restored.problems.append(f"{path} cannot be read: {exc}")


def _swap(fresh: Path, target: Path, old: Path | None) -> None:
    """Put the new folder in the old one's place, then delete the old one."""
    sync_folders(fresh)
    if old is None:
        fresh.rename(target)
        sync(target.parent)
        return
    aside = target.with_name(f".{target.name}.replaced.{secrets.token_hex(4)}")
    try:
        target.rename(aside)
    except OSError as exc:
        if exc.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        told = f"feedback.data_dir {target} is a mount point and cannot be replaced; set feedback.data_dir to a folder inside of it"
        raise ConfigError(told, field="feedback.data_dir") from exc
    try:
        fresh.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(aside)
