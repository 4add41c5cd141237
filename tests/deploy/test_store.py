"""Adapters in a place for all machines: found by digest, whole or not at all, and nothing else under that name."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from sqlalchemy import Engine

from deploy.manifest import MANIFEST, WEIGHTS, Manifest, verify, vllm_name
from deploy.registry import Registry
from deploy.store import AdapterStore
from feedback.errors import ConfigError, Conflict, NotDurable, NotFound, PlauditError

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    where = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path / 'store'}"
    yield where
    fs, root = fsspec.url_to_fs(where)
    if fs.exists(root):
        fs.rm(root, recursive=True)


@pytest.fixture
def adapter(tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter) -> tuple[str, Path]:
    return make_adapter(tiny_policy, tmp_path / "made", 1)


def put_file(url: str, name: str, content: bytes) -> None:
    fs, root = fsspec.url_to_fs(url)
    fs.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
    with fs.open(f"{root}/{name}", "wb") as file:
        file.write(content)


def test_another_machine_fetches_what_was_registered(url: str, tmp_path: Path, adapter: tuple[str, Path]) -> None:
    adapter_id, made = adapter
    AdapterStore(url, tmp_path / "one").put(made)
    other = AdapterStore(url, tmp_path / "two")
    fetched = other.fetch(adapter_id)
    assert fetched == tmp_path / "two" / adapter_id and verify(fetched) == adapter_id
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {path.name: path.read_bytes() for path in made.iterdir()}
    assert other.fetch(adapter_id) == fetched and sorted((tmp_path / "two").iterdir()) == [fetched], "nothing is left half"


def test_half_of_an_adapter_is_none_until_it_is_copied_again(url: str, tmp_path: Path, adapter: tuple[str, Path]) -> None:
    adapter_id, made = adapter
    put_file(url, f"{adapter_id}/{WEIGHTS}", b"the copy was killed here")
    store = AdapterStore(url, tmp_path / "two")
    with pytest.raises(NotFound, match="has no such adapter"):
        store.fetch(adapter_id)
    store.put(made)
    assert verify(store.fetch(adapter_id)) == adapter_id


def test_what_does_not_hash_to_its_digest_is_refused(url: str, tmp_path: Path, adapter: tuple[str, Path]) -> None:
    adapter_id, made = adapter
    store = AdapterStore(url, tmp_path / "two")
    store.put(made)
    weights = bytearray((made / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    put_file(url, f"{adapter_id}/{WEIGHTS}", bytes(weights))
    with pytest.raises(Conflict, match=r"adapter_model.safetensors of adapter .* its manifest says"):
        store.fetch(adapter_id)
    manifest = json.loads((made / MANIFEST).read_text())
    put_file(url, f"{adapter_id}/{MANIFEST}", json.dumps(manifest | {"seed": 99}).encode())
    with pytest.raises(Conflict, match=f"the store holds adapter .* under the name {adapter_id[:16]}"):
        store.fetch(adapter_id)
    put_file(url, f"{adapter_id}/{MANIFEST}", b"{")
    with pytest.raises(Conflict, match="is damaged"):
        store.fetch(adapter_id)
    assert list((tmp_path / "two").iterdir()) == []


def test_a_store_that_sends_without_end_fills_no_disk(
    url: str, tmp_path: Path, adapter: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_id, made = adapter
    AdapterStore(url, tmp_path / "one").put(made)
    put_file(url, f"{adapter_id}/{WEIGHTS}", bytes(3 << 20))
    monkeypatch.setattr("deploy.store.MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(Conflict, match=f"{WEIGHTS} of adapter {adapter_id[:16]} has more than 1048576 bytes, the most that is copied"):
        AdapterStore(url, tmp_path / "two").fetch(adapter_id)
    assert not list((tmp_path / "two").iterdir())


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", ".hidden", "a/b", "a\\b", "manifest.json", ""])
def test_a_manifest_cannot_name_a_file_elsewhere(name: str, tmp_path: Path, adapter: tuple[str, Path]) -> None:
    url = f"file://{tmp_path / 'store'}"
    manifest = Manifest.model_validate_json((adapter[1] / MANIFEST).read_bytes())
    hostile = manifest.model_copy(update={"files": {**manifest.files, name: "0" * 64}})
    put_file(url, f"{hostile.adapter_id}/{MANIFEST}", hostile.canonical())
    with pytest.raises(Conflict, match="no plain file name"):
        AdapterStore(url, tmp_path / "two").fetch(hostile.adapter_id)
    assert not (tmp_path / "escaped").exists()


def test_a_store_where_the_trainer_writes_copies_nothing(tmp_path: Path, adapter: tuple[str, Path]) -> None:
    adapter_id, made = adapter
    store = AdapterStore(str(made.parent), made.parent)
    before = sorted(path.stat().st_mtime_ns for path in made.iterdir())
    store.put(made)
    assert store.fetch(adapter_id) == made and sorted(path.stat().st_mtime_ns for path in made.iterdir()) == before


def test_places_that_cannot_be_used_are_named(tmp_path: Path, adapter: tuple[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"deploy\.store is 'nowhere://x', which cannot be used"):
        AdapterStore("nowhere://x", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotDurable, match="does not answer"):
        AdapterStore(f"file://{tmp_path / 'file'}", tmp_path / "two").put(adapter[1])


def test_a_replica_elsewhere_gets_it_by_digest_and_waits_for_nobody(
    database: Engine, tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter
) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    (stable, stable_path), (gone, gone_path) = (make_adapter(tiny_policy, tmp_path / "made", seed) for seed in (0, 1))
    here = Registry(database, store=AdapterStore(place, tmp_path / "made"))
    for adapter_id, path in ((stable, stable_path), (gone, gone_path)):
        here.register(adapter_id, path, "trainer")
    here.start_with(stable, "system")
    here.begin_rollout(gone, "controller")
    (tmp_path / "made").rename(tmp_path / "another machine's disk")
    fs, root = fsspec.url_to_fs(place)
    fs.rm(f"{root}/{gone}", recursive=True)
    there = Registry(database, store=AdapterStore(place, tmp_path / "replica"))
    assert there.adapter(stable).manifest.adapter_id == stable, "what it is stands in the registry"
    end = time.monotonic() + 20
    while vllm_name(stable) not in (wanted := there.wanted()):
        assert time.monotonic() < end
    assert wanted[vllm_name(stable)] == tmp_path / "replica" / stable and verify(wanted[vllm_name(stable)]) == stable
    assert vllm_name(gone) not in wanted, "what is in no store keeps nobody from the rest"


def test_nothing_is_registered_that_the_store_did_not_take(database: Engine, tmp_path: Path, adapter: tuple[str, Path]) -> None:
    (tmp_path / "file").write_text("")
    registry = Registry(database, store=AdapterStore(f"file://{tmp_path / 'file'}", tmp_path / "two"))
    with pytest.raises(PlauditError):
        registry.register(adapter[0], adapter[1], "trainer")
    assert registry.adapters() == [] and registry.unsent() == []
