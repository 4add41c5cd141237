"""A fixed set of opinions to learn from: what people hold now, joined with what they read, as Parquet with a digest.

    digest = SHA-256(schema version, filters, leaves sorted by event_id)
    leaf   = HMAC-SHA-256(leaf key of the subject who asked, canonical JSON of the row)

Erasing somebody drops their rows and keeps the leaves, so that the digest still names the same snapshot, while nobody can test a guess
about a dropped row, because the leaf key went with the subject's key. `pyarrow` (extra `train`) is imported in the functions only.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.util
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue, ValidationError

from feedback.archive import Archive, Interaction
from feedback.clock import stamp_ms
from feedback.errors import Gone, NotDurable, NotFound, TrainingRefused
from feedback.events import FeedbackGiven, FinishedText, Model, Sealed, Source, StartedText
from feedback.files import locked_folder, sync
from feedback.subjects import Subjects

ROW_VERSION = 1
ROWS_FILE = "rows.parquet"
HEAD_FILE = "snapshot.json"
TRAINABLE = ("stop", "length")
"""Finish reasons of answers that can be learnt from: whole, or cut at the length that was asked for, and text."""

Outcome = Literal["a", "b", "tie", "both_bad", "up", "down"]
Message = dict[str, JsonValue]


class Row(Model):
    """One opinion. A thumb is about `answer_a`; a choice is between `answer_a`, which was shown first, and `answer_b`."""

    event_id: str
    kind: Literal["choice", "thumb"]
    rater: str
    subject: str
    """Who asked, and under whose key the texts lie in the record."""
    cohorts: tuple[str, ...]
    source: Source
    prompt: list[Message]
    answer_a: str
    answer_b: str | None
    finish_a: str
    finish_b: str | None
    outcome: Outcome
    side: Literal["a", "b"] | None
    """For a choice `a`, the side that was shown first, or None where that is not known; for a thumb the side it was on, if any."""
    adapter_a: str
    adapter_b: str | None
    stamp: int


class Filters(Model):
    """Which opinions go in."""

    tenant: str = "default"
    sources: tuple[Source, ...] = ("person", "simulated", "import")
    cohorts: tuple[str, ...] = ()
    """At least one of these tags; empty for everybody."""
    since_ms: int = 0
    until_ms: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """What `build` wrote and `load` read."""

    path: Path
    digest: str
    rows: list[Row]
    filters: Filters
    redacted: bool
    """Whether rows of erased subjects are missing from it."""


def build(archive: Archive, subjects: Subjects, out_dir: Path, filters: Filters | None = None) -> Snapshot:
    """Write `out_dir/<digest>/`; the same opinions and filters give the same folder.

    In go finished answers, for a choice both of them; what was cleared, withdrawn, erased or expired stays out.
    Raises TrainingRefused where nothing is left.
    """
    filters = filters or Filters()
    found = sorted(_rows(archive, subjects, filters), key=lambda row: row.event_id)
    with locked(out_dir):
        # Whoever was erased while we read is in the archive before that erasure gets the lock: either we see it or it sees the snapshot.
        rows, leaves = _kept(found, archive.erasures(), subjects)
        if not rows:
            raise _nothing(filters)
        digest = _digest(filters, leaves)
        target = out_dir / digest
        if (target / HEAD_FILE).exists():
            _settle(out_dir)
        else:
            _publish(target, rows, {"digest": digest, "redacted": False, "filters": filters.model_dump(mode="json"), "leaves": leaves})
    return load(target)


def opinions(archive: Archive, subjects: Subjects, filters: Filters | None = None) -> list[Row]:
    """What `build` would write now, and writes nothing. Raises TrainingRefused where that is nothing."""
    filters = filters or Filters()
    rows, _ = _kept(sorted(_rows(archive, subjects, filters), key=lambda row: row.event_id), archive.erasures(), subjects)
    if not rows:
        raise _nothing(filters)
    return rows


def _nothing(filters: Filters) -> TrainingRefused:
    return TrainingRefused(f"no opinion about a finished answer matches {filters.model_dump_json()}; collect ratings first")


def _kept(rows: list[Row], erased: Mapping[str, int], subjects: Subjects) -> tuple[list[Row], dict[str, str]]:
    """Rows of people who are still there, and their leaves."""
    leaves = {}
    for row in rows:
        if not _gone(row.subject, row.rater, row.stamp, erased):
            with contextlib.suppress(Gone):
                leaves[row.event_id] = _leaf(row, subjects)
    return [row for row in rows if row.event_id in leaves], leaves


def _gone(subject: str, rater: str, stamp: int, erased: Mapping[str, int]) -> set[str]:
    """Who of those behind a row was erased after it."""
    return {who for who in (subject, rater) if erased.get(who, 0) >= stamp}


@contextlib.contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Nobody else writes or redacts a snapshot in this folder meanwhile; the kernel frees the lock of a process that dies.

    Raises NotDurable where the folder cannot be made."""
    with locked_folder(out_dir):
        yield


def readable() -> bool:
    """Whether this process can read snapshots: pyarrow is here."""
    return importlib.util.find_spec("pyarrow") is not None


def all_in(out_dir: Path) -> list[Path]:
    """Every snapshot there, after what killed processes left is put right: a redaction that broke off is undone, the rest goes.

    Hold `locked`. Raises NotDurable."""
    for left in out_dir.glob(".*/"):
        digest = left.name.split(".")[1]
        try:
            if left.suffix == ".old" and not (out_dir / digest).exists():
                left.rename(out_dir / digest)
            else:
                shutil.rmtree(left)
        except OSError as exc:
            raise NotDurable(f"{left}, which a killed process left, cannot be put right: {exc.strerror}", retry_after_s=2) from exc
    _settle(out_dir)
    return sorted(path for path in out_dir.iterdir() if (path / HEAD_FILE).exists())


def rows_of(path: Path, erased: Mapping[str, int]) -> Counter[str]:
    """How many rows each of these subjects has in the snapshot from before the stamp of their erasure."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path / ROWS_FILE, columns=["subject", "rater", "stamp"])
    except (OSError, pyarrow.ArrowException) as exc:
        raise TrainingRefused(f"snapshot {path} cannot be read: {exc}; delete it, or bring it back from a backup") from exc
    return Counter(who for row in table.to_pylist() for who in _gone(row["subject"], row["rater"], row["stamp"], erased))


def load(path: Path) -> Snapshot:
    """Read and verify. Raises NotFound where there is no snapshot, TrainingRefused where it was changed."""
    import pyarrow.parquet

    try:
        head = json.loads((path / HEAD_FILE).read_text())
        filters = Filters.model_validate(head["filters"])
        if _digest(filters, head["leaves"]) != head["digest"] or _file_digest(path / ROWS_FILE) != head["rows_sha256"]:
            raise TrainingRefused(f"snapshot {path.name} was changed after it was written: its digest does not fit")
        table = pyarrow.parquet.read_table(path / ROWS_FILE).to_pylist()
        rows = [Row.model_validate(record | {"prompt": json.loads(record["prompt"])}) for record in table]
    except FileNotFoundError as exc:
        raise NotFound(f"there is no snapshot in {path}", field="snapshot") from exc
    except (KeyError, ValueError, ValidationError, pyarrow.ArrowException) as exc:
        raise TrainingRefused(f"snapshot {path} cannot be read: {exc}") from exc
    return Snapshot(path, head["digest"], rows, filters, head["redacted"])


def redacted(path: Path) -> bool:
    """Whether somebody was taken out of the snapshot, or it is gone."""
    try:
        return bool(json.loads((path / HEAD_FILE).read_text())["redacted"])
    except FileNotFoundError:
        return True


def redact(path: Path, erased: Mapping[str, int]) -> int:
    """Drop the rows of erased subjects (who asked or who rated) up to the stamp of their erasure, keep the leaves, mark the snapshot.

    How many were dropped. Hold `locked`. Raises NotDurable."""
    snapshot = load(path)
    kept = [row for row in snapshot.rows if not _gone(row.subject, row.rater, row.stamp, erased)]
    dropped = len(snapshot.rows) - len(kept)
    if dropped:
        head = json.loads((path / HEAD_FILE).read_text()) | {"redacted": True}
        _publish(path, kept, head)
    else:
        _settle(path.parent)
    return dropped


def _rows(archive: Archive, subjects: Subjects, filters: Filters) -> Iterable[Row]:
    withdrawn = archive.withdrawn()
    for event in archive.current():
        if event.slot not in ("rating", "choice") or event.rater in withdrawn or not _in_time(event, filters):
            continue
        sides = _sides(archive, event)
        if sides is None or any(side.started.subject in withdrawn for side in sides):
            continue
        try:
            row = _row(event, sides, subjects)
        except Gone:  # erased while we read
            continue
        tagged = not filters.cohorts or bool(set(filters.cohorts) & set(row.cohorts))
        if tagged and row.source in filters.sources:
            yield row


def _in_time(event: FeedbackGiven, filters: Filters) -> bool:
    ms = stamp_ms(event.stamp)
    return event.tenant == filters.tenant and filters.since_ms <= ms and (filters.until_ms is None or ms < filters.until_ms)


def _sides(archive: Archive, event: FeedbackGiven) -> tuple[Interaction, ...] | None:
    """What the opinion is about, side a first; None while it cannot train."""
    if event.slot == "choice":
        found = archive.comparison(event.target)
        sides = tuple(found[side] for side in ("a", "b") if side in found)
    else:
        one = archive.interaction(event.target)
        sides = (one,) if one else ()
    if len(sides) != (2 if event.slot == "choice" else 1):
        return None
    for side in sides:
        if side.finished is None or side.finished.finish_reason not in TRAINABLE or not side.started.sealed or not side.finished.sealed:
            return None
    return sides


def _row(event: FeedbackGiven, sides: tuple[Interaction, ...], subjects: Subjects) -> Row:
    first, last = sides[0], sides[-1]
    asked = subjects.open(_box(first.started.sealed), StartedText)
    answers = [subjects.open(_box(side.finished.sealed if side.finished else None), FinishedText).answer for side in sides]
    finishes = [side.finished.finish_reason if side.finished else "" for side in sides]
    choice = event.slot == "choice"
    sources = (event.source, first.started.source)
    source: Source = "import" if "import" in sources else "simulated" if "simulated" in sources else "person"
    shown_first: Literal["a"] | None = None if source == "import" else "a"
    return Row.model_validate(
        {
            "event_id": event.event_id,
            "kind": "choice" if choice else "thumb",
            "rater": event.rater,
            "subject": first.started.subject,
            "cohorts": first.started.cohorts,
            "source": source,
            "prompt": asked.messages,
            "answer_a": answers[0],
            "answer_b": answers[1] if choice else None,
            "finish_a": finishes[0],
            "finish_b": finishes[1] if choice else None,
            "outcome": event.value,
            "side": shown_first if choice else first.started.side,
            "adapter_a": first.started.adapter,
            "adapter_b": last.started.adapter if choice else None,
            "stamp": event.stamp,
        }
    )


def _box(sealed: Sealed | None) -> Sealed:
    if sealed is None:
        raise Gone("an interaction that was not recorded cannot be read")
    return sealed


def _leaf(row: Row, subjects: Subjects) -> str:
    canonical = json.dumps(row.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hmac.new(subjects.leaf_key(row.subject), canonical.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _digest(filters: Filters, leaves: dict[str, str]) -> str:
    head = json.dumps({"row_version": ROW_VERSION, "filters": filters.model_dump(mode="json")}, sort_keys=True, separators=(",", ":"))
    total = hashlib.sha256(head.encode() + b"\n")
    for event_id in sorted(leaves):
        total.update(f"{event_id} {leaves[event_id]}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _publish(target: Path, rows: list[Row], head: dict[str, object]) -> None:
    """Write beside the target, fsync, rename: a reader sees all of it or nothing. Raises NotDurable."""
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.list_(pyarrow.string())
    types = {name: pyarrow.int64() if name == "stamp" else texts if name == "cohorts" else pyarrow.string() for name in Row.model_fields}
    records = [row.model_dump(mode="json") | {"prompt": json.dumps(row.prompt, ensure_ascii=False)} for row in rows]
    table = pyarrow.Table.from_pylist(records, schema=pyarrow.schema(list(types.items())))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    old = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        pyarrow.parquet.write_table(table, temporary / ROWS_FILE, compression="zstd")
        whole = head | {"rows": len(rows), "rows_sha256": _file_digest(temporary / ROWS_FILE)}
        (temporary / HEAD_FILE).write_text(json.dumps(whole, sort_keys=True, indent=1))
        for path in (temporary / ROWS_FILE, temporary / HEAD_FILE, temporary):
            sync(path)
        if target.exists():  # only redaction replaces a snapshot
            target.rename(old)
        temporary.rename(target)
        sync(target.parent)
    except OSError as exc:
        if old.exists() and not target.exists():
            with contextlib.suppress(OSError):  # what cannot be put back here, `all_in` puts back
                old.rename(target)
        raise NotDurable(f"snapshot {target} could not be written: {exc.strerror}", retry_after_s=2) from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _settle(folder: Path) -> None:
    """What is seen in the folder stays, also where whoever put it there failed or died before saying so. Raises NotDurable."""
    try:
        sync(folder)
    except OSError as exc:
        raise NotDurable(f"the folder {folder} could not be written: {exc.strerror}", retry_after_s=2) from exc
