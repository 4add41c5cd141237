"""Two gateways over one data folder, spoken to without a network, and the model of what their feedback API means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI
from serving_world import MODEL, STABLE, Routes, echo

from deploy.config import PolicySettings
from deploy.engine import Scripted
from feedback.config import FeedbackSettings, Settings
from feedback.limits import UNLIMITED
from feedback.stores import Stores, open_stores
from serving.app import create_app
from serving.config import ComparisonSettings, GatewaySettings, RecordSettings, ServerSettings

BEHIND_MS = 5_000
"""How far the second gateway's clock is behind the first one's."""


@dataclass
class Gateway:
    """One process's worth of a gateway."""

    stores: Stores
    app: FastAPI
    http: httpx2.AsyncClient


class TwoGateways:
    """Both live in this process, each with its own partition, clock and handles, on one event loop."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.loop = asyncio.new_event_loop()
        self.gateways = [self._start(number) for number in (0, 1)]
        _, self.secret = self.gateways[0].stores.api_keys.create("tests", ("chat", "feedback"))

    def _start(self, number: int) -> Gateway:
        feedback = FeedbackSettings(data_dir=self.data_dir)
        stores = open_stores(Settings(feedback=feedback))
        stores.clock._wall = lambda: time.time_ns() // 1_000_000 - BEHIND_MS * number
        adapter = self.data_dir / "adapter"
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text("{}")
        engine = Scripted(echo)
        engine.loaded[STABLE.name] = adapter
        settings = GatewaySettings(
            server=ServerSettings(page=False, route_max_age_s=3600),
            record=RecordSettings(),
            comparison=ComparisonSettings(),
            policy=PolicySettings(name=MODEL, max_tokens=8, max_model_len=512),
            feedback=feedback,
            limits=UNLIMITED,
        )
        app = create_app(stores, Routes(stores.engine), engine, settings)
        self.loop.run_until_complete(app.state.gateway.route.refresh())
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway")
        return Gateway(stores, app, http)

    def restart(self, number: int) -> None:
        self._stop(self.gateways[number])
        self.gateways[number] = self._start(number)

    def _stop(self, gateway: Gateway) -> None:
        self.loop.run_until_complete(gateway.http.aclose())
        gateway.app.state.gateway.limits.close()
        gateway.stores.close()

    def close(self) -> None:
        for gateway in self.gateways:
            self._stop(gateway)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def compare(self, number: int, user: str) -> Mapping[str, str]:
        """Two answers side by side: each id that may be rated and its token, the comparison's first."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "user": user, "compare": True}
        headers = {"Authorization": f"Bearer {self.secret}"}
        told = self.loop.run_until_complete(self.gateways[number].http.post("/v1/chat/completions", json=body, headers=headers)).json()
        pairs = {each["interaction_id"]: each["token"] for each in told["plaudit"]["interactions"]}
        return {told["plaudit"]["comparison_id"]: told["plaudit"]["token"], **pairs}

    def post(self, *requests: tuple[int, str, Mapping[str, Any], str | None]) -> list[httpx2.Response]:
        """Say (gateway, token, body, Idempotency-Key), all at once."""

        async def send(number: int, token: str, body: Mapping[str, Any], key: str | None) -> httpx2.Response:
            headers = {"Authorization": f"Feedback {token}", **({"Idempotency-Key": key} if key else {})}
            return await self.gateways[number].http.post("/v1/feedback", json=body, headers=headers)

        async def all_of_them() -> list[httpx2.Response]:
            return list(await asyncio.gather(*(send(*request) for request in requests)))

        return self.loop.run_until_complete(all_of_them())

    def state(self, number: int, token: str) -> Any:
        headers = {"Authorization": f"Feedback {token}"}
        reply = self.loop.run_until_complete(self.gateways[number].http.get("/v1/feedback", headers=headers))
        assert reply.status_code == 200, reply.text
        return reply.json()["state"]


@dataclass
class Word:
    """Something that was acknowledged."""

    version: int
    feedback_id: str
    body: Mapping[str, Any]

    @property
    def slot(self) -> str:
        return str(self.body["slot"] if self.body["kind"] == "clear" else self.body["kind"])

    def says(self) -> tuple[Any, ...]:
        """What it means, without how it was sent."""
        return tuple(self.body.get(name) for name in ("kind", "slot", "value", "reasons", "comment", "correction"))


@dataclass
class Model:
    """What one person said about one answer: in each slot the acknowledged word with the greatest (version, id) counts.

    Of two versions of one word, from two gateways, the lesser one is its."""

    words: dict[str, Word] = field(default_factory=dict)

    def newest(self) -> int:
        return max((word.version for word in self.words.values()), default=0)

    def hear(self, word: Word) -> None:
        known = self.words.get(word.feedback_id)
        if known is None or word.version < known.version:
            self.words[word.feedback_id] = word

    def last(self) -> dict[str, Word]:
        """The last word in each slot, clearings too."""
        last: dict[str, Word] = {}
        for word in sorted(self.words.values(), key=lambda word: (word.version, word.feedback_id)):
            last[word.slot] = word
        return last

    def repeated(self, body: Mapping[str, Any]) -> Word | None:
        """What already says the same, if it stands."""
        asked = Word(0, "", body)
        held = self.last().get(asked.slot)
        return held if held and body["kind"] != "clear" and held.says() == asked.says() else None

    def shown(self) -> dict[str, Any]:
        """The `state` that the API shows."""
        held = {slot: word.body for slot, word in self.last().items() if word.body["kind"] != "clear"}
        comments = [held[slot].get("comment") for slot in ("comment", "rating", "choice") if slot in held]
        judged = held.get("rating") or held.get("choice") or {}
        return {
            "rating": held.get("rating", {}).get("value"),
            "choice": held.get("choice", {}).get("value"),
            "reasons": judged.get("reasons", []),
            "comment": next((comment for comment in comments if comment), None),
            "correction": held.get("correction", {}).get("correction"),
            "signal": held.get("signal", {}).get("value"),
        }
