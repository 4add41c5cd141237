"""API keys: which application or operator may do what. Stored as a hash, shown once."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import threading
import time
from typing import Literal, get_args

from sqlalchemy import JSON, BigInteger, Boolean, Column, Engine, MetaData, String, Table, func, insert, select, update
from sqlalchemy.engine import Row

from feedback.clock import wall_ms
from feedback.database import create_tables, transaction
from feedback.errors import InvalidInput, NotAllowed, NotAuthenticated, NotFound
from feedback.events import Model

Scope = Literal["chat", "feedback", "dataset", "adapters:write", "adapters:promote", "keys", "erase", "audit"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

MAX_OWNER_CHARS = 200
metadata = MetaData()
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("owner", String(MAX_OWNER_CHARS), nullable=False),
    Column("person", Boolean, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("origins", JSON, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=True),
    Column("disabled", Boolean, nullable=False),
)

ALPHABET = string.ascii_letters + string.digits
PATTERN = re.compile(r"pl_([A-Za-z0-9]{12})_([A-Za-z0-9]{32})")
CACHE_S = 2.0
"""How long a key that was disabled elsewhere still works here."""


class ApiKey(Model):
    """A key without its secret."""

    id: str
    owner: str
    person: bool = False
    """Whether `owner` names a person: an approval needs such a key."""
    scopes: tuple[Scope, ...]
    origins: tuple[str, ...] = ()
    """Web origins that a browser may use it from."""
    created_ms: int
    expires_ms: int | None = None
    disabled: bool = False

    def require(self, scope: Scope) -> None:
        """Raises NotAllowed where the key lacks the scope."""
        if scope not in self.scopes:
            raise NotAllowed(f"key {self.id} has scopes {', '.join(self.scopes)}; this needs '{scope}'", field="scope")

    def require_origin(self, origin: str | None) -> None:
        """Raises NotAllowed where a browser sends this from a web origin that the key does not list. Other programs send none."""
        if origin is not None and self.origins and origin not in self.origins:
            allowed = ", ".join(self.origins)
            raise NotAllowed(f"key {self.id} may be used from {allowed}, not from {origin[:200]}", field="Origin")


class ApiKeys:
    """Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        create_tables(engine, metadata)
        self._engine = engine
        self._cache: dict[str, tuple[float, str, ApiKey]] = {}
        self._lock = threading.Lock()

    def create(
        self,
        owner: str,
        scopes: tuple[Scope, ...],
        *,
        person: bool = False,
        origins: tuple[str, ...] = (),
        expires_ms: int | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its secret `pl_<id>_<random>`, which nobody can see again (190 random bits, so a plain hash is enough)."""
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown or not scopes:
            raise InvalidInput(f"scopes {', '.join(unknown) or '(none)'} are not known; there are {', '.join(SCOPES)}", field="scopes")
        if not 1 <= len(owner.strip()) <= MAX_OWNER_CHARS:
            raise InvalidInput(f"owner has {len(owner.strip())} characters, it may have 1 to {MAX_OWNER_CHARS}", field="owner")
        key_id = "".join(secrets.choice(ALPHABET) for _ in range(12))
        secret = f"pl_{key_id}_" + "".join(secrets.choice(ALPHABET) for _ in range(32))
        key = ApiKey(id=key_id, owner=owner, person=person, scopes=scopes, origins=origins, created_ms=wall_ms(), expires_ms=expires_ms)
        values = key.model_dump() | {"scopes": list(scopes), "origins": list(origins), "digest": _digest(secret)}
        with transaction(self._engine) as db:
            db.execute(insert(api_keys).values(**values))
        return key, secret

    def check(self, secret: str) -> ApiKey:
        """The key of this secret. Raises NotAuthenticated where it is unknown, disabled or expired."""
        match = PATTERN.fullmatch(secret)
        if match is None:
            raise NotAuthenticated("the API key is not of the form pl_<12 characters>_<32 characters>")
        key_id = match.group(1)
        with self._lock:
            cached = self._cache.get(key_id)
        if cached is None or time.monotonic() - cached[0] > CACHE_S:
            with transaction(self._engine) as db:
                row = db.execute(select(api_keys).where(api_keys.c.id == key_id)).first()
            if row is None:
                raise NotAuthenticated("the API key is not known")
            cached = (time.monotonic(), row.digest, _key(row))
            with self._lock:
                self._cache[key_id] = cached  # bounded by the number of keys
        _, digest, key = cached
        if not hmac.compare_digest(digest, _digest(secret)):
            raise NotAuthenticated("the API key is not known")
        if key.disabled:
            raise NotAuthenticated(f"API key {key.id} was disabled")
        if key.expires_ms is not None and wall_ms() >= key.expires_ms:
            raise NotAuthenticated(f"API key {key.id} has expired")
        return key

    def disable(self, key_id: str) -> None:
        """Raises NotFound."""
        with transaction(self._engine) as db:
            if db.execute(update(api_keys).where(api_keys.c.id == key_id).values(disabled=True)).rowcount == 0:
                raise NotFound(f"there is no API key '{key_id}'", field="id")
        with self._lock:
            self._cache.pop(key_id, None)

    def list(self) -> list[ApiKey]:
        """All keys, oldest first."""
        with transaction(self._engine) as db:
            return [_key(row) for row in db.execute(select(api_keys).order_by(api_keys.c.created_ms, api_keys.c.id))]

    def count(self) -> int:
        """How many keys there are; with none, the first start makes one and shows it."""
        with transaction(self._engine) as db:
            return int(db.execute(select(func.count()).select_from(api_keys)).scalar_one())


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(row: Row[tuple[object, ...]]) -> ApiKey:
    return ApiKey.model_validate({name: value for name, value in row._mapping.items() if name != "digest"})
