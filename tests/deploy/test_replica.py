"""What is loaded was verified, what died comes back, and a server that cannot start says why."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from deploy.config import EngineSettings
from deploy.engine import VLLM, Engine, Scripted
from deploy.loading import Intake
from deploy.manifest import WEIGHTS, vllm_name
from deploy.replica import ReplicaAgent, VllmServer, fast_dtype
from feedback.errors import ConfigError, EngineUnavailable, InvalidInput

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]


class Table:
    """Stands for the registry: what is wanted, and what was reported."""

    def __init__(self) -> None:
        self.names: dict[str, Path] = {}
        self.held: set[str] = set()
        self.reports: list[set[str]] = []

    def wanted(self) -> dict[str, Path]:
        return dict(self.names)

    def report(self, names: set[str]) -> None:
        self.held = names
        self.reports.append(names)

    async def until(self, task: asyncio.Task[None], held: set[str], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while self.held != held:
                assert not task.done(), "the agent ended"
                await asyncio.sleep(0.01)


def scripted() -> Scripted:
    return Scripted(lambda name, messages: f"{name} speaks")


def agent(engine: Engine, table: Table, intake: Intake, drain_s: float = 0.0) -> ReplicaAgent:
    return ReplicaAgent(engine, None, table.wanted, table.report, drain_s, intake, tick_s=0.01)


def sources(loaded: dict[str, Path]) -> dict[str, str]:
    """For each name the adapter whose private copy the server was told."""
    return {name: folder.name.partition("-")[0] for name, folder in loaded.items()}


def ids(wanted: dict[str, Path]) -> dict[str, str]:
    return {name: path.name for name, path in wanted.items()}


@pytest.fixture
def intake(tiny_policy: Path, tmp_path: Path) -> Intake:
    return Intake.of(tiny_policy, tmp_path / "private", 8)


@pytest.fixture
def two(tiny_policy: Path, make_adapter: MakeAdapter, tmp_path: Path) -> dict[str, Path]:
    made = [make_adapter(tiny_policy, tmp_path / "adapters", seed) for seed in (0, 1)]
    return {vllm_name(adapter_id): path for adapter_id, path in made}


def test_it_loads_what_is_wanted_and_forgets_what_is_not(two: dict[str, Path], intake: Intake) -> None:
    table, engine = Table(), scripted()
    first, second = two
    baseline = f"{first}-br1"

    async def check() -> None:
        table.names = {**two, baseline: two[first]}
        task = asyncio.create_task(agent(engine, table, intake).run())
        await table.until(task, {first, second, baseline})
        assert sources(await engine.models()) == ids(table.names)
        del table.names[second]
        await table.until(task, {first, baseline})
        async with asyncio.timeout(5):
            while second in await engine.models():
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(check())


def test_a_name_that_nobody_wants_stays_for_the_drain_time(two: dict[str, Path], intake: Intake) -> None:
    table, engine = Table(), scripted()
    table.names = dict(two)
    first, second = two

    async def check() -> None:
        replica = agent(engine, table, intake, drain_s=3600.0)
        await replica.step()
        del table.names[second]
        await replica.step()
        assert set(await engine.models()) == {first, second}
        assert table.held == {first, second}

    asyncio.run(check())


def test_damaged_weights_are_never_loaded(two: dict[str, Path], intake: Intake) -> None:
    table, engine = Table(), scripted()
    first, second = two
    weights = two[second] / WEIGHTS
    weights.chmod(0o644)
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    table.names = dict(two)

    async def check() -> None:
        replica = agent(engine, table, intake)
        await replica.step()
        assert set(await engine.models()) == {first} == table.held
        assert list(replica.problems) == [second]
        assert WEIGHTS in replica.problems[second] and "its manifest says" in replica.problems[second]

    asyncio.run(check())


def test_a_name_never_means_other_weights(two: dict[str, Path], intake: Intake) -> None:
    table, engine = Table(), scripted()
    first, second = two

    async def check() -> None:
        # The folder is sound, but another adapter's.
        table.names = {first: two[second]}
        replica = agent(engine, table, intake)
        await replica.step()
        assert await engine.models() == {} and "whose name is" in replica.problems[first]
        # Somebody else loaded the name from another folder: it is loaded again from the verified one.
        await engine.load(first, two[second])
        table.names = {first: two[first]}
        replica = agent(engine, table, intake)
        await replica.step()
        assert sources(await engine.models()) == {first: two[first].name}
        assert table.held == {first} and replica.problems == {}

    asyncio.run(check())


def test_a_copy_that_changes_while_it_is_held_is_held_no_more(two: dict[str, Path], intake: Intake) -> None:
    """The server reads folders again whenever it made room for others, so a change after loading counts too."""
    table, engine = Table(), scripted()
    table.names = dict(two)
    first, _ = two

    async def check() -> None:
        replica = agent(engine, table, intake)
        await replica.step()
        before = (await engine.models())[first]
        (before / WEIGHTS).chmod(0o644)
        (before / WEIGHTS).write_bytes(b"anything")
        await replica.step()
        after = (await engine.models())[first]
        assert after != before and intake.unchanged(after) and table.held == set(two)
        await replica.step()
        assert before not in intake.kept(), "what was changed goes"

    asyncio.run(check())


def test_a_copy_that_changes_while_the_server_reads_it_is_not_held(two: dict[str, Path], intake: Intake) -> None:
    class Touched(Scripted):
        async def load(self, name: str, path: Path) -> None:
            (path / "more").touch()
            (path / "more").unlink()
            await super().load(name, path)

    table, engine = Table(), Touched(lambda name, messages: "")
    table.names = dict(two)

    async def check() -> None:
        replica = agent(engine, table, intake)
        await replica.step()
        assert await engine.models() == {} and table.held == set()
        assert all("was changed while the server loaded it" in problem for problem in replica.problems.values())

    asyncio.run(check())


def test_what_answers_are_written_with_stays_and_its_folder_longer(two: dict[str, Path], intake: Intake) -> None:
    table, engine = Table(), scripted()
    table.names = dict(two)
    first, second = two

    def kept() -> set[str]:
        return {folder.name.partition("-")[0] for folder in intake.kept()}

    async def check() -> None:
        replica = agent(engine, table, intake)
        await replica.step()
        async with engine.stream({"model": second, "messages": []}):
            del table.names[second]
            for _ in range(3):
                await replica.step()
            assert set(await engine.models()) == set(two), "unloaded only when nobody has it in flight"
        await replica.step()
        assert set(await engine.models()) == {first} and kept() == {path.name for path in two.values()}
        await replica.step()
        assert kept() == {two[first].name}, "its folder goes later still"

    asyncio.run(check())


def test_a_new_agent_beside_a_server_that_went_on_keeps_its_folders(two: dict[str, Path], intake: Intake, tiny_policy: Path) -> None:
    table, engine = Table(), scripted()
    table.names = dict(two)

    async def check() -> None:
        await agent(engine, table, intake).step()
        before = await engine.models()
        await agent(engine, table, Intake.of(tiny_policy, intake.root, 8)).step()
        assert await engine.models() == before and table.held == set(two)

    asyncio.run(check())


def test_what_a_restarted_server_forgot_is_loaded_again(two: dict[str, Path], intake: Intake) -> None:
    table, engine = Table(), scripted()
    table.names = dict(two)

    async def check() -> None:
        task = asyncio.create_task(agent(engine, table, intake).run())
        await table.until(task, set(two))
        engine.up = False
        await table.until(task, set())
        for name in two:  # what a restart does
            engine.loaded.pop(name)
        engine.up = True
        await table.until(task, set(two))
        assert sources(await engine.models()) == ids(two)
        task.cancel()

    asyncio.run(check())


def test_a_registry_that_is_away_changes_nothing(two: dict[str, Path], intake: Intake) -> None:
    table, engine = Table(), scripted()
    table.names = dict(two)
    away, failures = False, 0

    def wanted() -> dict[str, Path]:
        nonlocal failures
        if away:
            failures += 1
            raise OSError("the database is away")
        return table.wanted()

    async def failed_looks(count: int) -> None:
        async with asyncio.timeout(10):
            while failures <= count:
                await asyncio.sleep(0.01)

    async def check() -> None:
        nonlocal away
        task = asyncio.create_task(ReplicaAgent(engine, None, wanted, table.report, 0.0, intake, tick_s=0.01).run())
        await table.until(task, set(two))
        away = True
        await failed_looks(3)
        assert set(await engine.models()) == set(two) and not task.done()
        task.cancel()

    with capture_logs() as told:
        asyncio.run(check())
    assert [line["problem"] for line in told] == ["the database is away"]  # once, not at every look


def test_a_port_that_is_taken_is_one_clear_error(tiny_policy: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = VllmServer(tiny_policy, "base", EngineSettings(port=port), tmp_path / "server")
        with pytest.raises(ConfigError, match=f"engine.port is {port}, which is taken") as caught:
            asyncio.run(server.start())
    assert caught.value.field == "engine.port"
    assert not server.alive()


def test_a_folder_that_is_no_model_is_one_clear_error(tmp_path: Path) -> None:
    server = VllmServer(tmp_path / "nothing", "base", EngineSettings(), tmp_path / "server")
    with pytest.raises(InvalidInput, match="which is no folder"):
        asyncio.run(server.start())


class Broken(VllmServer):
    """Ends at once, with something to say."""

    def command(self) -> list[str]:
        return ["/bin/sh", "-c", "echo the first line; echo no memory left; exit 3"]


class Mute(VllmServer):
    """Starts a child and never answers."""

    def command(self) -> list[str]:
        return ["/bin/sh", "-c", "sleep 600 & echo $! > child.pid; wait"]


def test_a_server_that_ends_at_its_start_says_why(tiny_policy: Path, tmp_path: Path) -> None:
    server = Broken(tiny_policy, "base", EngineSettings(), tmp_path / "server")
    with pytest.raises(EngineUnavailable) as caught:
        asyncio.run(server.start())
    assert "ended with 3 while it started" in caught.value.message
    assert "no memory left" in caught.value.message and str(server.log_path) in caught.value.message


def gone(pid: int) -> bool:
    """Whether a process is no more, or only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_server_that_does_not_answer_in_time_leaves_nothing_behind(tiny_policy: Path, tmp_path: Path) -> None:
    server = Mute(tiny_policy, "base", EngineSettings(start_timeout_s=1.0), tmp_path / "server")
    with pytest.raises(EngineUnavailable, match="start_timeout_s is 1"):
        asyncio.run(server.start())
    child = int((tmp_path / "server" / "child.pid").read_text())
    deadline = time.monotonic() + 5
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone(child) and not server.alive()


def test_a_server_left_by_a_killed_run_is_ended_first(tiny_policy: Path, tmp_path: Path) -> None:
    async def check() -> None:
        left = Mute(tiny_policy, "base", EngineSettings(start_timeout_s=30.0), tmp_path / "server")
        starting = asyncio.create_task(left.start())
        async with asyncio.timeout(10):
            while not (tmp_path / "server" / "vllm.pid").exists() or not (tmp_path / "server" / "child.pid").exists():
                await asyncio.sleep(0.01)
        pid = left.pid
        assert pid is not None and not gone(pid)
        with pytest.raises(EngineUnavailable):  # of the second one, which ends by itself
            await Broken(tiny_policy, "base", EngineSettings(), tmp_path / "server").start()
        assert gone(pid)
        with pytest.raises(EngineUnavailable):
            await starting

    asyncio.run(check())


def test_bfloat16_only_where_the_processor_has_it(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("flags : fpu avx2 avx512f\n")
    assert fast_dtype(info) == "float32"
    info.write_text("flags : fpu avx2 avx512f avx512_bf16\n")
    assert fast_dtype(info) == "bfloat16"
    assert fast_dtype(tmp_path / "none") == "float32"


class Lent(VllmServer):
    """The whole run's server in one agent's hands: it may be restarted, but not ended for good."""

    def __init__(self, server: VllmServer) -> None:
        self.__dict__ = server.__dict__

    async def stop(self, grace_s: float | None = None) -> None:
        if grace_s is not None:
            await super().stop(grace_s)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_vllm_comes_back_with_its_adapters(vllm_concierge: VllmServer, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """SIGKILL, which leaves its engine behind; the agent starts it again and loads both adapters anew."""
    server, table = Lent(vllm_concierge), Table()
    made = [make_adapter(server.policy, tmp_path / "adapters", seed) for seed in (0, 1)]
    table.names = {vllm_name(adapter_id): path for adapter_id, path in made}

    async def said(engine: VLLM) -> list[str]:
        body = {"messages": [{"role": "user", "content": "Where can I eat?"}], "max_tokens": 8, "temperature": 0}
        replies = [await engine.complete({**body, "model": name}) for name in table.names]
        return [reply["choices"][0]["message"]["content"] for reply in replies]

    async def check() -> None:
        engine = VLLM(server.url)
        task = asyncio.create_task(
            ReplicaAgent(engine, server, table.wanted, table.report, 60.0, Intake.of(server.policy, tmp_path / "private", 8)).run()
        )
        try:
            await table.until(task, set(table.names))
            before, pid = await said(engine), server.pid
            assert pid is not None and before[0] != before[1]
            os.kill(pid, signal.SIGKILL)
            await table.until(task, set())
            await table.until(task, set(table.names), timeout_s=400)
            assert server.pid != pid
            assert await said(engine) == before
            for name in table.names:
                await engine.unload(name)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await engine.close()

    asyncio.run(check())
