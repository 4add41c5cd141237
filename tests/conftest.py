"""What several rooms' tests stand on: a folder that looks like a model, adapters, one vLLM, Kafka and PostgreSQL for the whole run."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from postgres_world import Postgres, binaries
from safetensors.numpy import load_file, save_file
from sqlalchemy import Engine

from deploy import broker
from deploy.config import EngineSettings
from deploy.manifest import CONFIG, WEIGHTS, ManifestFields, base_digests, identity_adapter, write_adapter
from deploy.registry import Registry
from deploy.replica import VllmServer
from feedback.database import open_database

ROOT = Path(__file__).resolve().parent.parent
CONCIERGE = ROOT / "examples" / "concierge" / "policy"


@pytest.fixture
def tiny_policy(tmp_path: Path) -> Path:
    """A folder that is a model as far as its files tell: two layers, hidden size 8. No server could run it."""
    policy = tmp_path / "tiny"
    policy.mkdir()
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    (policy / "config.json").write_text(json.dumps(shape))
    (policy / "tokenizer.json").write_text("{}")
    save_file({"model.embed_tokens.weight": np.zeros((4, 8), np.float32)}, policy / "model.safetensors")
    return policy


@pytest.fixture(scope="session")
def make_adapter() -> Callable[[Path, Path, int], tuple[str, Path]]:
    """(policy, store, seed) -> (id, folder). Seed 0 is the adapter that changes nothing, others change the policy at random."""

    def make(policy: Path, store: Path, seed: int) -> tuple[str, Path]:
        fields = ManifestFields(kind="identity", base_model="test", base=base_digests(policy), temperature=1.0)
        adapter_id, path = identity_adapter(policy, store, fields)
        if seed == 0:
            return adapter_id, path
        draw = np.random.default_rng(seed)
        source = store / f".source-{seed}"
        source.mkdir()
        change = {
            name: (0.5 * draw.standard_normal(tensor.shape)).astype(np.float32) if "lora_B" in name else tensor
            for name, tensor in sorted(load_file(path / WEIGHTS).items())
        }
        save_file(change, source / WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(path / CONFIG, source / CONFIG)
        try:
            return write_adapter(source, store, fields.model_copy(update={"kind": "trained", "seed": seed}))
        finally:
            shutil.rmtree(source)

    return make


@pytest.fixture(scope="session")
def vllm_concierge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """One real vLLM that serves the tiny policy, for the whole run; whoever uses it leaves it running."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    if not (CONCIERGE / "config.json").is_file():
        pytest.skip("examples/concierge/policy holds no model; make it with python -m examples.concierge.train_policy")
    server = VllmServer(CONCIERGE, "base", EngineSettings(threads=2), tmp_path_factory.mktemp("vllm"), max_model_len=128)
    asyncio.run(server.start())
    try:
        yield server
    finally:
        asyncio.run(server.stop())


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[broker.Broker]:
    """One real Kafka for the whole run. Who stops it starts it again."""
    if (lacking := broker.missing()) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no Kafka under CI=true: {lacking}")
        pytest.skip(f"no Kafka here: {lacking}")
    node = broker.Broker(tmp_path_factory.mktemp("kafka"))
    node.start()
    try:
        yield node
    finally:
        node.stop()


@pytest.fixture
def sockets_collected() -> Iterator[None]:
    """Kafka's client leaves some sockets to the garbage collector, which must not be blamed on a later test."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for the whole run."""
    found = binaries()
    if found is None:
        assert os.environ.get("CI") != "true", "CI must test on PostgreSQL: install it (initdb, pg_ctl)"
        pytest.skip("no PostgreSQL on this machine (initdb, pg_ctl)")
    server = Postgres(found)
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.sqlite'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new()


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def adapters(tmp_path: Path, tiny_policy: Path, make_adapter: Callable[[Path, Path, int], tuple[str, Path]]) -> list[tuple[str, Path]]:
    return [make_adapter(tiny_policy, tmp_path / "adapters", seed) for seed in (0, 1, 2)]


@pytest.fixture
def registry(database: Engine, adapters: list[tuple[str, Path]]) -> Registry:
    """With a stable and two candidates."""
    made = Registry(database)
    for adapter, path in adapters:
        made.register(adapter, path, "trainer")
    made.start_with(adapters[0][0], "system")
    return made
