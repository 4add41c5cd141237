"""An adapter is what its digest says: damage, foreign files and foreign tensors are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deploy.manifest import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    ManifestFields,
    base_config,
    base_digests,
    identity_adapter,
    read_manifest,
    verify,
    vllm_name,
    write_adapter,
)
from feedback.errors import Conflict, InvalidInput, NotFound

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]


def fields(policy: Path, **more: object) -> ManifestFields:
    return ManifestFields.model_validate(
        {"kind": "trained", "base_model": "tiny", "base": base_digests(policy), "temperature": 0.7, **more}
    )


@pytest.fixture
def stored(tiny_policy: Path, make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    return make_adapter(tiny_policy, tmp_path / "adapters", 1)[1]


@pytest.fixture
def source(stored: Path, tmp_path: Path) -> Path:
    """PEFT files as a trainer leaves them."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(stored / name, folder / name)
    return folder


def test_the_id_is_the_digest_of_what_was_written(tiny_policy: Path, source: Path, tmp_path: Path) -> None:
    adapter_id, path = write_adapter(source, tmp_path / "out", fields(tiny_policy))
    assert path == tmp_path / "out" / adapter_id and len(adapter_id) == 64
    assert verify(path) == adapter_id == read_manifest(path).adapter_id
    assert (path / MANIFEST).read_bytes() == read_manifest(path).canonical()
    assert sorted(item.name for item in path.iterdir()) == [CONFIG, WEIGHTS, MANIFEST]
    assert [item.name for item in (tmp_path / "out").iterdir()] == [adapter_id], "nothing half-written is left"


def test_the_same_adapter_is_the_same_folder_and_another_seed_is_not(tiny_policy: Path, source: Path, tmp_path: Path) -> None:
    first = write_adapter(source, tmp_path / "out", fields(tiny_policy, seed=1))
    assert write_adapter(source, tmp_path / "out", fields(tiny_policy, seed=1)) == first
    assert write_adapter(source, tmp_path / "out", fields(tiny_policy, seed=2))[0] != first[0]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_one_flipped_bit_is_noticed(stored: Path, name: str) -> None:
    (stored / name).chmod(0o644)
    damaged = bytearray((stored / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (stored / name).write_bytes(damaged)
    with pytest.raises(Conflict, match=name):
        verify(stored)


def test_a_changed_manifest_is_another_adapter(stored: Path) -> None:
    (stored / MANIFEST).chmod(0o644)
    told = json.loads((stored / MANIFEST).read_text())
    (stored / MANIFEST).write_text(json.dumps({**told, "temperature": 0.1}))
    with pytest.raises(Conflict, match="holds the adapter"):
        verify(stored)
    (stored / MANIFEST).write_text("{}")
    with pytest.raises(Conflict, match="is damaged"):
        verify(stored)


def test_a_foreign_or_missing_file_is_noticed(stored: Path) -> None:
    (stored / "value_head.bin").write_bytes(b"x")
    with pytest.raises(Conflict, match=r"value_head\.bin"):
        verify(stored)
    (stored / "value_head.bin").unlink()
    (stored / MANIFEST).unlink()
    with pytest.raises(NotFound, match="so it is no adapter"):
        verify(stored)


def test_heads_stay_in_the_trainer(tiny_policy: Path, source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / WEIGHTS)
    save_file({**tensors, "value_head.weight": np.zeros((1, 8), np.float32)}, source / WEIGHTS)
    with pytest.raises(InvalidInput, match=r"value_head\.weight"):
        write_adapter(source, tmp_path / "out", fields(tiny_policy))
    assert not (tmp_path / "out").exists()


def test_only_lora_is_served(tiny_policy: Path, source: Path, tmp_path: Path) -> None:
    (source / CONFIG).write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(InvalidInput, match="peft_type is 'IA3'") as caught:
        write_adapter(source, tmp_path / "out", fields(tiny_policy))
    assert caught.value.field == "peft_type"
    (source / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(InvalidInput, match="is no PEFT adapter"):
        write_adapter(source, tmp_path / "out", fields(tiny_policy))


def test_the_identity_adapter_changes_nothing(tiny_policy: Path, tmp_path: Path) -> None:
    _, path = identity_adapter(tiny_policy, tmp_path / "out", fields(tiny_policy, kind="identity"), rank=2)
    tensors = load_file(path / WEIGHTS)
    # 2 layers x 7 linear layers x (A, B)
    assert len(tensors) == 28
    shapes = {name.split(".layers.0.")[1]: tensor.shape for name, tensor in tensors.items() if ".layers.0." in name}
    # hidden 8, 2 heads of 4, 1 key-value head of 4, inner 16; A is rank x in, B is out x rank
    assert shapes["self_attn.q_proj.lora_A.weight"] == (2, 8) and shapes["self_attn.q_proj.lora_B.weight"] == (8, 2)
    assert shapes["self_attn.k_proj.lora_B.weight"] == (4, 2) and shapes["self_attn.v_proj.lora_B.weight"] == (4, 2)
    assert shapes["mlp.gate_proj.lora_B.weight"] == (16, 2) and shapes["mlp.down_proj.lora_A.weight"] == (2, 16)
    for name, tensor in tensors.items():
        assert bool(np.any(tensor)) == ("lora_A" in name), "B = 0 makes the change A·B nothing; A is drawn so that it can learn"


def test_the_name_is_the_ids_and_the_baselines_is_its_own() -> None:
    adapter_id = "0123456789abcdef" * 4
    assert vllm_name(adapter_id) == "a-0123456789abcdef"
    assert vllm_name(adapter_id, "r7") == "a-0123456789abcdef-br7"


def test_what_is_no_model_is_refused_in_words(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="which is no folder"):
        base_config(tmp_path / "nothing")
    (tiny_policy / "tokenizer.json").unlink()
    with pytest.raises(InvalidInput, match=r"has no tokenizer\.json"):
        base_config(tiny_policy)
    (tiny_policy / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match="which is no model"):
        base_config(tiny_policy)
    (tiny_policy / "config.json").write_text("no json")
    with pytest.raises(InvalidInput, match=r"no readable config\.json"):
        base_config(tiny_policy)


def test_another_base_model_has_another_digest(tiny_policy: Path) -> None:
    before = base_digests(tiny_policy)
    save_file({"model.embed_tokens.weight": np.ones((4, 8), np.float32)}, tiny_policy / "model.safetensors")
    after = base_digests(tiny_policy)
    assert after.weights != before.weights and after.tokenizer == before.tokenizer
    (tiny_policy / "chat_template.jinja").write_text("{{ messages }}")
    assert base_digests(tiny_policy).template != before.template


def test_a_folder_that_is_or_holds_an_adapter_is_no_base(tiny_policy: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    _, adapter = make_adapter(tiny_policy, tmp_path / "adapters", 1)
    shutil.copytree(tiny_policy, with_config := tmp_path / "with-config")
    shutil.copyfile(adapter / CONFIG, with_config / CONFIG)
    shutil.copytree(tiny_policy, with_weights := tmp_path / "with-weights")
    shutil.copyfile(adapter / WEIGHTS, with_weights / WEIGHTS)
    for folder, named in ((adapter, CONFIG), (with_config, CONFIG), (with_weights, WEIGHTS)):
        with pytest.raises(InvalidInput, match=rf"holds an adapter \({named}\).*merge it into its model"):
            base_digests(folder)
    base_digests(tiny_policy)
