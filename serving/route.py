"""The routing table that this gateway goes by, never older than it says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from deploy.routing import RoutingTable
from feedback.errors import EngineUnavailable, PlauditError
from serving import metrics

log = structlog.get_logger()


class RouteWatch:
    """Reads the table again and again; while it cannot, people are answered by stable only."""

    def __init__(self, read: Callable[[], RoutingTable], refresh_s: float, max_age_s: float) -> None:
        self._read = read
        self._refresh_s = refresh_s
        self._max_age_s = max_age_s
        self._table: RoutingTable | None = None
        self._read_at = float("-inf")
        self._problem = "the routing table has not been read yet"

    @property
    def fresh(self) -> bool:
        """Whether the table was read recently enough to send anybody to a canary."""
        return time.monotonic() - self._read_at <= self._max_age_s

    @property
    def problem(self) -> str:
        """Why the last attempt failed; empty after a success."""
        return self._problem

    def current(self) -> RoutingTable:
        """The table to go by now. Raises EngineUnavailable as long as there has never been one."""
        if self._table is None:
            raise EngineUnavailable(f"Nothing is served yet: {self._problem}.", retry_after_s=1)
        return self._table if self.fresh else self._table.without_canary()

    async def refresh(self) -> None:
        """Read once. A failure is kept as the reason; the old table ages meanwhile."""
        began = time.monotonic()
        try:
            table = await asyncio.to_thread(self._read)
        except PlauditError as error:
            if not self._problem:
                log.warning("routing table not read", reason=error.message)
            self._problem = error.message.rstrip(".")
            return
        # The age counts from before the read: what changed while we read may be missing from it.
        self._table, self._read_at, self._problem = table, began, ""
        metrics.ROUTE_VERSION.set(table.version)

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            try:
                await self.refresh()
            except Exception:  # the process's edge: the watch must outlive any one read; age and /readyz show it, the log says why
                log.exception("routing table not read")
            metrics.ROUTE_AGE.set(time.monotonic() - self._read_at)
            await asyncio.sleep(self._refresh_s)
