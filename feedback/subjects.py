"""People: their pseudonyms, and the keys under which their words are stored, so that destroying a key erases the words everywhere.

Each subject has a random 256-bit key, wrapped by the deployment's key-encryption key (AES-GCM) in the table `subject_keys`. Erasing
destroys the key; somebody who returns gets a new generation of it, and what was sealed before stays closed. What else an erasure does
is in `erasure.py`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import BaseModel
from sqlalchemy import BigInteger, Column, Engine, Integer, LargeBinary, MetaData, String, Table, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from feedback import audit
from feedback.clock import wall_ms
from feedback.database import create_tables, insert_missing, transaction, truncate_wal
from feedback.errors import ConfigError, Gone, InvalidInput, NotDurable
from feedback.events import Sealed
from feedback.ids import Ids

metadata = MetaData()
subject_keys = Table(
    "subject_keys",
    metadata,
    Column("subject", String(64), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("wrapped", LargeBinary, nullable=True),
    Column("created_ms", BigInteger, nullable=False),
    Column("erased_ms", BigInteger, nullable=True),
)
erasures = Table(
    "erasures",
    metadata,
    Column("subject", String(64), primary_key=True),
    Column("stamp", BigInteger, nullable=False),
)
"""Up to which stamp each subject's keys are destroyed; changed in the transaction that destroys them."""

NONCE_BYTES = 12
GENERATION_BYTES = 4
CACHE_SUBJECTS = 10_000
CACHE_S = 10.0
"""How long this process may go on with a key that another process has destroyed."""

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class _Key:
    generation: int
    secret: bytes
    read_at: float


@dataclass(eq=False)
class _Insert:
    """A new key on its way into the database."""

    row: dict[str, Any]
    tried: bool = False
    failed: SQLAlchemyError | None = None


class Subjects:
    """Thread-safe. Everything here is synchronous: a known key costs microseconds, a new one a database commit."""

    def __init__(self, engine: Engine, kek: bytes, pseudonym_key: bytes) -> None:
        if len(kek) != 32:
            raise ConfigError(f"the key-encryption key has {len(kek)} bytes, it must have 32", field="keys/kek")
        create_tables(engine, metadata)
        self.ids = Ids(pseudonym_key)
        self._engine = engine
        self._kek = AESGCM(kek)
        self._cache: OrderedDict[str, _Key] = OrderedDict()
        self._lock = threading.Lock()
        self._new: list[_Insert] = []
        self._committing = threading.Lock()

    def pseudonym(self, tenant: str, external_id: str) -> str:
        """What is stored instead of a person's id."""
        return self.ids.pseudonym(tenant, external_id)

    def seal(self, subjects: tuple[str, ...], text: BaseModel, *, create: bool = True) -> Sealed:
        """Encrypt under every subject's key, the first one outermost. Makes a key for a new or returning subject, unless `create` is off.

        The box is, for each layer, generation (4 bytes), nonce (12 bytes), AES-GCM ciphertext.
        Raises NotDurable where a key cannot be stored, and Gone where there is none and none may be made: the subject was erased.
        """
        box = text.model_dump_json().encode()
        for subject in reversed(subjects):
            key = self._current_key(subject, create)
            nonce = os.urandom(NONCE_BYTES)
            generation = key.generation.to_bytes(GENERATION_BYTES, "big")
            box = generation + nonce + AESGCM(key.secret).encrypt(nonce, box, _bound(subject, key.generation))
        return Sealed(subjects=subjects, box=base64.b64encode(box).decode())

    def open(self, sealed: Sealed, cls: type[T]) -> T:
        """What was sealed. Raises Gone after one of its subjects was erased, InvalidInput where the box was tampered with."""
        try:
            box = base64.b64decode(sealed.box, validate=True)
            for subject in sealed.subjects:
                generation = int.from_bytes(box[:GENERATION_BYTES], "big")
                nonce, rest = box[GENERATION_BYTES : GENERATION_BYTES + NONCE_BYTES], box[GENERATION_BYTES + NONCE_BYTES :]
                box = AESGCM(self._secret(subject, generation)).decrypt(nonce, rest, _bound(subject, generation))
        except (InvalidTag, binascii.Error, ValueError) as exc:
            raise InvalidInput("a sealed text was changed or belongs to another deployment", field="sealed") from exc
        return cls.model_validate_json(box)

    def leaf_key(self, subject: str) -> bytes:
        """The key of this subject's leaves in snapshot digests; it goes with the subject's key. Raises Gone after that."""
        return hmac.new(self._current_key(subject, create=False).secret, b"plaudit snapshot leaf", hashlib.sha256).digest()

    def erase(self, subject: str, stamp: int = 0, *, by: str | None = None, reason: str = "") -> int:
        """Destroy the subject's keys, because of the erasure with this stamp; how many there were. What is sealed under them can never
        be read again. Audited as the action of `by`, in the same transaction. An erasure whose keys are destroyed already is left alone,
        so that it cannot take the keys of somebody who has returned since."""
        audit.open_audit(self._engine)
        with transaction(self._engine) as db:
            done = db.execute(select(erasures.c.stamp).where(erasures.c.subject == subject)).scalar()
            if stamp and done is not None and done >= stamp:
                return 0
            destroyed = db.execute(
                update(subject_keys)
                .where(subject_keys.c.subject == subject, subject_keys.c.wrapped.is_not(None))
                .values(wrapped=None, erased_ms=wall_ms())
            ).rowcount
            if stamp and done is None:
                db.execute(insert(erasures).values(subject=subject, stamp=stamp))
            elif stamp:
                db.execute(update(erasures).where(erasures.c.subject == subject).values(stamp=stamp))
            if by is not None:
                audit.record(db, by, "subject.erased", subject, reason)
        self.forget(subject)
        self.scrub()
        return destroyed

    def scrub(self) -> None:
        """The bytes of a destroyed key would otherwise survive in the write-ahead log until the next checkpoint. Raises NotDurable."""
        if self._engine.dialect.name == "sqlite":
            try:
                held = self._engine.raw_connection()
            except sqlite3.Error as exc:
                raise NotDurable(f"the registry's database cannot be opened: {exc}", retry_after_s=2) from exc
            try:
                truncate_wal(cast(sqlite3.Connection, held.driver_connection), "the registry's database")
            finally:
                held.close()

    def alive(self, subject: str) -> bool:
        """Whether there is a key of this subject that is not destroyed."""
        with transaction(self._engine) as db:
            keys = select(func.count()).where(subject_keys.c.subject == subject, subject_keys.c.wrapped.is_not(None))
            return bool(db.execute(keys).scalar_one())

    def known(self, subject: str) -> bool:
        """Whether there ever was a key of this subject."""
        with transaction(self._engine) as db:
            return bool(db.execute(select(func.count()).where(subject_keys.c.subject == subject)).scalar_one())

    def erased(self, subject: str) -> int:
        """The stamp of the last erasure whose keys are destroyed, 0 for none."""
        with transaction(self._engine) as db:
            return int(db.execute(select(erasures.c.stamp).where(erasures.c.subject == subject)).scalar() or 0)

    def erasures(self) -> dict[str, int]:
        """The stamp of every subject's last erasure whose keys are destroyed."""
        with transaction(self._engine) as db:
            return {row.subject: row.stamp for row in db.execute(select(erasures.c.subject, erasures.c.stamp))}

    def adopt(self, rows: Sequence[tuple[str, int, bytes | None, int, int | None]]) -> int:
        """Add keys (subject, generation, wrapped, created_ms, erased_ms) of another copy of this database that are missing here; how many.
        One that is destroyed on either side stays so."""
        with transaction(self._engine) as db:
            here = {(row.subject, row.generation) for row in db.execute(select(subject_keys.c.subject, subject_keys.c.generation))}
            names = ("subject", "generation", "wrapped", "created_ms", "erased_ms")
            new = [dict(zip(names, row, strict=True)) for row in rows if (row[0], row[1]) not in here]
            if new:
                db.execute(insert(subject_keys), new)
            return len(new)

    def forget(self, subject: str) -> None:
        """Drop the subject's key from this process's cache, as when another process has erased it."""
        with self._lock:
            self._cache.pop(subject, None)

    def _current_key(self, subject: str, create: bool) -> _Key:
        with self._lock:
            key = self._cache.get(subject)
        if key is not None and time.monotonic() - key.read_at < CACHE_S:
            return key
        try:
            key = self._read_or_create(subject, create)
        except SQLAlchemyError as exc:
            raise NotDurable(f"a subject's key could not be stored: {exc.__cause__ or exc}", retry_after_s=2) from exc
        with self._lock:
            self._cache[subject] = key
            self._cache.move_to_end(subject)
            if len(self._cache) > CACHE_SUBJECTS:
                self._cache.popitem(last=False)
        return key

    def _read_or_create(self, subject: str, create: bool) -> _Key:
        newest = (
            select(subject_keys.c.generation, subject_keys.c.wrapped)
            .where(subject_keys.c.subject == subject)
            .order_by(subject_keys.c.generation.desc())
            .limit(1)
        )
        with self._engine.connect() as db:
            row = db.execute(newest).first()
        if row is None or row.wrapped is None:
            if not create:
                raise Gone("this person was erased, and what belongs to what they said before goes with it")
            generation = 1 if row is None else row.generation + 1
            wrapped = self._wrap(subject, generation, os.urandom(32))
            self._insert({"subject": subject, "generation": generation, "wrapped": wrapped, "created_ms": wall_ms()})
            with self._engine.connect() as db:
                row = db.execute(newest).one()  # another process may have been first: then it is that one's key
        return _Key(row.generation, self._unwrap(subject, row.generation, row.wrapped), time.monotonic())

    def _insert(self, row: dict[str, Any]) -> None:
        """Commit a new key. Those that come while one is being committed share the next commit: a crowd of new people costs few fsyncs,
        and the database's lock is asked for once by a process, not by each of its threads. Raises SQLAlchemyError."""
        mine = _Insert(row)
        with self._lock:
            self._new.append(mine)
        with self._committing:
            if not mine.tried:
                with self._lock:
                    together, self._new = self._new, []
                self._commit(together)
        if mine.failed is not None:
            raise mine.failed

    def _commit(self, together: Sequence[_Insert]) -> None:
        for each in together:
            each.tried = True
        try:
            with self._engine.begin() as db:
                db.execute(insert_missing(self._engine, subject_keys), [each.row for each in together])
        except SQLAlchemyError as exc:
            for each in together:
                each.failed = exc

    def _secret(self, subject: str, generation: int) -> bytes:
        with self._lock:
            key = self._cache.get(subject)
        if key is not None and key.generation == generation and time.monotonic() - key.read_at < CACHE_S:
            return key.secret
        with transaction(self._engine) as db:
            row = db.execute(
                select(subject_keys.c.wrapped).where(subject_keys.c.subject == subject, subject_keys.c.generation == generation)
            ).first()
        if row is None or row.wrapped is None:
            raise Gone("this text was erased with the person's key")
        return self._unwrap(subject, generation, row.wrapped)

    def _wrap(self, subject: str, generation: int, secret: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._kek.encrypt(nonce, secret, _bound(subject, generation))

    def _unwrap(self, subject: str, generation: int, wrapped: bytes) -> bytes:
        try:
            return self._kek.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], _bound(subject, generation))
        except InvalidTag as exc:
            raise ConfigError("keys/kek does not fit the database: subjects' keys were wrapped by another one", field="keys/kek") from exc


def generation(sealed: Sealed) -> int:
    """Which generation of its outermost subject's key a box is under."""
    return int.from_bytes(base64.b64decode(sealed.box[:8])[:GENERATION_BYTES], "big")


def _bound(subject: str, generation: int) -> bytes:
    """Associated data: a box or a key cannot be moved to another subject."""
    return f"{subject}/{generation}".encode()
