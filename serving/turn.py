"""One answer: asked of the engine, handed on chunk by chunk, recorded as it ended.

A turn runs as a task of its own, so that its end is recorded however the client's request ends. Its reader takes choices out of a
small queue: a slow reader slows the engine's stream down instead of filling our memory.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import structlog

from deploy.engine import Engine
from feedback.errors import EngineError, EngineRefused, EngineUnavailable, NotDurable, PlauditError
from feedback.events import FinishedText, InteractionFinished, InteractionStarted, new_id
from serving import metrics
from serving.errors import PromptTooLong
from serving.openai_api import Answer
from serving.record import Recorder

QUEUED_CHUNKS = 64
log = structlog.get_logger()
_TOO_LONG = re.compile(r"context length|max_model_len|maximum model length|too long", re.IGNORECASE)


class Turn:
    """One interaction while it happens. `start` once, then `opened`, then `next` until it returns None; `stop` at any time."""

    def __init__(self, started: InteractionStarted, body: dict[str, Any], engine: Engine, recorder: Recorder) -> None:
        self.started = started
        self.answer = Answer()
        self.failure: PlauditError | None = None
        self._body = body
        self._engine = engine
        self._recorder = recorder
        self._choices: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(QUEUED_CHUNKS)
        self._opened = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._relaying = True
        self._began = time.perf_counter()
        self._first_token_ms: float | None = None

    def start(self, recorded: asyncio.Task[bool]) -> asyncio.Task[None]:
        """Ask the engine. `recorded` is the commit of this turn's beginning, which its end must not overtake."""
        self._task = asyncio.create_task(self._run(recorded))
        return self._task

    def stop(self) -> None:
        """Nobody reads any more: closes the upstream request, which makes the engine abort. Harmless after the end."""
        if self._relaying and self._task is not None:
            self._relaying = False
            self._task.cancel()
        while not self._choices.empty():  # so that a full queue does not hold the end back
            self._choices.get_nowait()

    async def opened(self) -> None:
        """Returns once the first chunk is there, or the turn has failed."""
        await self._opened.wait()

    async def next(self) -> dict[str, Any] | None:
        """The next choice of the engine's stream; None after the end, which is then recorded, or after a failure."""
        return await self._choices.get()

    async def _run(self, recorded: asyncio.Task[bool]) -> None:
        reason = "error"
        try:
            with metrics.IN_FLIGHT.track_inprogress():
                await self._relay()
            reason = self.answer.finish_reason or "error"
            if self.answer.finish_reason is None:
                self.failure = EngineUnavailable("The model server broke off in the middle of the answer.", retry_after_s=1)
        except asyncio.CancelledError:
            # The upstream request is closed by now; what was said so far is still recorded.
            reason = "client_closed"
        except EngineError as error:
            self.failure = self._translated(error)
        except Exception:  # the task's edge: whoever reads this answer would wait for its end for ever
            log.exception("answer not understood")
            self.failure = EngineUnavailable("The model server said something that is no answer.", retry_after_s=1)
        self._relaying = False  # from here on `stop` must not cancel: the end is being written
        metrics.ANSWERS.labels(self.started.arm, reason).inc()
        try:
            await self._record(reason, recorded)
        except NotDurable as error:
            self.failure = error
        await self._choices.put(None)
        self._opened.set()

    async def _relay(self) -> None:
        headers = {"X-Request-Id": self.started.interaction_id}
        async with self._engine.stream(self._body, headers) as chunks:
            async for chunk in chunks:
                choice = self.answer.add(chunk)
                if choice is None:
                    continue
                if self._first_token_ms is None:
                    self._first_token_ms = (time.perf_counter() - self._began) * 1000
                await self._choices.put(choice)
                self._opened.set()

    def _translated(self, error: EngineError) -> PlauditError:
        """The engine's error as the client may see it: without the adapter's name, and a prompt that is too long named as such."""
        if not isinstance(error, EngineRefused):
            return error
        if _TOO_LONG.search(error.message):
            return PromptTooLong(f"messages: {error.message}", field="messages")
        if str(self._body["model"]) in error.message:
            return EngineUnavailable("The model server does not hold the adapter that answers here; please come back.", retry_after_s=2)
        return error

    async def _record(self, reason: str, recorded: asyncio.Task[bool]) -> None:
        try:
            # Shielded: the commit is shared by the turns of a request, and cancelling one must not cancel it.
            if not await asyncio.shield(recorded):
                return
        except NotDurable:
            return  # told to the client by whoever awaits the commit
        answer = self.answer
        finished = InteractionFinished(
            event_id=new_id(),
            tenant=self.started.tenant,
            interaction_id=self.started.interaction_id,
            subject=self.started.subject,
            finish_reason=reason,
            prompt_tokens=answer.usage.get("prompt_tokens"),
            completion_tokens=answer.usage.get("completion_tokens"),
            first_token_ms=self._first_token_ms,
            total_ms=(time.perf_counter() - self._began) * 1000,
        )
        keep = bool(answer.token_ids)
        text = FinishedText(
            answer=answer.text,
            tool_calls=answer.tool_calls,
            token_ids=answer.token_ids,
            logprobs=[entry["logprob"] for entry in answer.logprobs] if keep else [],
        )
        await self._recorder.end(finished, text)
