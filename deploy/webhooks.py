"""Others are told of every move of an alias: at least once, in order, signed, and without anybody waiting for it.

A move is durable before anything is sent: it stands in `alias_history`, under the id of its event. For each endpoint the database keeps the
last move that it was told of, so whoever holds the lease goes on where another one stopped, and a move is sent again where that was
killed before it could write down the answer. A move that an endpoint did not take after all tries is given up with an audit row, and the
next one is sent. Requests and signatures follow https://www.standardwebhooks.com.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
import structlog
from prometheus_client import Counter
from sqlalchemy import Row, Update, func, insert, select, update

from deploy.config import Webhook, WebhookSettings
from deploy.ledger import Ledger
from deploy.records import AliasMove
from deploy.tables import alias_history, webhooks
from feedback.database import now_ms
from feedback.errors import PlauditError

LOOK_S = 1.0
LEASE = "webhooks"
ACTOR = "webhooks"
GIVEN_UP = "webhook.given_up"
DELIVERIES = Counter("plaudit_webhook_deliveries", "Tries to tell an endpoint of an alias move, by outcome", ["outcome"])

log = structlog.get_logger()


@dataclass(frozen=True)
class Due:
    """A move that an endpoint is to be told of now."""

    move: AliasMove
    tries: int
    """How many there were."""


class Deliveries(Ledger):
    """How far each endpoint has been told. An endpoint is the hash of its URL, which may hold what should not lie in a database."""

    def meet(self, endpoint: str) -> None:
        """One that is seen for the first time hears of moves from now on."""
        with self._write() as db:
            if db.execute(select(webhooks.c.endpoint).where(webhooks.c.endpoint == endpoint)).first() is None:
                newest = db.execute(select(func.max(alias_history.c.id))).scalar() or 0
                db.execute(insert(webhooks).values(endpoint=endpoint, told=newest, tries=0, next_ms=0))

    def due(self, endpoint: str) -> Due | None:
        """The oldest move that it was not told of, unless its next try is later. Ids of moves are in the order of their commits, because
        the registry's changes are one after another."""
        with self._read() as db:
            row = db.execute(select(webhooks).where(webhooks.c.endpoint == endpoint)).first()
            if row is None or row.next_ms > now_ms(db):
                return None
            next_one = select(alias_history).where(alias_history.c.id > row.told).order_by(alias_history.c.id).limit(1)
            found: Row[tuple[object, ...]] | None = db.execute(next_one).first()
        return None if found is None else Due(AliasMove.model_validate(dict(found._mapping)), row.tries)

    def told(self, endpoint: str, due: Due) -> None:
        """It has taken the move."""
        with self._write() as db:
            db.execute(self._at(endpoint, due).values(told=due.move.id, tries=0, next_ms=0))

    def failed(self, endpoint: str, due: Due, wait_s: float) -> None:
        """It has not; once more after `wait_s`."""
        with self._write() as db:
            db.execute(self._at(endpoint, due).values(tries=due.tries + 1, next_ms=now_ms(db) + int(1000 * wait_s)))

    def give_up(self, endpoint: str, due: Due, reason: str) -> None:
        """It never will; the audit says so."""
        with self._change(ACTOR, GIVEN_UP, due.move.event_id or str(due.move.id), reason) as db:
            db.execute(self._at(endpoint, due).values(told=due.move.id, tries=0, next_ms=0))

    def _at(self, endpoint: str, due: Due) -> Update:
        """Nothing where another process was faster."""
        return update(webhooks).where(webhooks.c.endpoint == endpoint, webhooks.c.told < due.move.id, webhooks.c.tries == due.tries)


class Webhooks:
    """Sends what is due. Any number of processes may run one; the one with the lease sends."""

    def __init__(self, deliveries: Deliveries, settings: WebhookSettings) -> None:
        self._deliveries, self._settings = deliveries, settings
        # Two names of 63 characters may begin alike; with process and object they are still two, and fit the lease's column.
        self._holder = f"{socket.gethostname()[:40]}/{os.getpid()}/{id(self)}"

    async def run(self) -> None:
        """Until cancelled. Each endpoint by itself, so that one that is slow or away delays no other."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s)) as http:
            await asyncio.gather(*(self._serve(http, each) for each in self._settings.endpoints))

    async def _serve(self, http: aiohttp.ClientSession, endpoint: Webhook) -> None:
        met, said = False, ""
        while True:
            try:
                if not met:
                    await asyncio.to_thread(self._deliveries.meet, name_of(endpoint))
                    met = True
                await self.tell(http, endpoint)
                said = ""
            except PlauditError as error:
                if error.message != said:  # a failure that lasts is told once
                    log.warning("webhook waits", endpoint=host_of(endpoint), reason=error.message)
                    said = error.message
            except Exception:  # the process's edge: the loop must outlive any one look; the log says why
                log.exception("webhook waits", endpoint=host_of(endpoint))
            await asyncio.sleep(LOOK_S)

    async def tell(self, http: aiohttp.ClientSession, endpoint: Webhook) -> None:
        """Tell this endpoint all that is due, until a try fails."""
        name, ours = name_of(endpoint), self._deliveries
        while (due := await asyncio.to_thread(ours.due, name)) is not None:
            # As long as a try may take, and once more: nobody else sends it meanwhile.
            if await asyncio.to_thread(ours.lease, f"{LEASE} {name[:16]}", self._holder, 2 * self._settings.timeout_s) is None:
                return
            problem = await self._send(http, endpoint, due.move)
            DELIVERIES.labels("taken" if problem is None else "failed").inc()
            if problem is None:
                await asyncio.to_thread(ours.told, name, due)
                continue
            where, tries = host_of(endpoint), due.tries + 1
            log.warning("webhook not taken", endpoint=where, move=due.move.event_id, tries=tries, reason=problem)
            if tries < self._settings.tries:
                wait_s = min(self._settings.retry_s * 2.0**due.tries, self._settings.max_retry_s)
                await asyncio.to_thread(ours.failed, name, due, wait_s)
                return
            reason = f"{where} did not take the move of '{due.move.name}' in {tries} tries: {problem}"
            await asyncio.to_thread(ours.give_up, name, due, reason[:500])
            DELIVERIES.labels("given_up").inc()
            log.error("webhook given up", endpoint=where, move=due.move.event_id, tries=tries, reason=problem)

    async def _send(self, http: aiohttp.ClientSession, endpoint: Webhook, move: AliasMove) -> str | None:
        """Why it was not taken; None where it was. The reply's body is never read: only its status counts."""
        body = body_of(move)
        headers = {"Content-Type": "application/json", **signed(endpoint, move.event_id or f"move-{move.id}", int(time.time()), body)}
        try:
            # Not redirected: who answers for this address may not say where else our network is reached.
            async with http.post(endpoint.url, data=body, headers=headers, allow_redirects=False) as reply:
                return None if 200 <= reply.status < 300 else f"it answered {reply.status}"
        except TimeoutError:
            return f"no answer within {self._settings.timeout_s:g} s"
        except OSError as exc:
            return str(exc)
        except aiohttp.ClientError as exc:
            # Not its own words: they hold the whole URL, whose path may be a secret, and what the other side sent.
            return f"no reply that can be read ({type(exc).__name__})"


def body_of(move: AliasMove) -> bytes:
    """The same bytes at every try."""
    at = datetime.fromtimestamp(move.at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    data = {"alias": move.name, "adapter": move.after, "before": move.before, "actor": move.actor, "reason": move.reason}
    kind = "adapter.unaliased" if move.after is None else "adapter.aliased"
    return json.dumps({"type": kind, "timestamp": at, "data": data}, separators=(",", ":")).encode()


def signed(endpoint: Webhook, message: str, at_s: int, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks; one signature for each secret, so that one can be replaced while receivers know both."""
    told = f"{message}.{at_s}.".encode() + body
    macs = [hmac.new(secret, told, hashlib.sha256).digest() for secret in endpoint.signing_keys()]
    return {
        "webhook-id": message,
        "webhook-timestamp": str(at_s),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(mac).decode()}" for mac in macs),
    }


def name_of(endpoint: Webhook) -> str:
    """Under which the database knows it."""
    return hashlib.sha256(endpoint.url.encode()).hexdigest()


def host_of(endpoint: Webhook) -> str:
    """What logs and the audit show of it: a path may be a secret."""
    return "/".join(endpoint.url.split("/")[:3])
