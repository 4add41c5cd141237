"""An adapter in parts, to be put together by hand and sealed with digests and an id that fit: what `benchmarks/hostile.py` spoils."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from deploy.manifest import CONFIG, LINEAR, MANIFEST, WEIGHTS, ManifestFields, base_digests, linear_shapes, peft_config

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
RANK, MAX_RANK = 4, 8

Json = dict[str, Any]
Header = dict[str, Any]


def make_policy(folder: Path) -> Path:
    """A folder that is a model as far as its files tell."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"model.embed_tokens.weight": np.zeros((4, 32), np.float32)}, folder / "model.safetensors")
    return folder


def pack(header: Header | bytes, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file, as its parts say."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


@dataclass
class Adapter:
    """The parts of an adapter before it is sealed."""

    folder: Path
    """Where it will lie; itself named by its id."""
    manifest: Json
    config: Json
    header: Header
    body: bytes
    config_raw: bytes | None = None
    weights_raw: bytes | None = None

    def seal(self, *, manifest: Callable[[Json], Json | bytes] | None = None, name: str | None = None) -> Path:
        """Write it with digests and an id that fit. `manifest` may change the manifest after the digests were computed."""
        config = json.dumps(self.config).encode() if self.config_raw is None else self.config_raw
        weights = pack(self.header, self.body) if self.weights_raw is None else self.weights_raw
        files = {CONFIG: hashlib.sha256(config).hexdigest(), WEIGHTS: hashlib.sha256(weights).hexdigest()}
        fitting: Json = {**self.manifest, "peft": self.config, "files": files, "format": 1}
        told = fitting if manifest is None else manifest(fitting)
        raw = told if isinstance(told, bytes) else canonical(told)
        path = self.folder / (name or hashlib.sha256(raw).hexdigest())
        path.mkdir(parents=True)
        for file, content in ((CONFIG, config), (WEIGHTS, weights), (MANIFEST, raw)):
            (path / file).write_bytes(content)
        return path


def canonical(told: Json) -> bytes:
    return json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def honest(policy: Path, folder: Path, seed: int = 0) -> Adapter:
    """An adapter with nothing wrong."""
    draw = np.random.default_rng(seed)
    layers, shapes = linear_shapes(SHAPE)
    header: Header = {"__metadata__": {"format": "pt"}}
    body = b""
    for layer in range(layers):
        for module, (wide_in, wide_out) in sorted(shapes.items()):
            for side, shape in (("A", (RANK, wide_in)), ("B", (wide_out, RANK))):
                raw = (0.1 * draw.standard_normal(shape)).astype("<f4").tobytes()
                key = f"base_model.model.model.layers.{layer}.{LINEAR[module]}.{module}.lora_{side}.weight"
                header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(body), len(body) + len(raw)]}
                body += raw
    fields = ManifestFields(kind="trained", base_model="tiny", base=base_digests(policy), temperature=0.7, seed=seed)
    return Adapter(folder, fields.model_dump(mode="json"), dict(peft_config(RANK, 2 * RANK)), header, body)
