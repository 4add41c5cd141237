"""Who is asking: an application by its API key, or a person at the chat page by their session."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Literal

from fastapi import Request, Response

from feedback.errors import NotAllowed, NotAuthenticated
from feedback.events import new_id
from feedback.keys import ApiKeys, Scope
from feedback.subjects import Subjects
from serving.openai_api import ChatRequest

COOKIE = "plaudit_session"
SESSION_SCOPES: frozenset[Scope] = frozenset({"chat", "feedback"})
_SESSION = re.compile(r"[A-Za-z0-9_-]{32}")


@dataclass(frozen=True)
class Caller:
    """Whoever sent this request, and what they may do."""

    tenant: str
    key_id: str | None = None
    session: str | None = None


@dataclass(frozen=True)
class Person:
    """Whose interaction it is."""

    subject: str
    kind: Literal["named", "session", "single"]


class Doorman:
    """Lets callers in and says whose interaction a request is."""

    def __init__(self, api_keys: ApiKeys, subjects: Subjects, *, tenant: str, auth: bool, page: bool) -> None:
        self._api_keys = api_keys
        self._subjects = subjects
        self._tenant = tenant
        self._auth = auth
        self._page = page

    def caller(self, request: Request, scope: Scope) -> Caller:
        """Who sent the request. Raises NotAuthenticated, or NotAllowed where the key lacks the scope."""
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        session = request.cookies.get(COOKIE, "")
        known_session = session if self._page and _SESSION.fullmatch(session) else None
        if secret.startswith("pl_") and kind.lower() == "bearer":
            key = self._api_keys.check(secret.strip())
            key.require(scope)
            return Caller(self._tenant, key_id=key.id)
        if not self._auth or (known_session and scope in SESSION_SCOPES):
            return Caller(self._tenant, session=known_session)
        raise NotAuthenticated("An API key is needed: Authorization: Bearer pl_....", field="Authorization")

    def person(self, caller: Caller, ask: ChatRequest) -> Person:
        """Whose interaction it is: safety_identifier, else user, else the page's session, else drawn for this one alone."""
        named = ask.safety_identifier or ask.user
        if named and caller.key_id is None and self._auth:
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
