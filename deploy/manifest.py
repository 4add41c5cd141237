"""What an adapter is: a directory of PEFT files and a manifest whose SHA-256 is its name.

    <adapters>/<64 hex digits>/adapter_config.json
                               adapter_model.safetensors
                               manifest.json               written last: no manifest, no adapter

Everything found out later (gates, reports, approvals) is an attestation in the registry, keyed by the id.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from feedback.errors import Conflict, InvalidInput, NotFound
from feedback.files import sync

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"
LINEAR = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""The linear layers of a Llama block and the module that holds each."""


class BaseModelDigests(BaseModel):
    """Which model an adapter belongs to, by content and not by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    """SHA-256 over the model's configuration and weight files."""
    tokenizer: str
    template: str


class ManifestFields(BaseModel):
    """What the maker of an adapter says about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["identity", "trained"]
    base_model: str
    """The policy's name, for people."""
    base: BaseModelDigests
    temperature: float
    """The policy is the distribution at this temperature, so it is served at it."""
    system_prompt: str | None = None
    max_tokens: int | None = None
    snapshot: str | None = None
    reward_model: str | None = None
    settings: dict[str, JsonValue] = {}
    code_version: str = ""
    seed: int = 0


class Manifest(ManifestFields):
    """What is written beside the weights."""

    format: Literal[1] = 1
    peft: dict[str, JsonValue]
    """The PEFT configuration, as in its file."""
    files: dict[str, str]
    """SHA-256 of every file."""

    def canonical(self) -> bytes:
        """The bytes whose SHA-256 is the adapter's id: sorted keys, no spaces, UTF-8."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def adapter_id(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()


def vllm_name(adapter_id: str, rollout: str | None = None) -> str:
    """The name under which the server knows these weights; a name never means others.

    The baseline arm of a rollout has a name of its own: the same weights with a cache of their own, so that a canary
    with a cold cache is compared with a baseline that began as cold.
    """
    name = f"a-{adapter_id[:16]}"
    return name if rollout is None else f"{name}-b{rollout}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(files: list[Path]) -> str:
    lines = "".join(f"{path.name} {file_digest(path)}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def base_config(policy: Path) -> dict[str, JsonValue]:
    """The model's `config.json`. Raises InvalidInput where the folder is no model."""
    if not policy.is_dir():
        raise InvalidInput(
            f"policy.base is {str(policy)!r}, which is no folder; a model folder holds config.json and *.safetensors", field="policy.base"
        )
    if lora := _adapter_in(policy):
        raise InvalidInput(
            f"policy.base is {str(policy)!r}, which holds an adapter ({lora}); an adapter on top of another is neither trained nor "
            "served: merge it into its model (peft: merge_and_unload, save_pretrained) and name the merged folder",
            field="policy.base",
        )
    try:
        config: dict[str, JsonValue] = json.loads((policy / "config.json").read_text())
    except (OSError, ValueError) as exc:
        raise InvalidInput(
            f"policy.base is {str(policy)!r}, which has no readable config.json, so it is no model", field="policy.base"
        ) from exc
    if not isinstance(config, dict) or not config.get("hidden_size") or not any(policy.glob("*.safetensors")):
        raise InvalidInput(
            f"policy.base is {str(policy)!r}, which is no model: it needs a config.json with hidden_size and *.safetensors",
            field="policy.base",
        )
    if not (policy / "tokenizer.json").is_file() and not (policy / "tokenizer_config.json").is_file():
        raise InvalidInput(f"policy.base is {str(policy)!r}, which has no tokenizer.json", field="policy.base")
    return config


def _adapter_in(policy: Path) -> str | None:
    """The file that makes this folder an adapter, or a model with one inside, if any does. Loaders would put it on top unasked."""
    if (policy / CONFIG).exists():
        return CONFIG
    for path in sorted(policy.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as tensors:
                if any("lora_" in name for name in tensors.keys()):  # noqa: SIM118  (no mapping)
                    return path.name
        except (OSError, SafetensorError):
            continue  # whoever loads it will say what is wrong with it
    return None


def base_digests(policy: Path) -> BaseModelDigests:
    """Digests of the base model, its tokenizer and its chat template."""
    base_config(policy)
    tokenizer = [
        path for path in policy.iterdir() if path.is_file() and path.name.startswith(("tokenizer", "vocab", "merges", "special_tokens"))
    ]
    template = policy / "chat_template.jinja"
    return BaseModelDigests(
        weights=_digest_of([policy / "config.json", *policy.glob("*.safetensors")]),
        tokenizer=_digest_of(tokenizer),
        template=file_digest(template)
        if template.is_file()
        else _digest_of([path for path in tokenizer if path.name == "tokenizer_config.json"]),
    )


def write_adapter(source: Path, out_root: Path, fields: ManifestFields) -> tuple[str, Path]:
    """Take the PEFT files of `source` into the store and return the adapter's id and folder.

    Written to a temporary name, fsynced, manifest last, renamed: a reader sees all of it or nothing. Writing the same
    adapter twice gives the same folder. Raises InvalidInput where the files are no LoRA adapter or hold more than one.
    """
    peft = _checked_peft(source)
    out_root.mkdir(parents=True, exist_ok=True)
    staging = out_root / f".staging-{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, staging / name)
        files = {name: file_digest(staging / name) for name in (CONFIG, WEIGHTS)}
        manifest = Manifest(**fields.model_dump(), peft=peft, files=files)
        (staging / MANIFEST).write_bytes(manifest.canonical())
        for name in (CONFIG, WEIGHTS, MANIFEST):
            (staging / name).chmod(0o444)
            sync(staging / name)
        sync(staging)
        target = out_root / manifest.adapter_id
        try:
            staging.rename(target)
        except OSError:
            # The folder is there already and full: the same id means the same bytes, or the store is damaged.
            verify(target)
        sync(out_root)
        return manifest.adapter_id, target
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(staging)


def read_manifest(path: Path) -> Manifest:
    """The manifest of an adapter's folder. Raises NotFound where there is none, Conflict where it cannot be read."""
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError as exc:
        raise NotFound(f"{path} has no {MANIFEST}, so it is no adapter") from exc
    except ValidationError as exc:
        problem = exc.errors()[0]
        raise Conflict(f"{path / MANIFEST} is damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from exc


def verify(path: Path) -> str:
    """The id of the adapter in this folder, after every file was hashed again. Raises Conflict on any difference."""
    manifest = read_manifest(path)
    present = {item.name for item in path.iterdir()} - {MANIFEST}
    if present != set(manifest.files):
        raise Conflict(f"adapter {path.name[:16]} holds {sorted(present)}, its manifest names {sorted(manifest.files)}")
    for name, digest in manifest.files.items():
        if (found := file_digest(path / name)) != digest:
            raise Conflict(f"adapter {path.name[:16]}: {name} has SHA-256 {found[:16]}…, its manifest says {digest[:16]}…")
    if manifest.adapter_id != path.name:
        raise Conflict(f"folder {path.name[:16]} holds the adapter {manifest.adapter_id[:16]}")
    return manifest.adapter_id


def identity_adapter(policy: Path, out_root: Path, fields: ManifestFields, rank: int = 8) -> tuple[str, Path]:
    """The adapter that changes nothing (B = 0), under which the base model is served.

    The model server's CPU backend gives tokens of the bare base model the last adapter's change when both are in one
    batch, so base is never asked bare. Works on models laid out like Llama; raises InvalidInput on others.
    """
    config = base_config(policy)
    staging = out_root / f".identity-{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    try:
        save_file(_zero_change(config, rank), staging / WEIGHTS, metadata={"format": "pt"})
        (staging / CONFIG).write_text(json.dumps(peft_config(rank, 2 * rank), sort_keys=True, indent=1))
        return write_adapter(staging, out_root, fields)
    finally:
        shutil.rmtree(staging)


def peft_config(rank: int, alpha: int) -> dict[str, JsonValue]:
    """PEFT's `adapter_config.json` for a plain LoRA on all linear layers."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list[JsonValue](sorted(LINEAR)),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def linear_shapes(config: Mapping[str, object]) -> tuple[int, dict[str, tuple[int, int]]]:
    """How many layers a model laid out like Llama has, and for each linear layer of a block (inputs, outputs)."""
    sizes = {key: value for key, value in config.items() if isinstance(value, int)}
    try:
        hidden, heads, layers, inner = (
            sizes[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
        )
    except KeyError as exc:
        raise InvalidInput(
            f"policy.base: config.json has no {exc.args[0]}; only models laid out like Llama are served", field="policy.base"
        ) from exc
    head = sizes.get("head_dim", hidden // heads)
    keys = sizes.get("num_key_value_heads", heads) * head
    return layers, {
        "q_proj": (hidden, heads * head),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (heads * head, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def _zero_change(config: Mapping[str, JsonValue], rank: int) -> dict[str, np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    layers, shapes = linear_shapes(config)
    draw = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for name, (wide_in, wide_out) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{LINEAR[name]}.{name}"
            # A is drawn and not zero, so that training may start from this adapter; B = 0 alone makes the change nothing.
            tensors[f"{key}.lora_A.weight"] = (draw.standard_normal((rank, wide_in)) / np.sqrt(wide_in)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = np.zeros((wide_out, rank), np.float32)
    return tensors


def _checked_peft(source: Path) -> dict[str, JsonValue]:
    """The PEFT configuration, once the weights are safetensors and nothing but LoRA pairs."""
    try:
        peft: dict[str, JsonValue] = json.loads((source / CONFIG).read_text())
        with safe_open(source / WEIGHTS, framework="numpy") as tensors:
            names = list(tensors.keys())
    except (OSError, ValueError, SafetensorError) as exc:
        raise InvalidInput(f"{source} is no PEFT adapter: {CONFIG} and {WEIGHTS} are needed ({exc})") from exc
    if peft.get("peft_type") != "LORA":
        raise InvalidInput(f"{source / CONFIG}: peft_type is {peft.get('peft_type')!r}, only 'LORA' is served", field="peft_type")
    foreign = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign or not names:
        raise InvalidInput(
            f"{source / WEIGHTS} must hold LoRA weights only, it holds {foreign[:3] or 'nothing'}: "
            "value and reward heads stay in the trainer"
        )
    return peft
