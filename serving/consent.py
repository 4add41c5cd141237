"""What people decide about their own data: `POST /v1/people/erase` and `POST /v1/people/withdraw`.

A feedback token and the chat page's session speak for their own person only; an API key with the scope `erase` names one.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field, ValidationError

from deploy import lineage
from deploy.lineage import Affected
from deploy.registry import Registry
from feedback import audit, erasure
from feedback.erasure import Asker
from feedback.errors import Gone, InvalidInput, NotAllowed
from serving.access import caller_of
from serving.chat import Gateway
from serving.openai_api import Strict, refusal
from serving.wire import read_body

PERSON = "the person"
WORKER = ThreadPoolExecutor(1, "consent")
"""A thread of its own: an erasure may wait for a snapshot that is being built, and ratings must not wait with it."""


class Wish(Strict):
    """The body of both; may be left out by a person."""

    subject: str | None = Field(default=None, min_length=1, max_length=200)
    """With an API key: whose data, by the id that the application uses or by pseudonym."""
    reason: str = Field(default="asked for", min_length=1, max_length=audit.MAX_REASON_CHARS)
    """With an API key: goes into the audit."""


async def erase(request: Request) -> JSONResponse:
    """`POST /v1/people/erase`."""
    gateway, wish = await _read(request)

    def work() -> JSONResponse:
        stores, settings = gateway.stores, gateway.settings
        registry = Registry(stores.engine, settings.feedback.tenant)
        try:
            asker = _asker(request, gateway, wish)
        except Gone:  # they were erased after their token; a killed process, or a full disk, may have left it half done
            claims = caller_of(request).claims
            lineage.finish(stores, registry, settings.erasure, Asker(claims.subject, PERSON) if claims else None)
            raise
        outcome = lineage.erase(stores, registry, settings.erasure, asker, wish.reason)
        return _told({"erased": True, "complete": outcome.complete}, outcome.affected, outcome.done)

    return await asyncio.get_running_loop().run_in_executor(WORKER, work)


async def withdraw(request: Request) -> JSONResponse:
    """`POST /v1/people/withdraw`."""
    gateway, wish = await _read(request)

    def work() -> JSONResponse:
        stores = gateway.stores
        asker = _asker(request, gateway, wish)
        erasure.withdraw(stores, asker.subject, asker.by, wish.reason)
        used = lineage.affected(stores, Registry(stores.engine, gateway.settings.feedback.tenant), asker.subject)
        return _told({"withdrawn": True}, used, dict.fromkeys(used.adapters, "left as it is"))

    return await asyncio.get_running_loop().run_in_executor(WORKER, work)


async def _read(request: Request) -> tuple[Gateway, Wish]:
    gateway: Gateway = request.app.state.gateway
    body = await read_body(request, gateway.settings.server.max_body_bytes)
    try:
        return gateway, Wish.model_validate_json(body or b"{}")
    except ValidationError as exc:
        raise refusal(exc) from exc


def _asker(request: Request, gateway: Gateway, wish: Wish) -> Asker:
    """Raises NotAllowed, NotFound, InvalidInput, TooMany, and Gone for the token of somebody who was erased after it."""
    caller = caller_of(request)
    if caller.key is not None:
        if wish.subject is None:
            raise InvalidInput("subject: is missing; with an API key it says whose data it is about.", field="subject")
        audit.reason(wish.reason)
        return Asker(erasure.named(gateway.stores, wish.subject), caller.key.owner)
    if wish.subject is not None:
        raise NotAllowed("subject: a token or a session speaks for its own person only; leave it out.", field="subject")
    if "reason" in wish.model_fields_set:  # the audit is never erased
        raise NotAllowed("reason: nothing that a person writes goes into the audit; leave it out.", field="reason")
    if caller.claims is not None:
        gateway.standings.of(caller.claims)
        subject = caller.claims.subject
    else:
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise NotAllowed("The chat page's session counts for requests of the page itself only.", field="Sec-Fetch-Site")
        subject = erasure.named(gateway.stores, gateway.stores.subjects.pseudonym(caller.tenant, f"session:{caller.session}"))
    gateway.limits.wish(subject)
    return Asker(subject, PERSON)


def _told(done: dict[str, bool], used: Affected, adapters: dict[str, str]) -> JSONResponse:
    lists = {"snapshots": list(used.snapshots), "reward_models": list(used.reward_models), "adapters": adapters}
    return JSONResponse(done | lists, headers={"Cache-Control": "no-store"})
