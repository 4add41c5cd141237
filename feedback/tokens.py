"""Feedback tokens: whoever gets an answer may say what they think of it, and nobody else.

A Fernet token (AES-CBC and HMAC-SHA-256, by `cryptography`) around `Claims`: opaque, so it cannot reveal which side is which, and
checked without a look-up, so a rating is accepted by any gateway while its answer still streams.

The keys lie in `keys/token.keys`, one a line: the first one mints, all of them open. `rotate` puts a new one first. A gateway mints with
it within a second; one that gets a token which it cannot open looks at the file before it refuses, so it never is too late.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import structlog
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import ValidationError
from sqlalchemy import Engine

from feedback import audit
from feedback.database import transaction
from feedback.errors import ConfigError, Gone, NotAuthenticated, NotDurable
from feedback.events import Model, Source
from feedback.files import new_file, sync

MAX_CHARS = 4096
LOOK_EVERY_S = 1.0
"""How often the key file's time is looked at; how long a key that was dropped still opens here."""

log = structlog.get_logger()

Action = Literal["rating", "choice", "comment", "correction", "signal", "clear", "read"]


class Claims(Model):
    """What a token allows, on what, in whose name, until when."""

    tenant: str = "default"
    target: str
    """Id of an interaction or a comparison."""
    target_kind: Literal["interaction", "comparison"]
    interactions: tuple[str, ...]
    """The interaction itself, or both of the comparison, side a first."""
    subject: str
    actions: tuple[Action, ...]
    expires: int
    """Unix seconds."""
    source: Source = "person"
    cohorts: tuple[str, ...] = ()


class Tokens:
    """Mints with the first key, accepts all of them, so that keys rotate. `keys` is the file that holds them, or the keys themselves."""

    def __init__(self, keys: Path | Sequence[bytes], now: Callable[[], float] = time.time) -> None:
        self._path = keys if isinstance(keys, Path) else None
        self._seen = (0, 0)
        self._look_at = 0.0
        self._now = now
        if isinstance(keys, Path):
            self._reread()
        else:
            self._fernet = _fernet(keys)

    def mint(self, claims: Claims) -> str:
        self._look()
        return self._fernet.encrypt(claims.model_dump_json(exclude_defaults=True).encode()).decode()

    def check(self, token: str) -> Claims:
        """The claims of a token that we minted. Raises NotAuthenticated for any other string, Gone for one that has expired."""
        if len(token) > MAX_CHARS:
            raise NotAuthenticated(f"the feedback token has {len(token)} characters, the limit is {MAX_CHARS}")
        self._look()
        claims = self._open(token)
        if claims is None and self._changed():
            claims = self._open(token)  # another gateway may have minted it with a key that is newer than our last look
        if claims is None:
            raise NotAuthenticated("the feedback token is not one that this service gave out")
        if self._now() >= claims.expires:
            expired = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(claims.expires))
            raise Gone(f"the feedback token expired at {expired}; feedback.token_expiry_s says how long one lasts")
        return claims

    def _open(self, token: str) -> Claims | None:
        try:
            raw = token.encode("ascii")
            # base64 decoders skip foreign bytes and ignore spare bits, so other strings would decode to the same token.
            if base64.urlsafe_b64encode(base64.urlsafe_b64decode(raw)) != raw:
                return None
            return Claims.model_validate_json(self._fernet.decrypt(raw))
        except (InvalidToken, UnicodeEncodeError, binascii.Error, ValidationError):
            return None

    def _look(self) -> None:
        """Take over a changed file, at most once every LOOK_EVERY_S."""
        if self._path is not None and time.monotonic() >= self._look_at:
            self._changed()

    def _changed(self) -> bool:
        """Whether the file was changed since it was last read, and was read again. A file that cannot be used changes nothing."""
        if self._path is None:
            return False
        self._look_at = time.monotonic() + LOOK_EVERY_S
        try:
            there = self._path.stat()
            if (there.st_mtime_ns, there.st_ino) == self._seen:
                return False
            self._reread()
        except (OSError, ConfigError) as exc:
            if self._seen != (0, 0):  # told once
                log.warning("token keys not read again; those of before stay in use", reason=str(exc))
                self._seen = (0, 0)
            return False
        return True

    def _reread(self) -> None:
        """Raises OSError, or ConfigError where the file holds no keys."""
        assert self._path is not None
        there = self._path.stat()
        self._fernet = _fernet(self._path.read_bytes().split())
        self._seen = (there.st_mtime_ns, there.st_ino)


def _fernet(keys: Sequence[bytes]) -> MultiFernet:
    try:
        return MultiFernet([Fernet(key) for key in keys])
    except (ValueError, binascii.Error) as exc:
        raise ConfigError("keys/token.keys must hold Fernet keys (32 bytes in url-safe base64), one a line", field="keys") from exc


def rotate(path: Path, engine: Engine, by: str) -> None:
    """A new first key; the one that was first still opens what it minted, older ones do not. Raises NotDurable with nothing changed.

    The audit row is committed before the file is replaced: a kill in between leaves a row too many, never a rotation without one.
    """
    new = Fernet.generate_key()
    temporary = path.with_name(f".{path.name}.new")
    try:
        with path.with_name("token.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two rotations at once, the second keeps the first one's key
            kept = path.read_bytes().split()[:1]
            temporary.unlink(missing_ok=True)  # of a rotation that was killed
            with new_file(temporary) as file:
                file.write(b"\n".join([new, *kept]) + b"\n")
            with transaction(engine) as db:
                fingerprint = hashlib.sha256(new).hexdigest()[:16]
                audit.record(db, by, "token_keys.rotated", fingerprint, "a new key mints; the one before still opens")
            temporary.replace(path)
            sync(path.parent)
    except OSError as exc:
        raise NotDurable(f"{path} could not be replaced: {exc.strerror}", retry_after_s=2) from exc
