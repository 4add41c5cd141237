"""What HTTP demands and frameworks leave open: bodies counted while read, clients that vanish, streams that clean up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.errors import TooLarge

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for this reply any more. Never leaves `serving/`."""


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body. Raises TooLarge as soon as more than the limit has come, whatever Content-Length says."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit_bytes:
            raise TooLarge(f"The body is longer than {limit_bytes} bytes, the limit of server.max_body_bytes.")
        parts.append(part)
    return b"".join(parts)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; raises ClientGone, with the work cancelled, when the client leaves first. The body has been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; `closing` runs however the stream ends, even when it never began."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str], closing: Callable[[], None]) -> None:
        # X-Accel-Buffering: nginx would otherwise collect the tokens.
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closing()
