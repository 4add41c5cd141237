"""The loop that advances rollouts. Any number may run; the one that holds the lease acts."""

from __future__ import annotations

import asyncio
import os
import socket

import structlog

from deploy.rollout import Rollout
from feedback.errors import PlauditError
from feedback.log import EventLog

log = structlog.get_logger()


class Controller:
    """Reads nothing from memory: killed anywhere, another one goes on from the registry."""

    def __init__(self, rollout: Rollout, events: EventLog) -> None:
        self.rollout = rollout
        self.events = events
        self.holder = f"{socket.gethostname()}/{os.getpid()}"
        self._said = ""

    async def tick(self) -> bool:
        """One look, if this process leads. Returns whether it does."""
        registry, settings = self.rollout.registry, self.rollout.settings
        epoch = await asyncio.to_thread(registry.lease, "controller", self.holder, settings.lease_s)
        if epoch is None:
            return False
        await self.rollout.advance(epoch)
        await self._send_events(epoch)
        return True

    async def _send_events(self, epoch: int) -> None:
        """Carry the registry's events to the log. Sent twice after a crash, they are one there: the id is the same."""
        registry = self.rollout.registry
        while batch := await asyncio.to_thread(registry.unsent):
            await self.events.append(batch)
            await asyncio.to_thread(registry.mark_sent, batch, epoch)

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            try:
                await self.tick()
                self._said = ""
            except PlauditError as error:
                if error.message != self._said:  # a failure that lasts is told once
                    log.warning("rollout not advanced", reason=error.message)
                    self._said = error.message
            except Exception:  # the process's edge: the loop must outlive any one look; the log says why
                log.exception("rollout not advanced")
            await asyncio.sleep(self.rollout.settings.tick_s)
