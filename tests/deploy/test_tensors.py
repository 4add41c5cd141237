"""A header is believed only where it adds up; whatever bytes come, the answer is tensors or one line."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from benchmarks.sealed import pack
from deploy.tensors import SIZES, TensorEntry, check_numbers, read_header, strict_json
from feedback.errors import InvalidInput

Shapes = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(SIZES)), st.lists(st.integers(1, 5), max_size=2)),
    max_size=6,
)


def read(raw: bytes) -> dict[str, TensorEntry]:
    return read_header(io.BytesIO(raw), len(raw), "it")


def laid_out(shapes: dict[str, tuple[str, list[int]]]) -> tuple[dict[str, object], int]:
    """A header whose tensors lie end to end in the order of their names, and the bytes of them all."""
    header: dict[str, object] = {}
    at = 0
    for name, (dtype, shape) in shapes.items():
        size = int(np.prod(shape)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, at


@given(Shapes)
def test_what_lies_end_to_end_is_read(shapes: dict[str, tuple[str, list[int]]]) -> None:
    header, size = laid_out(shapes)
    raw = pack(header, bytes(size))
    entries = read(raw)
    assert {name: (entry.dtype, list(entry.shape)) for name, entry in entries.items()} == shapes
    assert sum(entry.end - entry.begin for entry in entries.values()) == size
    check_numbers(io.BytesIO(raw), entries, "it")


@given(st.binary(max_size=200))
def test_any_bytes_give_tensors_or_one_line(raw: bytes) -> None:
    try:
        entries = read(raw)
    except InvalidInput as exc:
        assert "\n" not in exc.message
    else:
        assert all(0 <= entry.begin <= entry.end <= len(raw) for entry in entries.values())


Jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), Jsons, max_size=4), st.integers(0, 64))
def test_any_json_gives_tensors_or_one_line(header: dict[str, object], size: int) -> None:
    raw = pack(header, bytes(size))
    try:
        entries = read(raw)
    except InvalidInput as exc:
        assert "\n" not in exc.message
    else:
        assert sum(entry.end - entry.begin for entry in entries.values()) == size, "every byte belongs to exactly one tensor"


@settings(max_examples=200)
@given(Shapes.filter(len), st.data())
def test_one_changed_offset_is_noticed(shapes: dict[str, tuple[str, list[int]]], data: st.DataObject) -> None:
    header, size = laid_out(shapes)
    entry = header[data.draw(st.sampled_from(list(shapes)))]
    assert isinstance(entry, dict)
    entry["data_offsets"][data.draw(st.integers(0, 1))] += data.draw(st.integers(-40, 40).filter(bool))
    with pytest.raises(InvalidInput):
        read(pack(header, bytes(size)))


@settings(max_examples=200)
@given(Shapes.filter(len), st.data())
def test_a_byte_more_or_less_is_noticed(shapes: dict[str, tuple[str, list[int]]], data: st.DataObject) -> None:
    header, size = laid_out(shapes)
    other = size + data.draw(st.integers(-size, 20).filter(bool))
    with pytest.raises(InvalidInput):
        read(pack(header, bytes(other)))


def test_the_usual_writer_is_read() -> None:
    tensors: dict[str, np.ndarray[Any, np.dtype[Any]]] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((4,), np.float16)}
    raw = save(tensors, metadata={"format": "pt"})
    entries = read(raw)
    assert {name: entry.shape for name, entry in entries.items()} == {"a": (2, 3), "b": (4,)}
    for name, entry in entries.items():
        assert raw[entry.begin : entry.end] == tensors[name].tobytes()


@given(st.sampled_from(["F32", "F16", "BF16"]), st.integers(0, 99), st.sampled_from(["nan", "inf", "-inf", "20000"]))
def test_one_bad_number_among_good_ones_is_found(dtype: str, at: int, bad: str) -> None:
    numbers = np.ones(100, np.float32)
    numbers[at] = np.float32(bad)
    # The upper half of a float32 is a bfloat16: 1, NaN and infinity are exact, 20000 becomes 19968.
    halves: dict[str, bytes] = {"F16": numbers.astype("<f2").tobytes(), "BF16": (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()}
    raw = halves.get(dtype, numbers.tobytes())
    with pytest.raises(InvalidInput, match=r"holds NaN or infinity|holds 2e\+04"):
        check_numbers(io.BytesIO(raw), {"a": TensorEntry(dtype, (100,), 0, len(raw))}, "it")


@given(st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.text(max_size=5), max_size=5))
def test_strict_json_reads_what_json_reads(told: dict[str, object]) -> None:
    assert strict_json(json.dumps(told).encode(), "it") == told


@pytest.mark.parametrize(
    "raw", ['{"a": 1, "a": 1}', '{"b": {"a": 1, "a": 2}}', '{"a": NaN}', '{"a": Infinity}', "[]", "", "{", '{"a": 1}}']
)
def test_strict_json_refuses_what_two_readers_may_read_differently(raw: str) -> None:
    with pytest.raises(InvalidInput):
        strict_json(raw.encode(), "it")
