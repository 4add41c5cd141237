"""What is kept of an answer: sealed under the person's key and committed to the log."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Literal

import structlog

from feedback.errors import Gone, NotDurable
from feedback.events import FinishedText, InteractionFinished, InteractionStarted, StartedText
from feedback.log import EventLog
from feedback.subjects import Subjects, generation
from serving import metrics

log = structlog.get_logger()


class Recorder:
    """Commits the beginning and the end of interactions. With `best_effort` a log that fails makes an answer unrecorded, not refused."""

    def __init__(self, events: EventLog, subjects: Subjects, recording: Literal["required", "best_effort"]) -> None:
        self._events = events
        self._subjects = subjects
        self._required = recording == "required"
        self._begun: dict[str, int] = {}
        """Under which generation of the person's key each interaction that has not ended began."""

    async def begin(self, started: Sequence[InteractionStarted], text: StartedText) -> bool:
        """Commit that these interactions began. Returns whether they are recorded; raises NotDurable where they must be and are not."""

        async def write() -> None:
            # The first seal of a new person writes their key to the registry's database, so it leaves the event loop.
            sealed = await asyncio.to_thread(self._subjects.seal, (started[0].subject,), text)
            await self._events.append([event.model_copy(update={"sealed": sealed}) for event in started])
            self._begun.update({event.interaction_id: generation(sealed) for event in started})

        with metrics.COMMIT.labels("started").time():
            return await self._recorded(write(), len(started))

    async def end(self, finished: InteractionFinished, text: FinishedText) -> bool:
        """Commit how an interaction ended; nothing of it where the person was erased since it began. Their key is cached since then."""
        began = self._begun.pop(finished.interaction_id, None)
        try:
            sealed = self._subjects.seal((finished.subject,), text, create=False)
        except Gone:
            return False
        if began != generation(sealed):
            return False  # they have returned since: the old answer must not live on under the new key

        async def write() -> None:
            await self._events.append([finished.model_copy(update={"sealed": sealed})])

        with metrics.COMMIT.labels("finished").time():
            return await self._recorded(write(), 1)

    async def _recorded(self, writing: Coroutine[None, None, None], events: int) -> bool:
        try:
            await writing
        except NotDurable as error:
            if self._required:
                raise
            metrics.UNRECORDED.inc(events)
            log.warning("answer not recorded", reason=error.message, events=events)
            return False
        return True
