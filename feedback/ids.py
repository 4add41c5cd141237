"""Ids that are computed, so that saying the same thing twice stores it once.

All of them are HMAC-SHA-256 under the deployment's pseudonym key: without it nobody can guess an id from a name or a text. Each use
has its own label, and parts are length-prefixed, so no two different tuples give the same bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid

from feedback.events import Slot, new_id


class Ids:
    """The keyed hashes of one deployment."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def digest(self, label: str, *parts: str) -> bytes:
        """32 bytes."""
        mac = hmac.new(self._key, label.encode(), hashlib.sha256)
        for part in parts:
            raw = part.encode("utf-8", "surrogatepass")
            mac.update(len(raw).to_bytes(8, "big") + raw)
        return mac.digest()

    def pseudonym(self, tenant: str, external_id: str) -> str:
        """What is stored instead of a person's id: `s_` and 32 hex digits."""
        return "s_" + self.digest("subject", tenant, external_id).hex()[:32]

    def content(self, *parts: str) -> str:
        """A UUID that stands for a content."""
        return _as_uuid(self.digest("content", *parts))

    def feedback(self, tenant: str, subject: str, slot: Slot, target: str, body: bytes, idempotency_key: str | None) -> str:
        """The event_id of a POST: the same for a repeated one, a new UUIDv7 without an Idempotency-Key.

        The target is hashed with the body, so that one key used on two answers is a mismatch and never a silent loss.
        """
        if idempotency_key is None:
            return new_id()
        body_hash = hashlib.sha256(body).hexdigest()
        return _as_uuid(self.digest("feedback", tenant, subject, slot, idempotency_key, target, body_hash))

    def idempotency(self, tenant: str, subject: str, idempotency_key: str | None) -> str | None:
        """For the field `idempotency` of an event: the log refuses it under another event_id."""
        if idempotency_key is None:
            return None
        return self.digest("idempotency", tenant, subject, idempotency_key).hex()


def _as_uuid(digest: bytes) -> str:
    """RFC 9562 version 8 (vendor-defined) around the first 122 bits."""
    value = int.from_bytes(digest[:16], "big")
    value = value & ~(0xF << 76) | 0x8 << 76
    value = value & ~(0b11 << 62) | 0b10 << 62
    return str(uuid.UUID(int=value))
