"""From events to what people think now: last write wins per (target, rater, slot), by stamp, ties by event_id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from feedback.archive import Archive
from feedback.events import Event, FeedbackCleared, FeedbackGiven, Slot, SubjectErased
from feedback.partitions import SqliteLogs

Said = FeedbackGiven | FeedbackCleared
Cell = tuple[str, str, Slot]
"""Target, rater, slot."""


def fold(events: Iterable[Event]) -> dict[Cell, Said]:
    """The last word in every cell; a cleared cell stays as the clearing event, so that an older rating arriving later does not return.

    An event that appears with several stamps was sent again to another gateway. The least counts: what the person said next is later than
    the stamp that they heard of, which may be any of them. The result depends neither on the order of the events nor on how often each
    one appears.
    """
    first: dict[str, Said] = {}
    for event in events:
        if isinstance(event, FeedbackGiven | FeedbackCleared):
            known = first.get(event.event_id)
            if known is None or event.stamp < known.stamp:
                first[event.event_id] = event
    last: dict[Cell, Said] = {}
    for said in first.values():
        cell = (said.target, said.rater, said.slot)
        held = last.get(cell)
        if held is None or (held.stamp, held.event_id) < (said.stamp, said.event_id):
            last[cell] = said
    return last


@dataclass(frozen=True)
class CurrentState:
    """What one rater holds about one target."""

    slots: dict[Slot, FeedbackGiven]
    as_of: int
    """Stamp up to which other machines' events are in it; this machine's are always in."""
    said: Mapping[str, Said] = field(default_factory=dict)
    """Everything that this rater is known to have said about it, by event_id."""


def current_state(archive: Archive, logs: SqliteLogs, target: str, rater: str) -> CurrentState:
    """The archive merged with this machine's partitions, so that a rater reads what he just wrote."""
    as_of = archive.as_of()
    erased = max([archive.erased(rater), *(event.stamp for event in logs.about(rater) if isinstance(event, SubjectErased))])
    known = [event for event in (*archive.said_about(target), *logs.about(target)) if event.stamp > erased]
    slots: dict[Slot, FeedbackGiven] = {}
    for (_, whose, slot), event in fold(known).items():
        if whose == rater and isinstance(event, FeedbackGiven):
            slots[slot] = event
    words = [event for event in known if isinstance(event, FeedbackGiven | FeedbackCleared) and event.rater == rater]
    words.sort(key=lambda event: -event.stamp)  # so that of two copies the one that counts is kept
    return CurrentState(slots, as_of, {event.event_id: event for event in words})
