"""Feedback tokens: whoever gets an answer may say what they think of it, and nobody else.

A Fernet token (AES-CBC and HMAC-SHA-256, by `cryptography`) around `Claims`: opaque, so it cannot reveal which side is which, and
checked without a look-up, so a rating is accepted by any gateway while its answer still streams.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable, Sequence
from typing import Literal

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import ValidationError

from feedback.errors import ConfigError, Gone, NotAuthenticated
from feedback.events import Model, Source

MAX_CHARS = 4096

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
    """Mints with the first key, accepts all of them, so that keys rotate."""

    def __init__(self, keys: Sequence[bytes], now: Callable[[], float] = time.time) -> None:
        try:
            self._fernet = MultiFernet([Fernet(key) for key in keys])
        except (ValueError, binascii.Error) as exc:
            raise ConfigError("keys/token.keys must hold Fernet keys (32 bytes in url-safe base64), one a line", field="keys") from exc
        self._now = now

    def mint(self, claims: Claims) -> str:
        return self._fernet.encrypt(claims.model_dump_json(exclude_defaults=True).encode()).decode()

    def check(self, token: str) -> Claims:
        """The claims of a token that we minted. Raises NotAuthenticated for any other string, Gone for one that has expired."""
        if len(token) > MAX_CHARS:
            raise NotAuthenticated(f"the feedback token has {len(token)} characters, the limit is {MAX_CHARS}")
        try:
            raw = token.encode("ascii")
            # base64 decoders skip foreign bytes and ignore spare bits, so other strings would decode to the same token.
            if base64.urlsafe_b64encode(base64.urlsafe_b64decode(raw)) != raw:
                raise InvalidToken
            claims = Claims.model_validate_json(self._fernet.decrypt(raw))
        except (InvalidToken, UnicodeEncodeError, binascii.Error, ValidationError):
            raise NotAuthenticated("the feedback token is not one that this service gave out") from None
        if self._now() >= claims.expires:
            expired = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(claims.expires))
            raise Gone(f"the feedback token expired at {expired}; feedback.token_expiry_s says how long one lasts")
        return claims
