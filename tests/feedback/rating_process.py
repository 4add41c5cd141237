"""A process that stores ratings and says which ones it promised, to be killed by test_crash.py.

`durable` promises after the log has committed, as Plaudit does. `hasty` promises first and lets the log write later.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from feedback_world import rating, stores_in

from feedback.stores import Stores


async def rate(stores: Stores, mode: str, worker: int) -> None:
    number = 0
    waiting: set[asyncio.Task[None]] = set()

    async def store_later(event_id: str) -> None:
        await asyncio.sleep(0.01)
        await stores.log.append([rating("i", f"r{worker}", "up", event_id=event_id)])

    while True:
        number += 1
        event_id = f"{os.getpid()}-{worker}-{number}"
        if mode == "durable":
            await stores.log.append([rating("i", f"r{worker}", "up", event_id=event_id)])
            print(event_id, flush=True)
        else:
            print(event_id, flush=True)
            task = asyncio.create_task(store_later(event_id))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
            await asyncio.sleep(0.001)


async def main() -> None:
    stores = stores_in(Path(sys.argv[1]))
    await asyncio.gather(*(rate(stores, sys.argv[2], worker) for worker in range(8)))


asyncio.run(main())
