"""Unique strings that a benchmark gives to people, and a search for them in every file and every form in which they could survive.

Looked at are raw bytes, what gzip and Parquet hold, SQLite's cells (a long row is cut by page boundaries), what every surviving key
opens, and token ids decoded with the tokenizer. Looked for are the strings in UTF-8 and UTF-16, JSON's and URLs' escapes, base64 at
its three alignments, hex, and their token ids as text and as integers. Imports no torch.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import re
import secrets
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

BOX = re.compile(rb'"subjects":\["([^"\]]+)"\],"box":"([A-Za-z0-9+/=]+)"')
NUMBERS = re.compile(rb"\d+(?:, ?\d+){3,}")
TABLE_BITS = 20
PADDING = 64
"""So much of the zeros at a file's end is looked at: Kafka's indexes are megabytes of them."""
SCRIPTS = "αβγδεζηθικλμνξοπρστυφχψωабвгдежзийклмнопрстуфхцчшщъыьэюяあいうえおかきくけこ✓★☂♞"

T = TypeVar("T")


@dataclass(frozen=True)
class Person:
    """Somebody and what only they say: letters for every text, others that JSON escapes, and words that the tokenizer knows."""

    name: str
    tag: str
    script: str
    words: tuple[str, ...]
    token_ids: tuple[int, ...]
    """Of the words, in the middle of a text."""

    def text(self, what: str) -> str:
        """A message, answer, comment, ... with everything that is searched for."""
        return f"{what} {' '.join(self.words)} {self.tag}-{what} {self.script}"

    def forms(self) -> dict[str, bytes]:
        """Every form in which the strings could survive; what is written alike is one form."""
        found = {"token ids as text": json.dumps(self.token_ids)[1:-1].encode()}
        found["token ids as compact text"] = found["token ids as text"].replace(b" ", b"")
        for width in (np.int64, np.int32):
            found[f"token ids as {width.__name__}"] = np.array(self.token_ids, dtype=width).tobytes()
        for name, text in (("letters", self.tag), ("script", self.script), ("words", " ".join(self.words))):
            found[f"{name} in UTF-8"] = raw = text.encode()
            found[f"{name} in UTF-16"] = text.encode("utf-16-le")
            found[f"{name} in hex"] = raw.hex().encode()
            found[f"{name} in JSON"] = once = json.dumps(text)[1:-1].encode()
            found[f"{name} in JSON twice"] = once.replace(b"\\", b"\\\\")
            found[f"{name} in a URL"] = quote(text).encode()
            for shift in range(3):  # what stands before it decides the alignment; the first and last characters mix with neighbours
                packed = base64.b64encode(b"\0" * shift + raw).rstrip(b"=")
                found[f"{name} in base64 at {shift}"] = packed[(0, 2, 3)[shift] : -1 if (len(raw) + shift) % 3 else None]
        return {form: needle for needle, form in {needle: form for form, needle in reversed(found.items())}.items()}


def invent(count: int, tokens: Mapping[str, int], seed: int) -> list[Person]:
    """People whose strings occur nowhere else. `tokens` is a vocabulary in which a word inside a text begins with a space."""
    rng = random.Random(seed)
    words = sorted(token for token in tokens if re.fullmatch(r" [A-Za-z]{4,}", token))
    found = []
    for number in range(count):
        mine = rng.sample(words, 6)
        tag, script = f"{rng.getrandbits(64):016x}", "".join(rng.choices(SCRIPTS, k=10))
        found.append(Person(f"person-{number}", tag, script, tuple(word[1:] for word in mine), tuple(tokens[word] for word in mine)))
    return found


def told(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """What the scripted engine answers: the question's strings as an answer's, never twice the same text."""
    return f"{messages[-1]['content']}".replace("question", "answer") + f" ({secrets.token_hex(2)})"


class Needles(Generic[T]):
    """Byte strings of at least eight bytes, looked for all at once: a table says where the first eight of one may stand, and there it is
    compared. A search for one after the other reads everything a thousand times."""

    def __init__(self, labels: Mapping[bytes, Collection[T]]) -> None:
        self._starting: dict[int, list[tuple[bytes, Collection[T]]]] = {}
        for needle, meant in labels.items():
            self._starting.setdefault(int(np.frombuffer(needle, "<u8", 1)[0]), []).append((needle, meant))
        self._table = np.zeros(1 << TABLE_BITS, dtype=bool)
        self._table[_slots(np.array(list(self._starting), dtype=np.uint64))] = True

    def within(self, data: bytes) -> list[T]:
        """What the strings mean that stand in the data, each once."""
        found: dict[bytes, Collection[T]] = {}
        for shift in range(min(8, len(data) - 7)):
            windows = np.frombuffer(data, "<u8", (len(data) - shift) // 8, shift)
            for at in np.flatnonzero(self._table[_slots(windows)]).tolist():
                for needle, meant in self._starting.get(int(windows[at]), ()):
                    if needle not in found and data.startswith(needle, shift + 8 * at):
                        found[needle] = meant
        return [each for meant in found.values() for each in meant]


def _slots(words: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - TABLE_BITS)


@dataclass
class Search:
    """Looks through folders. `wrapped` are keys of people as they once lay in the database; their bytes anywhere are a finding, too."""

    kek: bytes
    tokenizer: object
    wrapped: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    """Wrapped key -> subject and generation."""
    names: dict[str, str] = field(default_factory=dict)
    """Subject -> person."""

    def remember_keys(self, database: Path) -> None:
        """All keys that are alive in this database now."""
        with _copy(database) as db:
            for subject, generation, wrapped in db.execute("SELECT subject, generation, wrapped FROM subject_keys WHERE wrapped NOT NULL"):
                self.wrapped[bytes(wrapped)] = (subject, generation)

    def found(self, roots: Sequence[Path], people: Collection[Person]) -> dict[str, list[str]]:
        """For each person's name where they were found: `file: form`."""
        labels: dict[bytes, list[tuple[str, str]]] = {}
        for person in people:
            for form, needle in person.forms().items():
                labels.setdefault(needle, []).append((person.name, form))
        forms = Needles(labels)
        hits: dict[str, list[str]] = {}
        keys = dict(self._surviving(roots))
        wanted = {person.name for person in people}
        for subject, generation in keys:
            if (name := self.names.get(subject)) in wanted:
                hits.setdefault(str(name), []).append(f"the key of generation {generation}: its bytes")
        for path, how, data in self._views(roots, keys):
            for name, form in forms.within(data):
                hits.setdefault(name, []).append(f"{path}{how}: {form}")
        return hits

    def _surviving(self, roots: Iterable[Path]) -> Iterator[tuple[tuple[str, int], bytes]]:
        """Keys whose wrapped bytes stand in any file, unwrapped, as a thief with the key-encryption key could."""
        wrapped = Needles({each: [each] for each in self.wrapped})
        for each in {each for path in _files(roots) for how, raw in _contents(path, whole=True) for each in wrapped.within(raw)}:
            subject, generation = self.wrapped[each]
            yield (subject, generation), AESGCM(self.kek).decrypt(each[:12], each[12:], f"{subject}/{generation}".encode())

    def _views(self, roots: Iterable[Path], keys: dict[tuple[str, int], bytes]) -> Iterator[tuple[Path, str, bytes]]:
        for path in _files(roots):
            for how, data in _contents(path):
                yield path, how, data
                opened = b"\n".join(_opened(data, keys))
                if opened:
                    yield path, f"{how}, opened", opened
                if "cycles" in path.parts and (runs := NUMBERS.findall(data)):
                    yield path, f"{how}, decoded", "\n".join(self._decoded(run) for run in runs).encode()

    def _decoded(self, run: bytes) -> str:
        size = len(self.tokenizer)  # type: ignore[arg-type]
        return str(self.tokenizer.decode([int(n) for n in run.split(b",") if int(n) < size]))  # type: ignore[attr-defined]


def planted(folder: Path, person: Person, search: Search) -> list[str]:
    """Encodings in which a text of this person was written to a file and not found."""
    folder.mkdir()
    text = person.text("question")
    raw = text.encode()
    files = {f"base64 at {shift}": base64.b64encode(b"?" * shift + raw) for shift in range(3)}
    files |= {"hex": raw.hex().encode(), "URL": quote(text).encode(), "UTF-16": text.encode("utf-16"), "gzip": gzip.compress(raw)}
    files |= {"JSON": json.dumps({"a": text}).encode(), "JSON in JSON": json.dumps(json.dumps(text)).encode()}
    files |= {f"ids as {width}": np.array([3, *person.token_ids, 4], dtype=width).tobytes() for width in ("int32", "int64")}
    files |= {"ids as text": json.dumps([3, *person.token_ids, 4]).encode()}
    missed = []
    for name, data in files.items():
        (folder / "file").write_bytes(data)
        if not search.found([folder], [person]):
            missed.append(name)
    shutil.rmtree(folder)
    return missed


def _files(roots: Iterable[Path]) -> list[Path]:
    return [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]


def _contents(path: Path, whole: bool = False) -> Iterator[tuple[str, bytes]]:
    """The file's bytes, and, unless they are wanted as a whole, what is packed in them."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:  # a running process has just done away with it
        return
    yield "", raw[: len(raw.rstrip(b"\0")) + PADDING]
    if whole:
        return
    if raw[:2] == b"\x1f\x8b":
        try:
            yield " unpacked", gzip.decompress(raw)
        except (OSError, EOFError, zlib.error):
            return
    elif raw[:4] == b"PAR1":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
        yield " as rows", json.dumps(rows, ensure_ascii=False).replace('\\"', '"').encode()
    elif raw[:15] == b"SQLite format 3":
        yield " as cells", b"\n".join(_cells(path))


@contextmanager
def _copy(path: Path) -> Iterator[sqlite3.Connection]:
    """A copy of a database with its write-ahead log: whoever closes the database itself last would empty that."""
    with tempfile.TemporaryDirectory() as folder:
        for part in (path, path.with_name(f"{path.name}-wal")):
            with suppress(FileNotFoundError):
                shutil.copy(part, folder)
        with closing(sqlite3.connect(Path(folder) / path.name)) as db:
            yield db


def _cells(path: Path) -> Iterator[bytes]:
    with _copy(path) as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in db.execute(f'SELECT * FROM "{table}"'):
                yield from (cell.encode() if isinstance(cell, str) else cell for cell in row if isinstance(cell, str | bytes))


def _opened(data: bytes, keys: dict[tuple[str, int], bytes]) -> Iterator[bytes]:
    """Every sealed box of one person in the data that a key opens."""
    for name, packed in BOX.findall(data):
        try:
            box, subject = base64.b64decode(packed), name.decode()
            generation = int.from_bytes(box[:4], "big")
            secret = keys.get((subject, generation))
            if secret is not None:
                yield AESGCM(secret).decrypt(box[4:16], box[16:], f"{subject}/{generation}".encode())
        except (InvalidTag, ValueError):  # cut off by a page boundary
            continue
