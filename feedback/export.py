"""A snapshot as one file that other trainers read: TRL's preference and unpaired forms, or plain JSON lines.

    preference  {"prompt": [messages], "chosen": [{"role": "assistant", ...}], "rejected": [...]}    from choices of one side
    unpaired    {"prompt": [messages], "completion": [{"role": "assistant", ...}], "label": bool}    from thumbs, and choices if asked for
    jsonl       one `snapshot.Row` a line

The texts lie open in the file, so it is written for its owner alone, and each export is audited with the snapshot's digest: that is how an
erasure can name the files that hold an erased person (`made_from`). The same snapshot gives the same bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from sqlalchemy import Engine

from feedback import audit
from feedback.database import transaction
from feedback.errors import InvalidInput, NotDurable
from feedback.files import new_file, sync
from feedback.snapshot import Row, Snapshot

Form = Literal["preference", "unpaired", "jsonl"]
ACTION = "feedback.exported"


@dataclass(frozen=True)
class Exported:
    """What became of a snapshot's opinions."""

    path: Path
    written: int
    """Lines of the file."""
    left_out: dict[str, int]
    """Opinions that this form cannot say, by why."""


def export(snapshot: Snapshot, out: Path, form: Form, *, choices: bool = False) -> Exported:
    """Write the file beside its place, fsync, rename: a reader sees all of it or nothing. `.gz` by the file's name.

    `choices` makes the unpaired form say choices too: what was chosen is good, what was rejected or called bad is not.
    Raises InvalidInput where the place is no place for a file or the form can say none of the opinions, NotDurable where the disk is full.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise InvalidInput(f"out: {out} is no place for a file; name one in a folder that exists", field="out")
    left_out: Counter[str] = Counter()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}")
    written = 0
    try:
        with _opened(temporary, packed=out.suffix == ".gz") as file:
            for line in _lines(snapshot.rows, form, choices, left_out):
                file.write(line)
                written += 1
        if not written:
            why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise InvalidInput(f"form: '{form}' can say none of the {len(snapshot.rows)} opinions ({why}); choose another", field="form")
        temporary.rename(out)
        sync(out.parent)
    except OSError as exc:
        raise NotDurable(f"{out} could not be written: {exc.strerror}; make room and export again") from exc
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return Exported(out, written, dict(left_out))


def record(engine: Engine, actor: str, snapshot: Snapshot, exported: Exported, form: Form) -> None:
    """Write down who exported what, to find the file again when somebody in it is erased."""
    audit.open_audit(engine)
    with transaction(engine) as db:
        reason = {"file": str(exported.path.resolve()), "form": form, "lines": exported.written}
        audit.record(db, actor, ACTION, snapshot.digest, json.dumps(reason))


def made_from(engine: Engine, digests: Collection[str]) -> list[str]:
    """The files that were made from these snapshots. Whether they still lie there, or were copied, is not known here."""
    found = (row["reason"] for row in audit.read(engine) if row["action"] == ACTION and row["subject"] in digests)
    return sorted({str(json.loads(reason)["file"]) for reason in found})


def _lines(rows: Iterable[Row], form: Form, choices: bool, left_out: Counter[str]) -> Iterator[bytes]:
    for row in rows:
        records = _records(row, form, choices)
        if isinstance(records, str):
            left_out[records] += 1
            continue
        for each in records:
            yield json.dumps(each, ensure_ascii=False).encode() + b"\n"


def _records(row: Row, form: Form, choices: bool) -> list[dict[str, Any]] | str:
    """The lines of one opinion, or why this form cannot say it."""
    if form == "jsonl":
        return [row.model_dump(mode="json")]
    if form == "unpaired" and row.kind == "thumb":
        return [_unpaired(row, row.answer_a, row.outcome == "up")]
    if row.kind == "thumb":
        return "thumbs"
    if form == "unpaired" and not choices:
        return "choices"
    if form == "unpaired" and row.outcome == "both_bad":
        return [_unpaired(row, answer or "", False) for answer in (row.answer_a, row.answer_b)]
    if row.outcome not in ("a", "b"):
        return {"tie": "ties", "both_bad": "both bad"}[row.outcome]
    if row.answer_a == row.answer_b:
        return "the same answer twice"
    answers = (row.answer_a, row.answer_b or "")
    chosen, rejected = answers if row.outcome == "a" else answers[::-1]
    if form == "unpaired":
        return [_unpaired(row, chosen, True), _unpaired(row, rejected, False)]
    return [{"prompt": row.prompt, "chosen": _said(chosen), "rejected": _said(rejected)}]


def _unpaired(row: Row, answer: str, label: bool) -> dict[str, Any]:
    return {"prompt": row.prompt, "completion": _said(answer), "label": label}


def _said(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


@contextlib.contextmanager
def _opened(path: Path, *, packed: bool) -> Iterator[IO[bytes]]:
    with new_file(path) as file:
        if packed:  # without name and time, which would make every file another one
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as inner:
                yield cast(IO[bytes], inner)
        else:
            yield file
