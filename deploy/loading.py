"""From a folder that nobody trusts to the copy that the model server reads: what was hashed is what is loaded.

    <adapters>/<id>/  ──copied through descriptors──▶  <root>/<id>-<8 hex>/  ──judged──▶  the model server
      may change at any moment                           read-only, nobody else may write, never changed again

The server reads a folder again whenever it made room for others, so the copy stays for as long as its name may be asked for. A copy that
turns out changed is never mended: the server's cache is keyed by path, so the adapter is taken again into a new folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

import structlog
from pydantic import ValidationError

from deploy.lora import check_config, check_tensors, expected_shapes, largest_file
from deploy.manifest import CONFIG, MANIFEST, WEIGHTS, BaseModelDigests, Manifest, base_config, base_digests
from deploy.signing import Signatures, signature_of
from deploy.tensors import HEADER_BYTES, check_numbers, read_header, refuse, strict_json
from feedback.errors import ConfigError, InvalidInput, NotDurable, NotFound

FILES = (MANIFEST, CONFIG, WEIGHTS)
MANIFEST_BYTES, CONFIG_BYTES = 1 << 20, 1 << 16
MOST_FILES = 64
"""Of a folder's listing: more are not even looked at."""
ID = re.compile(r"[0-9a-f]{64}")
COPY = re.compile(r"[0-9a-f]{64}-[0-9a-f]{8}")
TAKING = ".taking-"
OTHERS_WRITE = 0o022
TICK_NS = 12_000_000
"""A file system's clock ticks every 1 to 10 ms."""
SETTLE_LOOKS = 500
"""At 2 ms each."""

FOREIGN = (
    (
        re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|npy|npz|h5|msgpack|joblib|gguf)", re.I),
        "weights in a format that may run code",
    ),
    (re.compile(r".*\.(py|pyc|so|sh|dll)", re.I), "code"),
    (re.compile(r"(.*\.jinja2?|chat_template.*)", re.I), "a chat template, which belongs to the base model"),
    (re.compile(r"(tokenizer|vocab|merges|special_tokens|added_tokens|spiece).*", re.I), "a tokenizer, which belongs to the base model"),
    (re.compile(r"(config|generation_config|preprocessor_config)\.json", re.I), "a model's configuration, which belongs to the base model"),
)
"""Files that other programs put beside an adapter, and what they would be to a reader."""

Stamp = tuple[tuple[int, ...], ...]
"""Who the folder and its files are and when they last changed, as the file system says."""

log = structlog.get_logger()


class Intake:
    """Takes adapters for one base model into `root`. One process at a time has a root; its methods block and belong in a thread."""

    def __init__(
        self,
        root: Path,
        base: BaseModelDigests,
        config: Mapping[str, object],
        max_rank: int,
        signatures: Signatures | None = None,
    ) -> None:
        """`base` and `config` are the base model's; `max_rank` is the server's; with `signatures` unsigned ones are refused."""
        self.root = root.absolute()
        self._base, self._config, self._max_rank, self._signatures = base, config, max_rank, signatures
        self._stamps: dict[Path, Stamp] = {}

    @classmethod
    def of(cls, policy: Path, root: Path, max_rank: int, signatures: Signatures | None = None) -> Intake:
        """For the base model in this folder, which is hashed. Raises InvalidInput where it is none."""
        return cls(root, base_digests(policy), base_config(policy), max_rank, signatures)

    def take(self, source: Path) -> Path:
        """The private folder of the adapter that lies in `source`, a folder named by its id, once everything in it was checked.

        A sound copy from before is checked again and kept; it needs no source. Raises InvalidInput, NotFound or NotDurable with one line
        that names the file, what is in it and what would pass.
        """
        adapter_id = source.name
        if not ID.fullmatch(adapter_id):
            refuse(f"{str(source)[-100:]!r} is not named by an adapter's id, 64 hex digits")
        self._own_root()
        for folder in self.kept(adapter_id):
            try:
                self._judge(folder, adapter_id)
                return folder
            except (InvalidInput, NotFound) as exc:
                log.warning("a private copy of an adapter was changed; it is taken again", problem=exc.message)
        return self._copy(source, adapter_id)

    def unchanged(self, folder: Path) -> bool:
        """Whether a private folder is still the one that was checked: the same files, never written, renamed or relabelled since."""
        return folder in self._stamps and self._stamps[folder] == _stamp(folder)

    def kept(self, adapter_id: str = "") -> list[Path]:
        """Private folders, of this adapter or of all."""
        if not self.root.is_dir():
            return []
        return sorted(path for path in self.root.iterdir() if COPY.fullmatch(path.name) and path.name.startswith(adapter_id))

    def drop(self, folder: Path) -> None:
        """Delete a private folder that no server reads any more, and its signature."""
        self._stamps.pop(folder, None)
        _delete(folder)
        _delete(signature_of(folder))

    def _own_root(self) -> None:
        """Make the root, and refuse one in which others could exchange what was checked."""
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o755)
            found = self.root.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & OTHERS_WRITE:
                told = f"{self.root} belongs to user {found.st_uid} with mode {stat.filemode(found.st_mode)}"
                raise ConfigError(f"{told}; it must be a folder of user {os.geteuid()} that nobody else may write")
            for above in self.root.parents:
                mode = above.stat().st_mode
                if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                    raise ConfigError(f"{above} may be written by everybody, so anybody could exchange {self.root}; chmod o-w {above}")
            for left in self.root.glob(f"{TAKING}*"):
                _delete(left)  # of a run that was killed
        except OSError as exc:
            raise NotDurable(f"{self.root} cannot take adapters: {exc.strerror}", retry_after_s=5) from exc

    def _copy(self, source: Path, adapter_id: str) -> Path:
        what, number = f"adapter {adapter_id[:16]}", secrets.token_hex(4)
        staging, target = self.root / f"{TAKING}{number}", self.root / f"{adapter_id}-{number}"
        limits = {MANIFEST: MANIFEST_BYTES, CONFIG: CONFIG_BYTES, WEIGHTS: largest_file(self._config, self._max_rank) + HEADER_BYTES + 8}
        try:
            staging.mkdir(mode=0o700)
            with _opened_folder(source, what) as descriptor:
                _only_files(descriptor, what)
                for name, limit in limits.items():
                    with _opened(descriptor, name, what) as file:
                        _copy_file(file, staging / name, limit, f"{what}: {name}")
            if self._signatures is not None:
                self._signatures.copy(source, target, what)
            # Its owner may write, or `rm -rf` of the data folder would need more than that.
            staging.chmod(0o755)
            staging.rename(target)
            # Under its own name: what is judged, and stamped, is what the server will open.
            self._judge(target, adapter_id)
            return target
        except OSError as exc:
            raise NotDurable(f"{what} could not be copied from {source}: {exc.strerror}", retry_after_s=5) from exc
        finally:
            _delete(staging)
            if target not in self._stamps:
                self.drop(target)

    def _judge(self, folder: Path, adapter_id: str) -> None:
        """Every check, on the private copy. Its stamp is taken before and compared after: nothing changed while it was read."""
        before = _settled(folder)
        what = f"adapter {adapter_id[:16]}"
        with _opened_folder(folder, what) as descriptor:
            _only_files(descriptor, what)
            manifest = self._manifest(descriptor, adapter_id, what)
            with _opened(descriptor, CONFIG, what) as file:
                raw = _hashed(file, CONFIG, manifest, what, keep=True)
            peft = strict_json(raw, f"{what}: {CONFIG}")
            if peft != manifest.peft:
                refuse(f"{what}: {CONFIG} is not the peft of its {MANIFEST}")
            check_config(peft, self._max_rank, what)
            with _opened(descriptor, WEIGHTS, what) as file:
                _hashed(file, WEIGHTS, manifest, what)
                entries = read_header(file, os.fstat(file.fileno()).st_size, f"{what}: {WEIGHTS}")
                check_tensors(entries, expected_shapes(self._config, peft), what)
                check_numbers(file, entries, f"{what}: {WEIGHTS}")
        if self._signatures is not None:
            self._signatures.check(folder, what)
        if _stamp(folder) != before or not before:
            refuse(f"{what}: {folder} changed while it was checked")
        self._stamps[folder] = before

    def _manifest(self, descriptor: int, adapter_id: str, what: str) -> Manifest:
        with _opened(descriptor, MANIFEST, what) as file:
            raw = file.read(MANIFEST_BYTES + 1)
        if len(raw) > MANIFEST_BYTES:
            refuse(f"{what}: {MANIFEST} has more than {MANIFEST_BYTES} bytes, the most that is read")
        strict_json(raw, f"{what}: {MANIFEST}")
        try:
            manifest = Manifest.model_validate_json(raw)
            same = manifest.canonical() == raw
        except (ValidationError, UnicodeEncodeError) as exc:  # a lone surrogate has no bytes
            problem = exc.errors()[0] if isinstance(exc, ValidationError) else {"loc": ("text",), "msg": "no UTF-8"}
            refuse(f"{what}: {MANIFEST} is damaged: {'.'.join(map(str, problem['loc']))[:80]}: {problem['msg']}")
        if hashlib.sha256(raw).hexdigest() != adapter_id or not same:
            refuse(f"{what}: its {MANIFEST} is that of adapter {hashlib.sha256(raw).hexdigest()[:16]}")
        if manifest.files.keys() != {CONFIG, WEIGHTS}:
            refuse(f"{what}: {MANIFEST} names the files {sorted(manifest.files)!s:.100}, {CONFIG} and {WEIGHTS} were expected")
        if not 0 < manifest.temperature <= 2:
            refuse(f"{what}: {MANIFEST} says temperature = {manifest.temperature:g}, above 0 and at most 2 is served")
        for name, ours in self._base.model_dump().items():
            if (theirs := getattr(manifest.base, name)) != ours:
                refuse(f"{what} is for another base: its {name} is {str(theirs)[:16]!r}, policy.base has {ours[:16]!r}", f"base.{name}")
        return manifest


@contextlib.contextmanager
def _opened_folder(path: Path, what: str) -> Iterator[int]:
    """A descriptor: whatever happens to the path, the files looked at are those of one folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        _no_entry(exc, f"{what}: {path}", "a folder")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _opened(folder: int, name: str, what: str) -> Iterator[BufferedReader]:
    """A plain file of this very folder. A link is not followed, a pipe does not block."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as exc:
        _no_entry(exc, f"{what}: {name}", "a plain file")
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        refuse(f"{what}: {name} is {stat.filemode(mode)!r}, a plain file was expected")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _no_entry(exc: OSError, what: str, expected: str) -> NoReturn:
    if exc.errno == errno.ENOENT:
        raise NotFound(f"{what} is not there, so it is no adapter") from exc
    if exc.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
        raise InvalidInput(f"{what} is a link or something else, {expected} was expected; links are not followed", field="adapter") from exc
    raise exc


def _only_files(folder: int, what: str) -> None:
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > MOST_FILES:
                refuse(f"{what} holds more than {MOST_FILES} files, {', '.join(FILES)} were expected")
    for name in sorted(set(names) - set(FILES)):
        kind = next((told for pattern, told in FOREIGN if pattern.fullmatch(name)), "no part of an adapter")
        refuse(f"{what} holds {name[:80]!r}, {kind}; only {', '.join(FILES)} may be there")


def _copy_file(file: BufferedReader, target: Path, limit: int, what: str) -> None:
    """Never more than the limit, however the file grows meanwhile."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        refuse(f"{what} has {size} bytes, at most {limit} fit this base model")
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444), "wb") as copy:
        left = limit + 1
        while left and (raw := file.read(min(1 << 20, left))):
            copy.write(raw)
            left -= len(raw)
        os.fchmod(copy.fileno(), 0o444)
    if not left:
        refuse(f"{what} grew beyond {limit} bytes while it was copied")


def _hashed(file: BufferedReader, name: str, manifest: Manifest, what: str, *, keep: bool = False) -> bytes:
    """Raises InvalidInput where the bytes are not those of the manifest; they are returned if asked for."""
    raw = file.read() if keep else b""
    found = hashlib.sha256(raw).hexdigest() if keep else hashlib.file_digest(file, "sha256").hexdigest()
    if found != manifest.files[name]:
        refuse(f"{what}: {name} has SHA-256 {found[:16]}…, its manifest says {str(manifest.files[name])[:16]}…")
    return raw


def _stamp(folder: Path) -> Stamp:
    """Empty where something is missing or a link. A change of content, name, owner or mode also changes ctime, which nobody can set."""
    found = []
    try:
        for path in (folder, *(folder / name for name in FILES)):
            told = path.lstat()
            if stat.S_ISLNK(told.st_mode) or told.st_uid != os.geteuid() or stat.S_IMODE(told.st_mode) & OTHERS_WRITE:
                return ()
            found.append((told.st_dev, told.st_ino, told.st_mode, told.st_nlink, told.st_size, told.st_mtime_ns, told.st_ctime_ns))
    except OSError:
        return ()
    return tuple(found)


def _settled(folder: Path) -> Stamp:
    """The stamp, once the file system's clock has ticked since the last change: any later one then shows."""
    for _ in range(SETTLE_LOOKS):
        stamp = _stamp(folder)
        if all(ctime + TICK_NS < time.time_ns() for *_, ctime in stamp):
            return stamp
        time.sleep(0.002)
    refuse(f"{folder} was changed in the future or goes on changing; set this machine's clock right")


def _delete(folder: Path) -> None:
    """A folder, a file or a link, if it is there; what cannot go is told and tried again by whoever calls again."""
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)
    except OSError as exc:
        log.warning("a private copy of an adapter could not be deleted", folder=str(folder), problem=str(exc))
