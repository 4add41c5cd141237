"""Adapters that somebody made to do harm, for `benchmarks/loader.py`: each is an honest one with one thing wrong, sealed again with
digests and an id that fit, unless these are what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.sealed import MAX_RANK, Adapter, Header, Json, canonical, pack
from deploy.manifest import CONFIG, MANIFEST, WEIGHTS

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

Make = Callable[[Adapter], Path]
CASES: dict[str, tuple[Make, str]] = {}
"""What is wrong → (makes it, a word of the reason that has to be given)."""


def case(what: str, reason: str) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        CASES[what] = (make, reason)
        return make

    return enter


def _says(**fields: object) -> Make:
    def make(adapter: Adapter) -> Path:
        adapter.config.update(fields)
        return adapter.seal()

    return make


for _field, _value in {
    "use_dora": True,
    "use_rslora": True,
    "use_qalora": True,
    "use_bdlora": {"target_modules_bd_a": []},
    "lora_bias": True,
    "bias": "all",
    "fan_in_fan_out": True,
    "rank_pattern": {"q_proj": 64},
    "alpha_pattern": {"q_proj": 4096},
    "layer_replication": [[0, 2], [0, 2]],
    "modules_to_save": ["lm_head"],
    "auto_mapping": {"base_model_class": "X", "parent_library": "evil"},
    "auto_map": {"AutoModel": "evil--modeling.Evil"},
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.experts"],
    "alora_invocation_tokens": [5],
    "layers_to_transform": [0],
    "exclude_modules": ["q_proj"],
    "megatron_core": "evil.module",
    "megatron_config": {"a": 1},
    "vllm_lora_scaling_factor": 1e6,
    "a_field_of_the_future": "anything",
    "peft_type": "IA3",
    "task_type": "SEQ_CLS",
    "init_lora_weights": "pissa",
    "target_modules": "all-linear",
    "lora_dropout": -1,
    "r": "4",
    "lora_alpha": 1e9,
}.items():
    CASES[f"{CONFIG}: {_field} = {_value!r}"] = (_says(**{_field: _value}), _field)
for _field, _bad in (
    ("r", MAX_RANK + 1),
    ("r", True),
    ("r", 0),
    ("lora_alpha", -8),
    ("lora_alpha", True),
    ("target_modules", ["q_proj", "lm_head"]),
    ("target_modules", ["q_proj", "q_proj"]),
    ("target_modules", []),
):
    CASES[f"{CONFIG}: {_field} = {_bad!r}"] = (_says(**{_field: _bad}), _field)


def _config_raw(raw: Callable[[Json], bytes]) -> Make:
    def make(adapter: Adapter) -> Path:
        adapter.config_raw = raw(adapter.config)
        return adapter.seal()

    return make


_DEEP = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
for _what, _raw, _reason in (
    ("names r twice", lambda c: json.dumps(c).encode()[:-1] + b', "r": 8}', "twice"),
    ("is a list", lambda c: b"[]", "object was expected"),
    ("nests 100,000 deep", lambda c: _DEEP[: 1 << 15] + b"", "deep"),
    ("is no UTF-8", lambda c: b'{"r": "\xff"}', "no JSON"),
    ("is not what the manifest says", lambda c: json.dumps({**c, "lora_alpha": 16}).encode(), "not the peft"),
    ("says NaN", lambda c: json.dumps({**c, "lora_alpha": float("nan")}).encode(), "NaN"),
    ("has a megabyte", lambda c: json.dumps(c).encode() + b" " * (1 << 20), "at most"),
    ("has a number of 5,000 digits", lambda c: b'{"r": ' + b"9" * 5000 + b"}", "no JSON"),
):
    CASES[f"{CONFIG} {_what}"] = (_config_raw(_raw), _reason)


def _header(change: Callable[[Header], None]) -> Make:
    def make(adapter: Adapter) -> Path:
        change(adapter.header)
        return adapter.seal()

    return make


def _entry(**fields: object) -> Make:
    return _header(lambda header: header[FIRST].update(fields))


def _overlap(header: Header) -> None:
    """The second tensor of the file begins inside the first."""
    first, second = [name for name in header if name != "__metadata__"][:2]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    begin = header[first]["data_offsets"][1] - 4
    header[second]["data_offsets"] = [begin, begin + size]


def _weights(raw: Callable[[Adapter], bytes]) -> Make:
    def make(adapter: Adapter) -> Path:
        adapter.weights_raw = raw(adapter)
        return adapter.seal()

    return make


def _number(raw: bytes) -> Make:
    """The last number of the last tensor."""
    return _weights(lambda a: pack(a.header, a.body[: -len(raw)] + raw))


def _half(dtype: str, raw: bytes) -> Make:
    """All tensors in half precision, the very first number as given."""

    def make(adapter: Adapter) -> Path:
        for name, entry in adapter.header.items():
            if name != "__metadata__":
                entry["dtype"], entry["data_offsets"] = dtype, [at // 2 for at in entry["data_offsets"]]
        adapter.body = raw + bytes(len(adapter.body) // 2 - 2)
        return adapter.seal()

    return make


def _more(name: str, shape: list[int]) -> Make:
    def make(adapter: Adapter) -> Path:
        size = 4 * int(np.prod(shape))
        adapter.header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(adapter.body), len(adapter.body) + size]}
        adapter.body += bytes(size)
        return adapter.seal()

    return make


def _without_last(adapter: Adapter) -> Path:
    name = list(adapter.header)[-1]
    begin = adapter.header.pop(name)["data_offsets"][0]
    adapter.body = adapter.body[:begin]
    return adapter.seal()


def _transposed(header: Header) -> None:
    header[FIRST]["shape"] = header[FIRST]["shape"][::-1]


CASES |= {
    "a weight is NaN": (_number(struct.pack("<f", float("nan"))), "NaN"),
    "a weight is infinite": (_number(struct.pack("<f", float("-inf"))), "infinity"),
    "a weight is 1e30": (_number(struct.pack("<f", 1e30)), "1e+30"),
    "a float16 is NaN": (_half("F16", b"\x01\x7e"), "NaN"),
    "a bfloat16 is infinite": (_half("BF16", b"\x80\x7f"), "infinity"),
    "tensors overlap": (_header(_overlap), "overlaps"),
    "bytes between tensors": (_weights(lambda a: pack(_shifted(a.header, 16), a.body[:0] + bytes(16) + a.body)), "gap"),
    "bytes behind the last tensor": (_weights(lambda a: pack(a.header, a.body + b"#!/bin/sh\n")), "accounts for"),
    "a body cut short": (_weights(lambda a: pack(a.header, a.body[:-100])), "accounts for"),
    "a header of 2^63 bytes": (_weights(lambda a: pack(a.header, a.body, 1 << 63)), "declares a header"),
    "a header longer than the file": (_weights(lambda a: pack(a.header, a.body, 1 << 20)), "declares a header"),
    "a header of 0 bytes": (_weights(lambda a: pack(b"", a.body)), "header that begins"),
    "a header that is a list": (_weights(lambda a: pack(b"[]", a.body)), "header that begins"),
    "a header that nests deeply": (_weights(lambda a: pack(_DEEP, a.body)), "deep"),
    "a header with a key twice": (_weights(lambda a: pack(json.dumps(a.header).encode()[:-1] + b',"__metadata__":{}}', a.body)), "twice"),
    "a header with code": (_header(lambda h: h["__metadata__"].update(code="import os")), "__metadata__"),
    "metadata that is a list": (_header(lambda h: h.update(__metadata__=[])), "__metadata__"),
    "a shape of 2^80 numbers": (_entry(shape=[1 << 40, 1 << 40]), "its shape"),
    "a shape that is negative": (_entry(shape=[-4, -32]), "has shape"),
    "a shape of true": (_entry(shape=[True, 128]), "has shape"),
    "a shape of three dimensions": (_entry(shape=[4, 32, 1]), "has shape"),
    "a shape of floats": (_entry(shape=[4.0, 32.0]), "has shape"),
    "offsets that are negative": (_entry(data_offsets=[-512, 0]), "data_offsets"),
    "offsets that run backwards": (_entry(data_offsets=[512, 0]), "has -512 bytes"),
    "offsets that are one number": (_entry(data_offsets=[0]), "data_offsets"),
    "a description with a field too many": (_entry(code="x"), "is described by"),
    "a type of integers": (_entry(dtype="I32"), "has dtype"),
    "a type of double precision": (_entry(dtype="F64"), "has dtype"),
    "a shape turned round": (_header(_transposed), "the base model has"),
    "a value head": (_more("value_head.weight", [1, 32]), "value_head"),
    "a change of the embedding": (_more("base_model.model.model.embed_tokens.lora_A.weight", [4, 32]), "embed_tokens"),
    "a tensor of layer 99": (_more(FIRST.replace("layers.0", "layers.99"), [4, 32]), "layers.99"),
    "a tensor too few": (_without_last, "lacks"),
    "no tensors": (_weights(lambda a: pack({}, b"")), "lacks"),
    "an empty weights file": (_weights(lambda a: b""), "fewer than 10"),
    "a pickle called safetensors": (_weights(lambda a: pickle.dumps({"w": os.getpid})), "declares a header"),
}


def _shifted(header: Header, by: int) -> Header:
    return {
        name: entry if name == "__metadata__" else {**entry, "data_offsets": [at + by for at in entry["data_offsets"]]}
        for name, entry in header.items()
    }


def _beside(name: str, content: bytes = b"{}") -> Make:
    def make(adapter: Adapter) -> Path:
        path = adapter.seal()
        (path / name).write_bytes(content)
        return path

    return make


CASES |= {
    f"{_name} in the folder": (_beside(_name, _content), _reason)
    for _name, _content, _reason in (
        ("adapter_model.bin", pickle.dumps({"w": 1}), "may run code"),
        ("pytorch_model.PT", b"x", "may run code"),
        ("modeling_evil.py", b"import os", "code"),
        ("chat_template.jinja", b"{{ messages }}", "chat template"),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("tokenizer_config.json", b"{}", "tokenizer"),
        ("special_tokens_map.json", b"{}", "tokenizer"),
        ("added_tokens.json", b"{}", "tokenizer"),
        ("config.json", b"{}", "model's configuration"),
        (".hidden", b"x", "no part"),
        ("new_embeddings.safetensors", b"x", "no part"),
        ("README.md", b"x", "no part"),
    )
}


def _linked(name: str) -> Make:
    """A file of the folder is a link to the very same bytes elsewhere."""

    def make(adapter: Adapter) -> Path:
        path = adapter.seal()
        away = adapter.folder / f"away-{name}"
        (path / name).rename(away)
        (path / name).symlink_to(away)
        return path

    return make


@case("the folder is a link", "link")
def _folder_link(adapter: Adapter) -> Path:
    path = adapter.seal()
    away = adapter.folder / "away"
    path.rename(away)
    path.symlink_to(away)
    return path


@case("a pipe instead of a file", "plain file")
def _pipe(adapter: Adapter) -> Path:
    path = adapter.seal()
    (path / CONFIG).unlink()
    os.mkfifo(path / CONFIG)
    return path


@case("a folder instead of the weights", "plain file")
def _folder(adapter: Adapter) -> Path:
    path = adapter.seal()
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).mkdir()
    return path


@case("a folder in the folder", "no part")
def _inner(adapter: Adapter) -> Path:
    path = adapter.seal()
    (path / "more").mkdir()
    return path


@case("weights of a terabyte", "at most")
def _sparse(adapter: Adapter) -> Path:
    path = adapter.seal()
    os.truncate(path / WEIGHTS, 1 << 40)
    return path


@case("a hundred files", "more than 64 files")
def _many(adapter: Adapter) -> Path:
    path = adapter.seal()
    for number in range(100):
        (path / f"{number}.txt").touch()
    return path


@case("a path with ..", "64 hex digits")
def _dots(adapter: Adapter) -> Path:
    path = adapter.seal()
    return path / ".."


def _lacking(name: str) -> Make:
    def make(adapter: Adapter) -> Path:
        path = adapter.seal()
        (path / name).unlink()
        return path

    return make


def _manifest(change: Callable[[Json], Json | bytes]) -> Make:
    return lambda adapter: adapter.seal(manifest=change)


def _files(more: Mapping[str, str]) -> Make:
    return _manifest(lambda told: {**told, "files": {**told["files"], **more}})


def _base(**fields: str) -> Make:
    return _manifest(lambda told: {**told, "base": {**told["base"], **fields}})


CASES |= {f"{_name} is a link": (_linked(_name), "link") for _name in (CONFIG, WEIGHTS, MANIFEST)}
CASES |= {f"{_name} is missing": (_lacking(_name), "not there") for _name in (CONFIG, WEIGHTS, MANIFEST)}
CASES |= {
    "the manifest names a file in ..": (_files({"../../evil": "0" * 64}), "names the files"),
    "the manifest names a third file": (_files({"model.py": "0" * 64}), "names the files"),
    "the manifest has another digest": (_files({WEIGHTS: "0" * 64}), "SHA-256"),
    "for another model": (_base(weights="0" * 64), "another base"),
    "for another tokenizer": (_base(tokenizer="0" * 64), "another base"),
    "for another template": (_base(template="0" * 64), "another base"),
    "the manifest's temperature is NaN": (_manifest(lambda told: {**told, "temperature": float("nan")}), "NaN"),
    "the manifest's temperature is 5": (_manifest(lambda told: {**told, "temperature": 5.0}), "temperature"),
    "the manifest is written with spaces": (_manifest(lambda told: json.dumps(told, sort_keys=True).encode()), "is that of"),
    "the manifest names a key twice": (_manifest(lambda told: canonical(told)[:-1] + b',"seed":1}'), "twice"),
    "the manifest has two megabytes": (_manifest(lambda told: {**told, "system_prompt": "x" * (2 << 20)}), "at most"),
    "the manifest has a field too many": (_manifest(lambda told: {**told, "hook": "evil"}), "hook"),
    "the manifest is of another format": (_manifest(lambda told: {**told, "format": 2}), "format"),
    "the manifest holds half a character": (_manifest(lambda told: {**told, "system_prompt": "\ud800"}), "no JSON"),
    "the manifest spells half a character": (_manifest(lambda told: json.dumps({**told, "system_prompt": "\ud800"}).encode()), "damaged"),
    "the folder has another adapter's name": (lambda adapter: adapter.seal(name="ab" * 32), "is that of"),
}
