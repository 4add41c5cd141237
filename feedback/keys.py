"""API keys: which application or operator may do what. Stored as a hash, shown once."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from sqlalchemy import JSON, BigInteger, Boolean, Column, Engine, MetaData, String, Table, func, insert, select, update
from sqlalchemy.engine import Row

from feedback import audit
from feedback.clock import wall_ms
from feedback.database import create_tables, transaction
from feedback.errors import Conflict, InvalidInput, NotAllowed, NotAuthenticated, NotFound
from feedback.events import Model

Scope = Literal[
    "chat", "feedback", "dataset", "adapters:read", "adapters:write", "adapters:promote", "gates:override", "keys", "erase", "audit"
]
SCOPES: tuple[Scope, ...] = get_args(Scope)
INCLUDED_IN: dict[Scope, tuple[Scope, ...]] = {"adapters:read": ("adapters:write", "adapters:promote", "gates:override")}
"""Whoever may change adapters may read what they change."""

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
ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]+)?|https?://\[[0-9a-f:]+\](:[0-9]+)?")
"""As browsers write it: lower case, no path."""
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
"""Browsers leave them out."""
ON_THIS_MACHINE = "this machine"
"""The actor of what nobody's key stands behind: whoever runs a process on the data folder."""
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

    def state(self, now_ms: int) -> Literal["valid", "disabled", "expired"]:
        """Only a valid key opens anything."""
        if self.disabled:
            return "disabled"
        return "expired" if self.expires_ms is not None and now_ms >= self.expires_ms else "valid"

    def require(self, scope: Scope) -> None:
        """Raises NotAllowed where the key lacks the scope."""
        if not {scope, *INCLUDED_IN.get(scope, ())} & set(self.scopes):
            raise NotAllowed(f"key {self.id} has scopes {', '.join(self.scopes)}; this needs '{scope}'", field="scope")

    def require_origin(self, origin: str | None) -> None:
        """Raises NotAllowed where a browser sends this from a web origin that the key does not list. Other programs send none."""
        if origin is not None and self.origins and origin not in self.origins:
            allowed = ", ".join(self.origins)
            raise NotAllowed(f"key {self.id} may be used from {allowed}, not from {origin[:200]}", field="Origin")


class ApiKeys:
    """Thread-safe. Every change writes its audit row in the same transaction."""

    def __init__(self, engine: Engine) -> None:
        create_tables(engine, metadata)
        audit.open_audit(engine)
        self._engine = engine
        self._cache: dict[str, tuple[float, str, ApiKey]] = {}
        self._lock = threading.Lock()

    def create(
        self,
        owner: str,
        scopes: tuple[Scope, ...],
        *,
        by: str = ON_THIS_MACHINE,
        person: bool = False,
        origins: tuple[str, ...] = (),
        expires_ms: int | None = None,
        show: Callable[[ApiKey, str], None] | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its secret `pl_<id>_<random>`, which nobody can see again (190 random bits, so a plain hash is enough).

        `by` is who makes it, for the audit. `show` hears of it before it is committed: where showing fails, or the process is killed
        meanwhile, no key is left that nobody has seen. Raises InvalidInput.
        """
        owner, scopes = owner.strip(), tuple(dict.fromkeys(scopes))
        _check(owner, scopes, origins)
        key_id = "".join(secrets.choice(ALPHABET) for _ in range(12))
        secret = f"pl_{key_id}_" + "".join(secrets.choice(ALPHABET) for _ in range(32))
        key = ApiKey(id=key_id, owner=owner, person=person, scopes=scopes, origins=origins, created_ms=wall_ms(), expires_ms=expires_ms)
        values = key.model_dump() | {"scopes": list(scopes), "origins": list(origins), "digest": _digest(secret)}
        with transaction(self._engine) as db:
            db.execute(insert(api_keys).values(**values))
            audit.record(db, by, "key.created", key.id, f"for {owner}: {', '.join(scopes)}")
            if show is not None:
                show(key, secret)
        return key, secret

    def check(self, secret: str) -> ApiKey:
        """The key of this secret. Raises NotAuthenticated where it is unknown, disabled or expired."""
        match = PATTERN.fullmatch(secret)
        if match is None:
            raise NotAuthenticated("the API key is not of the form pl_<12 characters>_<32 characters>")
        found = self._find(match.group(1))
        if found is None or not hmac.compare_digest(found[0], _digest(secret)):
            raise NotAuthenticated("the API key is not known")
        key = found[1]
        if (state := key.state(wall_ms())) != "valid":
            raise NotAuthenticated(f"API key {key.id} is {state}; make another one with `plaudit keys create`")
        return key

    def disable(self, key_id: str, *, by: str = ON_THIS_MACHINE, reason: str = "disabled") -> None:
        """Refused from now on; elsewhere within CACHE_S. Raises NotFound, and Conflict where it is disabled already."""
        if not key_id.isprintable():
            raise NotFound("an API key's id has letters and digits only; `plaudit keys list` shows them", field="id")
        enabled = update(api_keys).where(api_keys.c.id == key_id, api_keys.c.disabled.is_(False))
        with transaction(self._engine) as db:
            if db.execute(enabled.values(disabled=True)).rowcount == 0:
                if db.execute(select(api_keys.c.id).where(api_keys.c.id == key_id)).first() is None:
                    raise NotFound(f"there is no API key '{key_id[:64]}'; `plaudit keys list` shows them", field="id")
                raise Conflict(f"API key {key_id} is disabled already", field="id")
            audit.record(db, by, "key.disabled", key_id, reason)
        with self._lock:
            self._cache.pop(key_id, None)

    def speaks_for(self, key: ApiKey, key_id: str | None) -> bool:
        """Whether what was asked for with the other key is this key's to rate: both belong to the same owner."""
        other = self._find(key_id) if key_id else None
        return other is not None and other[1].owner == key.owner

    def _find(self, key_id: str) -> tuple[str, ApiKey] | None:
        """Digest and key, at most CACHE_S old."""
        with self._lock:
            cached = self._cache.get(key_id)
        if cached is None or time.monotonic() - cached[0] > CACHE_S:
            with transaction(self._engine) as db:
                row = db.execute(select(api_keys).where(api_keys.c.id == key_id)).first()
            if row is None:
                return None
            cached = (time.monotonic(), row.digest, _key(row))
            with self._lock:
                self._cache[key_id] = cached  # bounded by the number of keys
        return cached[1:]

    def list(self) -> list[ApiKey]:
        """All keys, oldest first."""
        with transaction(self._engine) as db:
            return [_key(row) for row in db.execute(select(api_keys).order_by(api_keys.c.created_ms, api_keys.c.id))]

    def count(self) -> int:
        """How many keys there are; with none, the first start makes one and shows it."""
        with transaction(self._engine) as db:
            return int(db.execute(select(func.count()).select_from(api_keys)).scalar_one())


def _check(owner: str, scopes: Sequence[str], origins: Sequence[str]) -> None:
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise InvalidInput(f"scopes {', '.join(unknown) or '(none)'} are not known; there are {', '.join(SCOPES)}", field="scopes")
    if not 1 <= len(owner) <= MAX_OWNER_CHARS:
        raise InvalidInput(f"owner has {len(owner)} characters, it may have 1 to {MAX_OWNER_CHARS}", field="owner")
    if not owner.isprintable():
        raise InvalidInput("owner holds line breaks or characters that cannot be printed; give a name in one line", field="owner")
    for origin in origins:
        if not ORIGIN.fullmatch(origin) or origin.endswith(DEFAULT_PORTS[origin.partition(":")[0]]):
            told = "is no web origin as browsers write it: lower case, no path, no default port"
            raise InvalidInput(f"origins: '{origin[:200]}' {told}; write it like https://app.example", field="origins")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(row: Row[tuple[object, ...]]) -> ApiKey:
    return ApiKey.model_validate({name: value for name, value in row._mapping.items() if name != "digest"})
