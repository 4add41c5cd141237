"""Pairs that people elsewhere have judged become events like any others.

Two forms, one JSON object a line, `.jsonl` or `.jsonl.gz`, with `chosen` and `rejected`:
- strings of turns "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH): the turns that both share are the prompt, the last
  answer differs;
- lists of {"role", "content"} messages (TRL's conversational form), with the prompt inside or apart in `prompt`.
An optional `rater` names who judged; without it the source is one rater.

Ids are hashes of the content, so importing twice adds nothing. Which answer becomes side a is drawn by that hash, because a file that
lists the better one first would teach that the first one is better.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue, ValidationError

from feedback.errors import InvalidInput
from feedback.events import Event, FeedbackGiven, FinishedText, InteractionFinished, InteractionStarted, Model, Side, StartedText
from feedback.sqlite_log import SqliteLog
from feedback.subjects import Subjects

MAX_LINE_BYTES = 1_000_000
BATCH_PAIRS = 100
TURN = re.compile(r"\n\n(Human|Assistant):")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass
class ImportResult:
    """What became of a file."""

    added: int = 0
    skipped: int = 0
    """Pairs that were there already."""
    errors: list[tuple[int, str, str]] = field(default_factory=list)
    """Line number, field and what is wrong with it; the other lines were imported."""


class _Message(Model):
    role: str
    content: str


@dataclass(frozen=True)
class _Pair:
    prompt: list[dict[str, JsonValue]]
    chosen: str
    rejected: str
    rater: str | None


def import_file(path: Path, source: str, log: SqliteLog, subjects: Subjects, tenant: str = "default") -> ImportResult:
    """Import every good line. Raises InvalidInput where the file or the source's name cannot be used, NotDurable where the disk is full;
    what was imported before stays, and a second run goes on from there."""
    if not NAME.fullmatch(source):
        raise InvalidInput(f"source '{source}' must be 1 to 64 letters, digits, '.', '_' or '-'", field="source")
    result = ImportResult()
    began = log.clock.tick()
    seen: set[str] = set()
    batch: list[list[Event]] = []
    for number, line in _lines(path, result):
        if not line.strip():
            continue
        try:
            events = _events(_parse(line), source, subjects, tenant)
        except InvalidInput as exc:
            result.errors.append((number, exc.field or "line", exc.message))
            continue
        if events[-1].event_id in seen:
            result.skipped += 1
            continue
        seen.add(events[-1].event_id)
        batch.append(events)
        if len(batch) == BATCH_PAIRS:
            _store(batch, log, began, result)
            batch = []
    _store(batch, log, began, result)
    if not (result.added or result.skipped or result.errors):
        raise InvalidInput(f"the file {path} holds no lines", field="file")
    return result


def _store(batch: list[list[Event]], log: SqliteLog, began: int, result: ImportResult) -> None:
    for event in log.append_sync([event for pair in batch for event in pair]):
        if isinstance(event, FeedbackGiven):
            # A stamp from before this import: the log had it and handed back what is stored.
            if event.stamp > began:
                result.added += 1
            else:
                result.skipped += 1


def _lines(path: Path, result: ImportResult) -> Iterator[tuple[int, str]]:
    """Numbered from 1; bytes that are no UTF-8 arrive as surrogates and are refused with their line. A file that breaks off is an error
    of the line where it does; one of which nothing can be read raises InvalidInput."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield number, raw.decode("utf-8-sig", "surrogateescape")
                while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):  # the rest of a line that is too long is no line of its own
                    raw = file.readline(MAX_LINE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as exc:
        reason = getattr(exc, "strerror", None) or exc
        if number == 0:
            raise InvalidInput(f"the file {path} cannot be read: {reason}", field="file") from exc
        result.errors.append((number + 1, "file", f"the rest of {path} cannot be read: {reason}"))


def _parse(line: str) -> _Pair:
    """Raises InvalidInput naming the field."""
    if len(line) > MAX_LINE_BYTES:
        raise InvalidInput(f"the line is longer than {MAX_LINE_BYTES} bytes", field="line")
    if any("\udc80" <= char <= "\udcff" for char in line):
        raise InvalidInput("the line is not UTF-8", field="line")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise InvalidInput(f"the line is not JSON: {exc}", field="line") from exc
    if not isinstance(record, dict):
        raise InvalidInput("the line is not a JSON object", field="line")
    for name in ("prompt", "chosen", "rejected", "rater"):
        try:
            json.dumps(record.get(name), ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as exc:
            raise InvalidInput(f"{name} cannot be written as UTF-8: {exc}", field=name) from exc
    rater = record.get("rater")
    if rater is not None and not (isinstance(rater, str) and 0 < len(rater) <= 200):
        raise InvalidInput("rater must be a string of 1 to 200 characters", field="rater")
    given = _messages(record["prompt"], "prompt") if "prompt" in record else []
    chosen = _turns(record, "chosen", given)
    rejected = _turns(record, "rejected", given)
    if chosen[:-1] != rejected[:-1]:
        raise InvalidInput("chosen and rejected differ before their last turn: they answer different prompts", field="rejected")
    if chosen[-1].content == rejected[-1].content:
        raise InvalidInput("chosen and rejected give the same answer", field="rejected")
    prompt: list[dict[str, JsonValue]] = [{"role": turn.role, "content": turn.content} for turn in chosen[:-1]]
    return _Pair(prompt, chosen[-1].content, rejected[-1].content, rater)


def _turns(record: dict[str, object], name: str, given: list[_Message]) -> list[_Message]:
    """The whole conversation, its last turn the assistant's and the one before it not."""
    if name not in record:
        raise InvalidInput(f"{name} is missing", field=name)
    value = record[name]
    bare = isinstance(value, str) and not TURN.match(value)
    if bare and not given:
        raise InvalidInput(f'{name} must begin with a "\\n\\nHuman:" turn, or prompt must be given', field=name)
    said = [_Message(role="assistant", content=str(value).strip())] if bare else _messages(value, name)
    turns = given + said
    if len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role == "assistant":
        raise InvalidInput(f"{name} must end with one assistant turn that follows a prompt", field=name)
    if not turns[-1].content.strip():
        raise InvalidInput(f"{name} ends with an empty answer", field=name)
    return turns


def _messages(value: object, name: str) -> list[_Message]:
    if isinstance(value, str):
        if not TURN.match(value):
            return [_Message(role="user", content=value.strip())]
        parts = TURN.split(value)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        return [_Message(role=roles[parts[i]], content=parts[i + 1].strip()) for i in range(0, len(parts), 2)]
    if not isinstance(value, list) or not value:
        raise InvalidInput(f"{name} must be a string or a list of messages", field=name)
    try:
        messages = [_Message.model_validate(each, strict=True) for each in value]
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{name}: a message needs role and content: {where} {first['msg']}", field=name) from exc
    for message in messages:
        if message.role not in ("system", "user", "assistant"):
            raise InvalidInput(f"{name}: role '{message.role}' is not system, user or assistant", field=name)
    return messages


def _events(pair: _Pair, source: str, subjects: Subjects, tenant: str) -> list[Event]:
    """Two finished interactions and the choice between them, the choice last."""
    rater = subjects.pseudonym(tenant, f"import:{source}/{pair.rater or ''}")
    parts = (tenant, source, pair.rater or "", json.dumps(pair.prompt, sort_keys=True), pair.chosen, pair.rejected)
    ids = subjects.ids

    def id_of(what: str) -> str:
        return ids.content(what, *parts)

    chosen_side: Side = "a" if ids.digest("import side", *parts)[0] & 1 else "b"
    rejected_side: Side = "b" if chosen_side == "a" else "a"
    comparison = id_of("comparison")
    asked = StartedText(messages=pair.prompt)
    events: list[Event] = []
    for side, answer in ((chosen_side, pair.chosen), (rejected_side, pair.rejected)):
        interaction = id_of(f"interaction {side}")
        events.append(
            InteractionStarted(
                event_id=id_of(f"started {side}"),
                tenant=tenant,
                interaction_id=interaction,
                subject=rater,
                subject_kind="named",
                cohorts=(f"import:{source}",),
                source="import",
                comparison_id=comparison,
                side=side,
                model=source,
                adapter="",
                sealed=subjects.seal((rater,), asked),
            )
        )
        finished = subjects.seal((rater,), FinishedText(answer=answer))
        events.append(
            InteractionFinished(
                event_id=id_of(f"finished {side}"),
                tenant=tenant,
                interaction_id=interaction,
                subject=rater,
                finish_reason="stop",
                sealed=finished,
            )
        )
    events.append(
        FeedbackGiven(
            event_id=id_of("choice"), tenant=tenant, target=comparison, rater=rater, slot="choice", value=chosen_side, source="import"
        )
    )
    return events
