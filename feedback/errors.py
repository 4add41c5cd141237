"""Every error that Plaudit raises on purpose.

    PlauditError
    ├── InvalidInput          what a client or a file said is wrong: field, value and limit are named
    │   └── IdempotencyMismatch   the same Idempotency-Key came with another body
    ├── NotAuthenticated      no key or token, or one that we did not mint
    ├── NotAllowed            a key or token that may not do this
    ├── TooMany               more than one of `[limits]` allows; come back after retry_after_s
    ├── NotFound              no such thing
    ├── Gone                  it was here: erased, expired or retired
    ├── Conflict              somebody else was first (compare-and-swap, lease)
    ├── NotDurable            could not be stored; nothing was acknowledged; come back after retry_after_s
    ├── GatewayUnavailable    no gateway answers where a command asked for one
    ├── EngineError           the model server
    │   ├── EngineUnavailable     it does not answer; come back after retry_after_s
    │   └── EngineRefused         it answered that it will not
    ├── PromotionRefused      a gate, a verdict or an approval is missing: value, comparison, threshold, next step
    ├── TrainingRefused       this data or these settings cannot train
    │   └── SnapshotRedacted      somebody in the snapshot was erased; take a new one
    └── ConfigError           a setting is missing, unknown or out of range

Foreign exceptions are translated where they enter, with `raise ... from exc`.
Which HTTP status each one becomes is written in `serving/errors.py`.
"""

from __future__ import annotations


class PlauditError(Exception):
    """Root of all errors. The message is one sentence for a person: field, value, limit, next step."""

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidInput(PlauditError):
    """What a client or a file said is wrong."""


class IdempotencyMismatch(InvalidInput):
    """The same Idempotency-Key came with another body."""


class NotAuthenticated(PlauditError):
    """No key or token was given, or one that we did not mint."""


class NotAllowed(PlauditError):
    """The key or token is ours and may not do this."""


class TooMany(PlauditError):
    """More than one of `[limits]` allows."""

    def __init__(self, message: str, limit: int, *, field: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message, field=field, retry_after_s=retry_after_s)
        self.limit = limit


class NotFound(PlauditError):
    """No such thing."""


class Gone(PlauditError):
    """It was here and is not any more: erased, expired or retired."""


class Conflict(PlauditError):
    """Somebody else was first."""


class NotDurable(PlauditError):
    """The event could not be stored, so nothing was acknowledged."""


class GatewayUnavailable(PlauditError):
    """No gateway answers at the address that a command asked."""


class EngineError(PlauditError):
    """The model server failed."""


class EngineUnavailable(EngineError):
    """The model server does not answer."""


class EngineRefused(EngineError):
    """The model server answered that it will not."""


class PromotionRefused(PlauditError):
    """A gate, a verdict or an approval is missing."""


class TrainingRefused(PlauditError):
    """This data or these settings cannot train."""


class SnapshotRedacted(TrainingRefused):
    """Somebody whose opinions the snapshot held was erased."""


class ConfigError(PlauditError):
    """A setting is missing, unknown or out of range."""
