"""A safetensors file as something that an enemy may have written: its header is believed only where it adds up.

    8 bytes                     length of the header, little-endian
    header                      JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    the rest                    the tensors' bytes, end to end

Format: https://github.com/huggingface/safetensors. Stricter than the reader of that name: only what an adapter needs is let through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

import numpy as np

from feedback.errors import InvalidInput

HEADER_BYTES = 4 << 20
"""A hundred layers with fourteen tensors each take a tenth of it."""
TENSORS = 20_000
DIMENSIONS = 2
SIZES = {"F32": 4, "F16": 2, "BF16": 2}
"""Types of numbers that an adapter may hold, and the bytes of each."""
METADATA = {"format": ("pt", "np")}
"""The metadata that writers of adapters leave; anything else has no business there."""
LARGEST = 1e4
"""No trained weight comes near; a sum over a few of these no longer fits a half-precision number."""
CHUNK_BYTES = 1 << 22
NESTING = 32


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """In bytes from the start of the file."""
    end: int


def refuse(told: str, field: str = "adapter") -> NoReturn:
    """One line that names file, value and limit."""
    raise InvalidInput(told, field=field)


def strict_json(raw: bytes, what: str) -> dict[str, object]:
    """The object in these bytes. Raises InvalidInput where it is none, names a key twice, nests deeply or holds NaN or infinity."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            refuse(f"{what} names {next(name for name in names if names.count(name) > 1)[:60]!r} twice")
        return found

    def constant(name: str) -> NoReturn:
        refuse(f"{what} holds {name}, which is no JSON")

    if (depth := _depth(raw)) > NESTING:
        refuse(f"{what} nests {depth} deep, at most {NESTING} is read")
    try:
        told = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except ValueError as exc:  # also of bytes that are no UTF-8, and of integers of thousands of digits
        raise InvalidInput(f"{what} is no JSON: {str(exc)[:120]!r}", field="adapter") from exc
    if not isinstance(told, dict):
        refuse(f"{what} is a JSON {type(told).__name__}, an object was expected")
    return told


def _depth(raw: bytes) -> int:
    """The most brackets that could be open at once; those inside strings count too, which errs to the safe side."""
    level = deepest = 0
    for byte in raw:
        if byte in b"[{":
            level += 1
            deepest = max(deepest, level)
        elif byte in b"]}":
            level -= 1
    return deepest


def read_header(file: BinaryIO, size_bytes: int, what: str) -> dict[str, TensorEntry]:
    """The tensors of a file of this size, in the order of their bytes, which cover it without gap or overlap.

    `what` names the file in errors. Raises InvalidInput.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size_bytes < 10:
        refuse(f"{what} has {size_bytes} bytes, no safetensors file has fewer than 10")
    if length > min(HEADER_BYTES, size_bytes - 8):
        refuse(f"{what} declares a header of {length} bytes, at most {min(HEADER_BYTES, size_bytes - 8)} are possible here")
    raw = file.read(length)
    if not raw.startswith(b"{") or len(raw) != length:
        refuse(f"{what} has a header that begins with {raw[:4]!r}, '{{' was expected")
    told = strict_json(raw, f"the header of {what}")
    _check_metadata(told.pop("__metadata__", {}), what)
    if len(told) > TENSORS:
        refuse(f"{what} declares {len(told)} tensors, at most {TENSORS} are read")
    entries = {name: _entry(name, value, 8 + length, what) for name, value in told.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 8 + length
    for name, entry in ordered.items():
        if entry.begin != at:
            how = "overlaps what lies before it" if entry.begin < at else "leaves a gap before it"
            refuse(f"{what}: tensor {name[:80]!r} begins at byte {entry.begin} and {how}, {at} was expected")
        at = entry.end
    if at != size_bytes:
        refuse(f"{what} has {size_bytes} bytes, its header accounts for {at}")
    return ordered


def _check_metadata(found: object, what: str) -> None:
    if not isinstance(found, dict):
        refuse(f"{what}: __metadata__ is {str(found)[:40]!r}, an object was expected")
    for key, value in found.items():
        if value not in METADATA.get(key, ()):
            refuse(f"{what}: __metadata__ says {key[:40]!r} = {str(value)[:40]!r}, only format = pt or np is let through")


def _entry(name: str, value: object, start: int, what: str) -> TensorEntry:
    where = f"{what}: tensor {name[:80]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(f"{where} is described by {str(value)[:60]!r}, dtype, shape and data_offsets were expected")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        refuse(f"{where} has dtype {str(dtype)[:20]!r}, only {', '.join(SIZES)} are read")
    if not _whole(shape) or len(shape) > DIMENSIONS or 0 in shape:
        refuse(f"{where} has shape {str(shape)[:60]}, at most {DIMENSIONS} whole numbers above 0 were expected")
    if not _whole(offsets) or len(offsets) != 2:
        refuse(f"{where} has data_offsets {str(offsets)[:60]}, two whole numbers were expected")
    count = 1
    for each in shape:
        count *= each
    if offsets[1] - offsets[0] != count * SIZES[dtype]:
        refuse(f"{where} has {offsets[1] - offsets[0]} bytes, its shape {list(shape)} in {dtype} takes {count * SIZES[dtype]}")
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _whole(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 48 for each in value)


def check_numbers(file: BinaryIO, entries: Mapping[str, TensorEntry], what: str) -> None:
    """Read every number. Raises InvalidInput at the first tensor with one that is not finite or larger than `LARGEST`."""
    for name, entry in entries.items():
        file.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            raw = file.read(min(CHUNK_BYTES, left))
            if not raw:
                refuse(f"{what} ended while it was read")
            left -= len(raw)
            numbers = _numbers(raw, entry.dtype)
            if not np.isfinite(numbers).all():
                refuse(f"{what}: tensor {name[:80]!r} holds NaN or infinity, only finite numbers are loaded")
            if (largest := float(np.abs(numbers).max())) > LARGEST:
                refuse(f"{what}: tensor {name[:80]!r} holds {largest:.3g}, at most {LARGEST:g} in size is loaded")


def _numbers(raw: bytes, dtype: str) -> np.ndarray[tuple[int], np.dtype[np.floating]]:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2")
