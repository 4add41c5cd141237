"""The whole ring on the concierge and a real vLLM: rated over HTTP, trained, promoted, rolled back, restarted."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from deploy.registry import Registry
from examples.people import People
from examples.ring import Ring
from feedback.archive import Archive
from feedback.events import InteractionStarted
from feedback.partitions import SqliteLogs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


def last_adapter(data_dir: Path) -> str:
    """Which adapter gave the newest answer, by the record."""
    records = SqliteLogs(data_dir / "log").read({}, 1_000_000)
    started = [record.event for record in records if isinstance(record.event, InteractionStarted)]
    return max(started, key=lambda event: event.stamp).adapter


def ask(ring: Ring) -> None:
    people = People(ring.example, ring.url, ring.keys["app"])
    asyncio.run(ring.first_answer(people))


def command(ring: Ring, *words: str) -> str:
    done = subprocess.run(ring.argv(*words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_ring_closes_rolls_back_and_survives_a_restart(tmp_path: Path) -> None:
    said: list[str] = []
    ring = Ring("concierge", tmp_path, lambda what, share: None, said.append)
    try:
        assert asyncio.run(ring.turn()), said
        assert isinstance(ring.registry, Registry)
        promoted, identity = ring.registry.alias("stable"), ring.registry.alias("previous")
        assert promoted is not None and identity is not None and promoted != identity
        assert last_adapter(ring.data_dir) == promoted
        report = (ring.data_dir / "reports" / f"{promoted}.html").read_text()
        assert "24 of 24 raters are simulated" in report and "Before and after" in report
        assert set(json.loads((ring.data_dir / "ring.json").read_text())["seconds"]) >= {"first answer", "ratings", "training", "canary"}

        # Restart of everything: the same adapter answers, nothing said is forgotten.
        opinions = Archive(ring.data_dir / "archive.sqlite").counts()
        ring.stop()
        ring.start()
        ask(ring)
        assert last_adapter(ring.data_dir) == promoted
        assert Archive(ring.data_dir / "archive.sqlite").counts()["feedback.given"] >= opinions["feedback.given"]

        # Rollback gives the old one back.
        command(ring, "adapters", "rollback", "--reason", "test", "--key", ring.keys["operator"])
        asyncio.run(asyncio.sleep(0.5))  # gateways read the routing table every 200 ms
        ask(ring)
        assert last_adapter(ring.data_dir) == identity
    finally:
        ring.stop()
