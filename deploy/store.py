"""Where adapters lie for all machines: any place that fsspec can write, each adapter in a folder named by its digest.

Copied up when an adapter is registered, manifest last: no manifest, no adapter. Who needs it fetches it by digest and believes nothing
that does not hash to it. A store in the data folder is where the trainer writes anyway; then nothing is copied.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import fsspec
import structlog
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from deploy.manifest import MANIFEST, Manifest, read_manifest, verify
from feedback.errors import ConfigError, Conflict, NotDurable, NotFound
from feedback.files import sync

CHUNK_BYTES = 1 << 20
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 34
"""More than the largest adapter has, and less than fills a disk: a store may send what it likes."""
RETRY_S = 5.0
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
"""A file's name that leads nowhere else on any system."""

log = structlog.get_logger()


class AdapterStore:
    """Thread-safe. Raises NotDurable where the place does not answer."""

    def __init__(self, url: str, cache: Path) -> None:
        """`cache` takes what is fetched. Raises ConfigError where the URL cannot be used."""
        try:
            self._fs, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError, OSError) as exc:
            raise ConfigError(f"deploy.store is {url!r}, which cannot be used: {exc}", field="deploy.store") from exc
        self._root = root.rstrip("/")
        self._url, self._cache = url, cache
        self._lock = threading.Lock()
        self._due: dict[str, float] = {}
        """When an adapter may be fetched again, by the monotonic clock; never while it is on its way."""
        self._local = isinstance(self._fs, LocalFileSystem)

    def put(self, path: Path) -> None:
        """Copy an adapter's folder up. What is there already stays. Raises Conflict where the folder is damaged or changes meanwhile."""
        adapter_id = verify(path)
        target = f"{self._root}/{adapter_id}"
        if self._local and path.resolve() == Path(target).resolve():
            return
        manifest = read_manifest(path)
        with self._reached():
            if self._fs.exists(f"{target}/{MANIFEST}"):
                return
            self._fs.makedirs(target, exist_ok=True)
            for name, digest in manifest.files.items():
                with (path / name).open("rb") as source:
                    self._write(source, f"{target}/{name}", digest)
            self._write(io.BytesIO(manifest.canonical()), f"{target}/{MANIFEST}", adapter_id)

    def fetch(self, adapter_id: str) -> Path:
        """The adapter's folder on this machine. Raises NotFound where the store has none, Conflict where it is not what the digest says."""
        target = self._cache / adapter_id
        if (target / MANIFEST).exists():
            return target
        source = f"{self._root}/{adapter_id}"
        with self._reached():
            self._fs.invalidate_cache()  # what was not there a moment ago may have been registered since
            with self._fs.open(f"{source}/{MANIFEST}", "rb") as file:
                manifest = _manifest(file.read(MAX_MANIFEST_BYTES + 1), adapter_id)
            self._cache.mkdir(parents=True, exist_ok=True)
            staging = self._cache / f".fetch-{uuid.uuid4().hex}"
            staging.mkdir()
            try:
                for name, digest in manifest.files.items():
                    with self._fs.open(f"{source}/{name}", "rb") as file, (staging / name).open("xb") as copy:
                        _copy(file, copy, digest, f"{self._url}: {name} of adapter {adapter_id[:16]}")
                (staging / MANIFEST).write_bytes(manifest.canonical())
                for item in staging.iterdir():
                    item.chmod(0o444)
                    sync(item)
                sync(staging)
                with contextlib.suppress(OSError):  # it is there already: another process fetched it meanwhile
                    staging.rename(target)
                sync(self._cache)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return target

    def folder(self, adapter_id: str, made: Path) -> Path | None:
        """Where this machine has it: `made`, where it was registered from, or where it was fetched to. Else None, and it is on its way: a
        replica goes on serving what it holds meanwhile. What cannot be fetched is logged and tried again."""
        for folder in (made, self._cache / adapter_id):
            if (folder / MANIFEST).exists():
                return folder
        with self._lock:
            if time.monotonic() >= self._due.get(adapter_id, 0.0):
                self._due[adapter_id] = float("inf")
                threading.Thread(target=self._fetch_later, args=(adapter_id,), daemon=True).start()
        return None

    def _fetch_later(self, adapter_id: str) -> None:
        try:
            self.fetch(adapter_id)
        except Exception as exc:  # noqa: BLE001  the thread's edge: whoever reads the log notices, and it is tried again
            log.error("adapter not fetched", adapter=adapter_id[:16], problem=str(exc))
        with self._lock:
            self._due[adapter_id] = time.monotonic() + RETRY_S

    def _write(self, source: IO[bytes], target: str, digest: str) -> None:
        """Under its name only once it is whole; an object store's files are by themselves."""
        name = f"{target}.{uuid.uuid4().hex}.part" if self._local else target
        try:
            with self._fs.open(name, "wb") as copy:
                _copy(source, copy, digest, f"{target.rsplit('/', 1)[-1]} of {target.split('/')[-2][:16]}")
            if self._local:
                sync(Path(name))
                Path(name).rename(target)
                sync(Path(target).parent)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.rm_file(name)
            raise

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as exc:
            raise NotFound(f"the store {self._url} has no such adapter, or not all of it: {exc}", field="adapter") from exc
        except OSError as exc:
            raise NotDurable(f"the store {self._url} does not answer: {exc}; deploy.store names it", retry_after_s=2) from exc


def _manifest(content: bytes, adapter_id: str) -> Manifest:
    """Whose digest is the adapter's id, so that all it says is what was registered."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as exc:
        raise Conflict(f"the manifest of adapter {adapter_id[:16]} in the store is damaged: {exc.errors()[0]['msg']}") from exc
    if manifest.adapter_id != adapter_id:
        raise Conflict(f"the store holds adapter {manifest.adapter_id[:16]} under the name {adapter_id[:16]}")
    if foreign := [name for name in manifest.files if not PLAIN.fullmatch(name) or name == MANIFEST]:
        raise Conflict(f"adapter {adapter_id[:16]} names the file {foreign[0][:100]!r}, which is no plain file name")
    return manifest


def _copy(source: IO[bytes], target: IO[bytes], digest: str, what: str) -> None:
    found, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        found.update(chunk)
        size += len(chunk)
        if size > MAX_FILE_BYTES:
            raise Conflict(f"{what} has more than {MAX_FILE_BYTES} bytes, the most that is copied")
        target.write(chunk)
    if found.hexdigest() != digest:
        raise Conflict(f"{what} has SHA-256 {found.hexdigest()[:16]}…, its manifest says {digest[:16]}…")
