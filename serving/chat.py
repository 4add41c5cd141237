"""What is the answer? One chat request, from its parse to `[DONE]`.

    parse ──▶ assign ──┬──▶ commit `interaction.started` ──┐
                       └──▶ ask the engine ────────────────┴──▶ first byte
    ──▶ relay, chunk by chunk ──▶ commit `interaction.finished` ──▶ [DONE]

The two commits are what a feedback token stands on: nobody sees a byte of an answer whose beginning is not on disk, and nobody sees
`[DONE]` of one whose end is not. The engine works while the first one is written, so it costs no waiting. `turn.py` is one answer,
`comparison.py` says who answers and keeps two in step, `record.py` seals and commits.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from deploy.engine import Engine
from feedback.errors import InvalidInput, NotDurable, NotFound, PlauditError
from feedback.events import InteractionStarted, StartedText, new_id
from feedback.fold import Said
from feedback.limits import InFlight, Limits
from feedback.stores import Stores
from serving import metrics
from serving.access import caller_of
from serving.comparison import Seat, lockstep, seats
from serving.config import GatewaySettings
from serving.errors import Busy, body_of
from serving.openai_api import DONE, SAMPLING, ChatRequest, delta_choice, engine_body, envelope, parse, sse, total_usage
from serving.receipt import Receipt
from serving.record import Recorder
from serving.route import RouteWatch
from serving.standing import Standings
from serving.turn import Turn
from serving.who import Caller, Doorman, Person
from serving.wire import ClientGone, EventStream, read_body, unless_gone

CLIENT_CLOSED_REQUEST = 499


@dataclass
class Gateway:
    """What answering needs, made once by `app.create_app`."""

    settings: GatewaySettings
    engine: Engine
    stores: Stores
    route: RouteWatch
    doorman: Doorman
    recorder: Recorder
    standings: Standings
    limits: Limits
    in_flight: InFlight
    chance: random.Random = field(default_factory=random.SystemRandom)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """Turns and commits still running; they outlive the request of a client that left."""
    streams: int = 0
    speaking: WeakValueDictionary[tuple[str, str], asyncio.Lock] = field(default_factory=WeakValueDictionary)
    """Held while somebody changes what they say about something, so that the same request sent twice at once is one change."""

    async def give(self, event: Said) -> tuple[Said, Literal["local", "broker"]]:
        """Commit feedback, whether or not its client waits; returns it with its stamp, and how durable it is."""
        task = asyncio.create_task(self.stores.record_feedback([event]))
        self.keep(task)
        stored, durable = await asyncio.shield(task)
        return cast(Said, stored[0]), durable

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold on to a task until it is done; asyncio itself does not."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def chat(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    arrived = time.perf_counter()
    gateway: Gateway = request.app.state.gateway
    caller = caller_of(request)
    ask = parse(await read_body(request, gateway.settings.server.max_body_bytes))
    check(ask, gateway)
    person = gateway.doorman.person(caller, ask)
    await asyncio.to_thread(gateway.limits.chat, caller.name)
    reply = Reply(gateway, ask, caller, person)
    try:
        await unless_gone(request, reply.open())
        metrics.FIRST_BYTE.observe(time.perf_counter() - arrived)
        if ask.stream:
            return EventStream(reply.events(), reply.headers(), closing=reply.close)
        whole = await unless_gone(request, reply.whole())
        reply.close()
        return JSONResponse(whole, headers={"Cache-Control": "no-store", **reply.headers()})
    except ClientGone:
        reply.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        reply.close()
        raise


def check(ask: ChatRequest, gateway: Gateway) -> None:
    """What depends on our settings and not on the request's shape alone. Raises NotFound, InvalidInput or Busy."""
    settings = gateway.settings
    check_model(ask.model, settings.policy.name)
    if ask.compare and not settings.comparison.enabled:
        raise InvalidInput("compare: comparisons are switched off here (comparison.enabled).", field="compare")
    for name in ("max_tokens", "max_completion_tokens"):
        value = getattr(ask, name)
        if value is not None and value > settings.policy.max_model_len:
            limit = settings.policy.max_model_len
            raise InvalidInput(f"{name}: {value} is more than {limit}, the policy's whole context (policy.max_model_len).", field=name)
    if gateway.streams + ask.choices > settings.server.max_streams:
        raise Busy(f"All {settings.server.max_streams} streams (server.max_streams) are busy; please come back.", retry_after_s=1)


def check_model(asked: str, served: str) -> None:
    """Raises NotFound where another model is asked for than the one that is served."""
    if asked != served:
        raise NotFound(f"model: '{asked[:100]}' is not served here; '{served}' is.", field="model")


class Reply:
    """One or several turns on their way to one client. `open`, then `events` or `whole`; `close` always, in the end."""

    def __init__(self, gateway: Gateway, ask: ChatRequest, caller: Caller, person: Person) -> None:
        self.gateway = gateway
        self.ask = ask
        self.messages = ask.plain_messages(gateway.settings.policy.system_prompt)
        self.comparison_id = new_id() if ask.compare else None
        assigned = seats(person.subject, gateway.route.current(), ask.choices, ask.compare, gateway.chance)
        self.turns = [self._turn(index, seat, caller, person) for index, seat in enumerate(assigned)]
        self.receipt: Receipt | None = None
        self.created = int(time.time())
        self._held = 0
        self._whose = (caller.name, person.subject)
        self._entered: Sequence[tuple[str, str]] = ()

    def _turn(self, index: int, seat: Seat, caller: Caller, person: Person) -> Turn:
        ask, policy = self.ask, self.gateway.settings.policy
        sampling = {name: value for name in SAMPLING if (value := getattr(ask, name)) is not None}
        sampling.setdefault("temperature", seat.ref.temperature)
        if not {"max_tokens", "max_completion_tokens"} & sampling.keys():
            sampling["max_tokens"] = policy.max_tokens
        if ask.seed is not None:
            sampling["seed"] = ask.seed + index  # several choices of one seed would otherwise be the same answer
        started = InteractionStarted(
            event_id=new_id(),
            tenant=caller.tenant,
            interaction_id=new_id(),
            subject=person.subject,
            subject_kind=person.kind,
            cohorts=tuple(ask.cohorts),
            source="simulated" if "simulated" in ask.cohorts else "person",
            comparison_id=self.comparison_id,
            side=seat.side,
            model=ask.model,
            adapter=seat.ref.adapter,
            arm=seat.arm,
            rollout=seat.rollout,
            propensity=seat.propensity,
            sampling=sampling,
            key_id=caller.key.id if caller.key else None,
        )
        body = engine_body(ask, self.messages, sampling, self.gateway.settings.record.token_ids)
        return Turn(started, {**body, "model": seat.name}, self.gateway.engine, self.gateway.recorder)

    async def open(self) -> None:
        """Ask the engine and commit the beginning, both at once. Raises what keeps the reply from having a first byte."""
        self._entered = self.gateway.in_flight.enter(*self._whose)
        recorded = asyncio.create_task(self._begin())
        self.gateway.keep(recorded)
        self._held = len(self.turns)
        self.gateway.streams += self._held
        for turn in self.turns:
            self.gateway.keep(turn.start(recorded))
        # Shielded: a client that leaves now must not leave us unsure whether the beginning was written.
        kept = await asyncio.shield(recorded)
        await asyncio.gather(*(turn.opened() for turn in self.turns))
        broken = [turn for turn in self.turns if turn.failure]
        if broken and (len(broken) == len(self.turns) or not self.ask.compare):
            raise broken[0].failure or PlauditError("unreachable")
        if broken:
            # One side failed before it was seen: one ordinary answer remains and there is no comparison.
            self.turns = [turn for turn in self.turns if not turn.failure]
        self.receipt = Receipt.of(self._started(), self.gateway.stores.tokens, self.gateway.settings.feedback.token_expiry_s, kept)

    async def _begin(self) -> bool:
        if self.ask.store is False:
            return False
        text = StartedText(messages=self.messages, tools=self.ask.tools or [], metadata=self.ask.metadata or {})
        return await self.gateway.recorder.begin([turn.started for turn in self.turns], text)

    def _started(self) -> Sequence[InteractionStarted]:
        return [turn.started for turn in self.turns]

    def headers(self) -> dict[str, str]:
        """What the client gets before the body. Valid after `open`."""
        return self.receipt.headers() if self.receipt and self.ask.store is not False else {}

    async def events(self) -> AsyncIterator[bytes]:
        """The reply as server-sent events; each is one round of what the turns said."""
        extra = self._extra()
        async for spoken in lockstep(self.turns):
            out = b""
            for turn, choice in spoken:
                shown = delta_choice(choice, self.turns.index(turn), bool(self.ask.logprobs))
                out += sse(self._envelope("chat.completion.chunk", [shown]) | extra)
                extra = {}
            yield out
        if failure := self._failure():
            yield sse(body_of(failure))
            return
        if failed := self._failed_sides():
            yield sse(self._envelope("chat.completion.chunk", []) | {"plaudit": {"comparison": "void", "failed": failed}})
        if self.ask.stream_options and self.ask.stream_options.include_usage:
            usage = total_usage([turn.answer for turn in self.turns])
            yield sse(self._envelope("chat.completion.chunk", []) | {"usage": usage})
        yield DONE

    async def whole(self) -> dict[str, Any]:
        """The reply in one piece. Raises what ended it early."""
        async for _ in lockstep(self.turns):
            pass
        if failure := self._failure():
            raise failure
        if self._failed_sides():
            self.turns = [turn for turn in self.turns if not turn.failure]
            self.receipt = self.receipt and self.receipt.without_comparison(self._started())
        choices = [turn.answer.choice(index, bool(self.ask.logprobs)) for index, turn in enumerate(self.turns)]
        usage = total_usage([turn.answer for turn in self.turns])
        return self._envelope("chat.completion", choices) | {"usage": usage} | self._extra()

    def close(self) -> None:
        """Nobody reads any more. Ends the upstream requests that still run; their turns record how far they came."""
        for turn in self.turns:
            turn.stop()
        if self._held and self.receipt:
            self._count_comparison()
        self.gateway.streams -= self._held
        self._held = 0
        self.gateway.in_flight.leave(self._entered)
        self._entered = ()

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        reply_id = f"chatcmpl-{self.comparison_id or self.turns[0].started.interaction_id}"
        return envelope(kind, reply_id, self.created, self.ask.model, choices)

    def _extra(self) -> dict[str, Any]:
        return {"plaudit": self.receipt.body()} if self.receipt and self.ask.store is not False else {}

    def _count_comparison(self) -> None:
        if self.comparison_id:
            kind = "canary" if any(turn.started.arm == "canary" for turn in self.turns) else "same"
            void = len(self.turns) == 1 or self._failed_sides()
            metrics.COMPARISONS.labels(kind, "void" if void else "shown").inc()

    def _failure(self) -> PlauditError | None:
        """Why the reply cannot end well; a comparison survives one side."""
        failures = [turn.failure for turn in self.turns if turn.failure]
        unrecorded = next((failure for failure in failures if isinstance(failure, NotDurable)), None)
        if failures and (len(failures) == len(self.turns) or not self.ask.compare or unrecorded):
            return unrecorded or failures[0]
        return None

    def _failed_sides(self) -> list[int]:
        return [index for index, turn in enumerate(self.turns) if turn.failure]
