"""Everybody who asked is told of every alias move at least once, in order and signed; nothing waits for them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr, ValidationError
from sqlalchemy import Engine

from deploy import webhooks
from deploy.config import Webhook, WebhookSettings
from deploy.registry import Registry
from deploy.webhooks import Deliveries, Webhooks, name_of, signed
from feedback import audit
from feedback.config import load
from feedback.errors import ConfigError

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]
SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()
OLDER = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@dataclass
class Receiver:
    """A real server on loopback; what it answers is taken from `answers`, then 204."""

    answers: list[int | None] = field(default_factory=list)
    """None: it never answers."""
    seen: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Receiver]:
        leaving = asyncio.Event()

        async def take(request: web.Request) -> web.Response:
            self.seen.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
            answer = self.answers.pop(0) if self.answers else 204
            if answer is None:
                await leaving.wait()
                return web.Response()
            return web.Response(status=answer, headers={"Location": self.url} if answer == 302 else {})

        app = web.Application()
        app.router.add_post("/{any:.*}", take)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook?tenant=t"
        try:
            yield self
        finally:
            leaving.set()
            await runner.cleanup()

    def told(self) -> list[tuple[str, str, str | None]]:
        """(type, alias, where it points now) of each request, whose signature a receiver would accept."""
        found = []
        for headers, body in self.seen:
            mac = hmac.new(bytes(range(24)), f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body, hashlib.sha256)
            assert f"v1,{base64.b64encode(mac.digest()).decode()}" in headers["webhook-signature"].split(" ")
            said = json.loads(body)
            found.append((said["type"], said["data"]["alias"], said["data"]["adapter"]))
        return found


@dataclass
class World:
    registry: Registry
    engine: Engine
    adapters: list[str]

    def settings(self, *receivers: Receiver, **values: Any) -> WebhookSettings:
        quick: dict[str, Any] = {"timeout_s": 5.0, "tries": 10, "retry_s": 0.01, **values}
        return WebhookSettings(endpoints=tuple(Webhook(url=each.url, secrets=(SecretStr(SECRET),)) for each in receivers), **quick)

    @contextlib.asynccontextmanager
    async def sending(self, *receivers: Receiver, processes: int = 1, **values: Any) -> AsyncIterator[None]:
        settings = self.settings(*receivers, **values)
        tasks = []
        for _ in range(processes):
            deliveries = Deliveries(self.engine, "default")
            for endpoint in settings.endpoints:
                deliveries.meet(name_of(endpoint))
            tasks.append(asyncio.create_task(Webhooks(deliveries, settings).run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def promote(self, number: int) -> None:
        registry = self.registry
        epoch = registry.lease("controller", "test", 60)
        assert epoch is not None
        rollout = registry.begin_rollout(self.adapters[number], "controller", epoch).id
        registry.start_canary(rollout, 0.25, [], "controller", epoch)
        registry.await_approval(rollout, [{"name": "wins", "verdict": "pass", "reason": "8 of 8"}], "won", "controller", epoch)
        registry.promote(rollout, "mara")


@pytest.fixture
def world(database: Engine, tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(webhooks, "LOOK_S", 0.01)
    registry = Registry(database)
    made = [make_adapter(tiny_policy, tmp_path / "adapters", seed) for seed in (0, 1, 2)]
    for adapter, path in made:
        registry.register(adapter, path, "trainer")
    registry.start_with(made[0][0], "system")
    return World(registry, database, [adapter for adapter, _ in made])


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


def moves(stable: str, better: str) -> list[tuple[str, str, str | None]]:
    """A promotion's and its rollback's."""
    promotion: list[tuple[str, str, str | None]] = [("canary", "canary", better), ("", "stable", better), ("", "previous", stable)]
    both = [*promotion, ("", "canary", None), ("", "stable", stable), ("", "previous", better)]
    return [("adapter.unaliased" if to is None else "adapter.aliased", alias, to) for _, alias, to in both]


def test_each_hears_of_every_move_whatever_the_others_do(world: World) -> None:
    slow, failing, good = Receiver([None, None]), Receiver([500, 302, 429]), Receiver()
    expected = moves(world.adapters[0], world.adapters[1])

    async def play() -> None:
        async with slow.running(), failing.running(), good.running(), world.sending(slow, failing, good, timeout_s=0.5):
            await asyncio.to_thread(world.promote, 1)
            await asyncio.to_thread(world.registry.rollback, "omar", "too long", world.adapters[1])
            await until(lambda: all(len(dict.fromkeys(each.told())) == 6 for each in (slow, failing, good)))

    asyncio.run(play())
    for receiver in (slow, failing, good):
        assert list(dict.fromkeys(receiver.told())) == expected, "in order, some of them more than once"
    assert len(failing.seen) >= 9 and len(slow.seen) >= 8
    # The same id and the same bytes at every try, and the id is the event's.
    first, again = failing.seen[0], failing.seen[1]
    assert (first[0]["webhook-id"], first[1]) == (again[0]["webhook-id"], again[1])
    history = world.registry.aliases(100)["history"][1:]
    assert list(dict.fromkeys(headers["webhook-id"] for headers, _ in good.seen)) == [move["event_id"] for move in history]
    assert set(map(str, (move["event_id"] for move in history))) <= {event.event_id for event in world.registry.unsent(1000)}
    last = next(json.loads(body) for headers, body in good.seen if headers["webhook-id"] == history[-2]["event_id"])
    assert last["data"] | {"actor": "omar", "reason": "too long", "before": world.adapters[1]} == last["data"]


def test_one_that_is_away_is_told_when_it_is_back(world: World) -> None:
    """Moves go on meanwhile; another process goes on with the telling."""
    away = Receiver()

    async def play() -> None:
        async with away.running():
            pass  # it was there once, so its address is known; now nobody listens
        async with world.sending(away, tries=1000, max_retry_s=0.02):
            await asyncio.to_thread(world.promote, 1)
            ours, name = Deliveries(world.engine, "default"), name_of(world.settings(away).endpoints[0])
            await until(lambda: (due := ours.due(name)) is not None and due.tries >= 2)
        port = int(away.url.split(":")[2].split("/")[0])
        back = Receiver()
        runner = web.AppRunner(_app(back))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        async with world.sending(away, processes=2, tries=1000, max_retry_s=0.02):
            await until(lambda: len(dict.fromkeys(back.told())) == 4)
        await runner.cleanup()
        assert list(dict.fromkeys(back.told())) == moves(world.adapters[0], world.adapters[1])[:4]

    asyncio.run(play())


def _app(receiver: Receiver) -> web.Application:
    async def take(request: web.Request) -> web.Response:
        receiver.seen.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        return web.Response()

    app = web.Application()
    app.router.add_post("/{any:.*}", take)
    return app


def test_what_is_not_taken_is_given_up_with_a_record_and_the_next_goes_on(world: World) -> None:
    receiver = Receiver([500, 500, 500])

    async def play() -> None:
        async with receiver.running(), world.sending(receiver, tries=3):
            await asyncio.to_thread(world.promote, 1)
            await until(lambda: len(receiver.seen) == 6)

    asyncio.run(play())
    assert receiver.told()[3:] == moves(world.adapters[0], world.adapters[1])[1:4]
    (row,) = [row for row in audit.read(world.engine) if row["action"] == webhooks.GIVEN_UP]
    where = receiver.url.removesuffix("/hook?tenant=t")
    assert row["reason"] == f"{where} did not take the move of 'canary' in 3 tries: it answered 500"
    assert row["subject"] == receiver.seen[0][0]["webhook-id"] and audit.verify(world.engine)[1] is None


def test_what_cannot_be_read_does_not_bring_the_secret_path_into_the_audit(world: World) -> None:
    async def play() -> None:
        async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b"no HTTP at all\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(babble, "127.0.0.1", 0)
        receiver = Receiver(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook/s3cr3t?tenant=t")
        async with server, world.sending(receiver, tries=1):
            await asyncio.to_thread(world.promote, 1)
            await until(lambda: any(row["action"] == webhooks.GIVEN_UP for row in audit.read(world.engine)))

    asyncio.run(play())
    (told, *_) = [row["reason"] for row in audit.read(world.engine) if row["action"] == webhooks.GIVEN_UP]
    assert "did not take the move of 'canary' in 1 tries: no reply that can be read (ClientResponseError)" in told
    assert "s3cr3t" not in told and "tenant" not in told


def test_of_several_processes_one_sends(world: World) -> None:
    receiver = Receiver()

    async def play() -> None:
        async with receiver.running(), world.sending(receiver, processes=3):
            await asyncio.to_thread(world.promote, 1)
            await until(lambda: len(receiver.seen) >= 4)

    asyncio.run(play())
    assert receiver.told() == moves(world.adapters[0], world.adapters[1])[:4]


def test_who_comes_later_hears_of_later_moves_only(world: World) -> None:
    world.promote(1)
    receiver = Receiver()

    async def play() -> None:
        async with receiver.running(), world.sending(receiver):
            await asyncio.to_thread(world.registry.rollback, "omar", "x")
            await until(lambda: len(receiver.seen) >= 2)

    asyncio.run(play())
    assert [alias for _, alias, _ in receiver.told()] == ["stable", "previous"]


def test_the_signature_is_the_standards() -> None:
    # The standard's own test vector: id, timestamp, body and secret.
    endpoint = Webhook(url="https://x.example", secrets=(SecretStr("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), SecretStr(OLDER)))
    headers = signed(endpoint, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    first, second = headers["webhook-signature"].split(" ")
    assert first == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=" and second.startswith("v1,") and second != first
    assert headers["webhook-timestamp"] == "1614265330"


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ({"url": "http://10.0.0.1/x", "secrets": [SECRET]}, "is plain http to 10.0.0.1"),
        ({"url": "http://localhost.evil.example/x", "secrets": [SECRET]}, "is plain http to"),
        ({"url": "file:///etc/passwd", "secrets": [SECRET]}, "is no http or https URL"),
        ({"url": "https://ann:pw@x.example/", "secrets": [SECRET]}, "has a login"),
        ({"url": "https://x.example:port/", "secrets": [SECRET]}, "is no URL"),
        ({"url": "https://x.example/", "secrets": []}, "at least 1"),
        ({"url": "https://x.example/", "secrets": ["whsec_c2hvcnQ="]}, "24 to 64 random bytes"),
        ({"url": "https://x.example/", "secrets": ["plain"]}, "24 to 64 random bytes"),
    ],
)
def test_where_nothing_is_sent(endpoint: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        WebhookSettings.model_validate({"endpoints": [endpoint]})


def test_plain_http_must_be_meant_and_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from commands.settings import Settings

    inside = {"url": "http://receiver.default.svc/x", "secrets": [SECRET]}
    assert WebhookSettings.model_validate({"endpoints": [inside], "allow_http": True}).endpoints[0].signing_keys() == [bytes(range(24))]
    assert WebhookSettings.model_validate({"endpoints": [{"url": "http://[::1]:1/", "secrets": [SECRET]}]})
    monkeypatch.setenv("PLAUDIT__WEBHOOKS__ENDPOINTS", json.dumps({"url": "https://x.example", "secrets": [SECRET]}))
    with pytest.raises(ConfigError) as wrong:
        load(Settings)
    assert "webhooks.endpoints" in wrong.value.message and SECRET not in wrong.value.message
    monkeypatch.setenv("PLAUDIT__WEBHOOKS__ENDPOINTS", json.dumps([{"url": "https://x.example", "secrets": [SECRET]}]))
    assert SECRET not in load(Settings).model_dump_json()
