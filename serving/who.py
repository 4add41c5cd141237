"""Who is asking: an application by its API key, a person at the chat page by their session, or whoever holds a feedback token."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Literal

from fastapi import Request, Response

from feedback.errors import NotAllowed, NotAuthenticated
from feedback.events import new_id
from feedback.keys import ApiKey, Scope
from feedback.stores import Stores
from feedback.tokens import Claims
from serving.config import GatewaySettings
from serving.openai_api import ChatRequest

COOKIE = "plaudit_session"
OPEN_SCOPES: frozenset[Scope] = frozenset({"chat", "feedback"})
"""What `feedback.auth = false` opens to everybody who reaches the port."""
_SESSION = re.compile(r"[A-Za-z0-9_-]{32}")


@dataclass(frozen=True)
class Access:
    """What lets a request in: any one of these. Without any of them the route is public."""

    scope: Scope | None = None
    """An API key with this scope."""
    session: bool = False
    """The chat page's session."""
    token: bool = False
    """A feedback token. What it allows on what is for the handler to ask of its claims."""


@dataclass(frozen=True)
class Caller:
    """Whoever sent this request."""

    tenant: str
    key: ApiKey | None = None
    session: str | None = None
    claims: Claims | None = None
    """Of the feedback token that came instead of a key."""

    @property
    def name(self) -> str:
        """Under which limits are counted. Without a key it is one for all: anybody can make up another session."""
        return self.key.id if self.key else "no key"


@dataclass(frozen=True)
class Person:
    """Whose interaction it is."""

    subject: str
    kind: Literal["named", "session", "single"]


class Doorman:
    """Lets callers in and says whose interaction a request is."""

    def __init__(self, stores: Stores, settings: GatewaySettings) -> None:
        self._api_keys = stores.api_keys
        self._subjects = stores.subjects
        self._tokens = stores.tokens
        self._tenant = settings.feedback.tenant
        self._auth = settings.feedback.auth
        self._page = settings.server.page

    def let_in(self, request: Request, access: Access) -> Caller:
        """Who sent the request, by whichever of the ways that `access` allows. Raises NotAuthenticated, Gone for a token that has
        expired, or NotAllowed where the key lacks the scope or may not be used from this web origin."""
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        kind, secret = kind.lower(), secret.strip()
        if access.token and kind == "feedback":
            return Caller(self._tenant, claims=self._claims(secret))
        session = request.cookies.get(COOKIE, "")
        known_session = session if self._page and _SESSION.fullmatch(session) else None
        if access.scope and kind == "bearer" and secret.startswith("pl_"):
            key = self._api_keys.check(secret)
            key.require(access.scope)
            key.require_origin(request.headers.get("origin"))
            return Caller(self._tenant, key=key)
        if (access.session and known_session) or (not self._auth and access.scope in OPEN_SCOPES):
            return Caller(self._tenant, session=known_session)
        ways = ["an API key (Authorization: Bearer pl_...)"] if access.scope else []
        ways += ["a feedback token (Authorization: Feedback <token>)"] if access.token else []
        raise NotAuthenticated(f"This needs {' or '.join(ways)}.", field="Authorization")

    def _claims(self, token: str) -> Claims:
        claims = self._tokens.check(token)
        if claims.tenant != self._tenant:
            raise NotAuthenticated("The feedback token belongs to another tenant.", field="Authorization")
        return claims

    def person(self, caller: Caller, ask: ChatRequest) -> Person:
        """Whose interaction it is: safety_identifier, else user, else the page's session, else drawn for this one alone."""
        named = ask.safety_identifier or ask.user
        if named and caller.key is None and self._auth:
            field = "safety_identifier" if ask.safety_identifier else "user"
            raise NotAllowed(f"{field}: the chat page's session speaks for itself only; name people with an API key.", field=field)
        if named:
            return Person(self._subjects.pseudonym(caller.tenant, named), "named")
        if caller.session:
            return Person(self._subjects.pseudonym(caller.tenant, f"session:{caller.session}"), "session")
        return Person(self._subjects.pseudonym(caller.tenant, f"single:{new_id()}"), "single")


def give_session(request: Request, response: Response) -> None:
    """Set the page's cookie where there is none. It holds no secret of ours: it only tells one visitor from another."""
    if not _SESSION.fullmatch(request.cookies.get(COOKIE, "")):
        value = secrets.token_urlsafe(24)  # 32 characters
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, value, max_age=180 * 86400, path="/", httponly=True, samesite="strict", secure=secure)
