"""A copy of a running data folder, from which `restore.py` makes it again.

    marks of erasures ─▶ archive ─▶ partitions ─▶ limits ─▶ registry ─▶ keys, snapshots, adapters, reports ─▶ list of erasures ─▶ manifest

Databases are copied by SQLite's backup API, so each copy is one moment of its file. The order makes the moments fit: the archive's read
positions are never ahead of the partitions, and every person whose words are in a partition has a key in the registry, or was erased
meanwhile, which the registry and the list say. The manifest, with every file's digest, is written last and fsynced: a
folder without one is no backup.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import sqlite3
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from feedback import audit, erasure, snapshot
from feedback.clock import wall_ms
from feedback.database import transaction
from feedback.errors import ConfigError, InvalidInput, NotDurable, NotFound
from feedback.events import SCHEMA_VERSION, Model
from feedback.files import new_file, sync, sync_folders
from feedback.stores import Stores

MANIFEST = "backup.json"
CHUNK_BYTES = 1 << 20
FOLDERS = ("adapters", "reports")
"""Copied whole; what they hold is written once and then only deleted."""
OF_A_CYCLE = ("*.json", "*.jsonl")
"""What reports are made from; labels, features and checkpoints hold what people wrote and are made again."""


class Entry(Model):
    """One file of a backup."""

    size_bytes: int
    sha256: str


class Manifest(Model):
    """What a backup holds, and what it was made from."""

    format: Literal[1] = 1
    schema_version: int
    made_ms: int
    made_by: str
    data_dir: str
    without: tuple[str, ...] = ()
    """`keys`, `registry`: what has to come from elsewhere."""
    files: dict[str, Entry]


def backup(stores: Stores, out: Path, actor: str, *, keys: bool = True, registry: bool = True) -> Manifest:
    """Copy everything that cannot be made again into an empty folder. Processes on the data folder may go on meanwhile.

    Without `keys` the folder `keys/`, which opens everything, is left out, to be kept elsewhere. Raises ConfigError for a registry that is
    no SQLite file, InvalidInput for a place that is none, NotDurable where something cannot be read or written.
    """
    data_dir = stores.settings.feedback.data_dir
    if registry and stores.engine.dialect.name != "sqlite":
        raise ConfigError(
            f"registry.url is a {stores.engine.dialect.name} database, which is not copied here: back up everything else with "
            "--without-registry and then the database with its own tool (pg_dump)",
            field="registry.url",
        )
    _refuse_place(out, data_dir)
    copy = _Copy(data_dir, out)
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy.folder("erasures")
        copy.database(stores.archive.path, "archive.sqlite")
        for path in stores.logs.partitions():
            copy.database(path, f"log/{path.name}")
        copy.database(data_dir / "limits.sqlite", "limits.sqlite")
        if registry:
            copy.database(Path(stores.engine.url.database or ""), "registry.sqlite")
        if keys:
            copy.folder("keys")
        if (data_dir / "snapshots").exists():
            with snapshot.locked(data_dir / "snapshots"):  # nobody is taken out of one meanwhile
                copy.folder("snapshots")
        for name in FOLDERS:
            copy.folder(name)
        for pattern in OF_A_CYCLE:
            copy.files("cycles", f"*/{pattern}")
        copy.file(erasure.erased_file(stores.settings.feedback), "erased.jsonl")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            made_ms=wall_ms(),
            made_by=actor,
            data_dir=str(data_dir.resolve()),
            without=(*(() if keys else ("keys",)), *(() if registry else ("registry",))),
            files=copy.entries,
        )
        sync_folders(out)
        audit.open_audit(stores.engine)
        with transaction(stores.engine) as db:
            audit.record(db, actor, "backup.made", manifest_digest(manifest)[:64], str(out.resolve()))
            _write_manifest(out, manifest)
    except OSError as exc:
        raise NotDurable(f"the backup {out} could not be written: {exc.strerror} ({exc.filename}); delete it and try again") from exc
    return manifest


def read_manifest(source: Path) -> Manifest:
    """What a backup says of itself. Raises NotFound where there is none, InvalidInput where it cannot be used."""
    try:
        manifest = Manifest.model_validate_json((source / MANIFEST).read_bytes())
    except FileNotFoundError as exc:
        raise NotFound(f"{source} is no backup: it has no {MANIFEST}, so it was not finished; use another one", field="backup") from exc
    except (OSError, ValidationError) as exc:
        raise InvalidInput(f"the manifest of {source} cannot be read: {exc}", field="backup") from exc
    if manifest.schema_version > SCHEMA_VERSION:
        told = f"{source} holds events of version {manifest.schema_version}, this code knows {SCHEMA_VERSION}"
        raise InvalidInput(f"{told}; install the newer version", field="backup")
    return manifest


def manifest_digest(manifest: Manifest) -> str:
    """Names a backup."""
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()


def copy_file(source: Path, target: Path) -> Entry:
    """Copy, fsync and hash what was written."""
    digest, size = hashlib.sha256(), 0
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with source.open("rb") as reading, new_file(target) as writing:
        while chunk := reading.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            writing.write(chunk)
    return Entry(size_bytes=size, sha256=digest.hexdigest())


class _Copy:
    """Files of a data folder on their way into a backup."""

    def __init__(self, data_dir: Path, out: Path) -> None:
        self._data_dir, self._out = data_dir, out
        self.entries: dict[str, Entry] = {}

    def database(self, path: Path, name: str) -> None:
        """One moment of a SQLite file that others write; checked, because a copy of a torn file would be found out too late."""
        if not path.exists():
            return
        target = self._out / f"{name}.copying"
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            reading = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30.0)
            with contextlib.closing(reading) as source, contextlib.closing(sqlite3.connect(target)) as copy:
                source.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a write-ahead log beside it
                problem = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.Error as exc:
            raise NotDurable(f"{path} could not be copied: {exc}") from exc
        if problem != "ok":
            raise NotDurable(f"{path} is damaged ({problem}), and so would be its copy; restore the backup before this one")
        self.entries[name] = copy_file(target, self._out / name)
        target.unlink()

    def folder(self, name: str) -> None:
        self.files(name, "**/*")

    def files(self, folder: str, pattern: str) -> None:
        """What matches now; temporary files and what is deleted meanwhile are left out."""
        for path in sorted((self._data_dir / folder).glob(pattern)):
            name = path.relative_to(self._data_dir)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                with contextlib.suppress(FileNotFoundError):
                    self.file(path, str(name))

    def file(self, path: Path, name: str) -> None:
        if path.exists():
            self.entries[name] = copy_file(path, self._out / name)


def _refuse_place(out: Path, data_dir: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"the backup's folder {out} is not empty; name one that is, or that does not exist", field="backup")
    if out.resolve().is_relative_to(data_dir.resolve()):
        raise InvalidInput(f"the backup's folder {out} lies in the data folder itself; choose a place outside of it", field="backup")


def _write_manifest(out: Path, manifest: Manifest) -> None:
    temporary = out / f".{MANIFEST}.{secrets.token_hex(4)}"
    with new_file(temporary) as file:
        file.write(manifest.model_dump_json(indent=1).encode())
    temporary.rename(out / MANIFEST)
    sync(out)
