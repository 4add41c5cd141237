"""The fold and the archive: each event once, the last word wins, whoever leaves is gone."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from feedback_world import answered, clearing, rating, stores_in
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.archive import Archive
from feedback.clock import stamp_ms
from feedback.errors import Conflict
from feedback.events import Event, FeedbackCleared, FeedbackGiven, InteractionFinished, SubjectErased, encode, new_id
from feedback.fold import Said, current_state, fold
from feedback.log import Position, Record


class Listed:
    """A reader over a list, as one partition."""

    def __init__(self, events: list[Said]) -> None:
        self.events = events

    def read(self, position: Position, limit: int) -> list[Record]:
        start = position.get("list", 0)
        chosen = self.events[start : start + limit]
        return [Record("list", start + n, event, encode(event)) for n, event in enumerate(chosen)]


@st.composite
def said(draw: st.DrawFn) -> list[Said]:
    """Few cells and few stamps, so that ties and re-ratings happen; an event_id stands for one event."""
    events: list[Said] = []
    for number in range(draw(st.integers(1, 12))):
        target, rater, stamp = draw(st.sampled_from("ij")), draw(st.sampled_from("rs")), draw(st.integers(1, 4))
        if draw(st.booleans()):
            events.append(rating(target, rater, draw(st.sampled_from(["up", "down"])), event_id=f"e{number}", stamp=stamp))
        else:
            events.append(clearing(target, rater, event_id=f"e{number}", stamp=stamp))
    return events


@settings(deadline=None)
@given(said(), st.randoms(use_true_random=False))
def test_the_fold_depends_neither_on_order_nor_on_repetition(events: list[Said], random: Random) -> None:
    shuffled = events + events[: len(events) // 2]
    random.shuffle(shuffled)
    assert fold(shuffled) == fold(events)


@settings(deadline=None)
@given(said())
def test_the_fold_keeps_the_greatest_stamp_and_then_id(events: list[Said]) -> None:
    for cell, last in fold(events).items():
        rivals = [event for event in events if (event.target, event.rater, event.slot) == cell]
        assert last == sorted(rivals, key=lambda event: (event.stamp, event.event_id))[-1]


@pytest.mark.parametrize("late_copy_first", [False, True])
def test_a_request_that_two_gateways_committed_counts_from_its_lesser_stamp(tmp_path: Path, late_copy_first: bool) -> None:
    """Up, sent again to another gateway because the first one hung; then down; then the first one commits up after all."""
    up, down = rating("i", "r", "up", event_id="up", stamp=10), rating("i", "r", "down", event_id="down", stamp=20)
    late = up.model_copy(update={"stamp": 30})
    arriving: list[Said] = [late, down, up] if late_copy_first else [up, down, late]
    assert fold(arriving) == {("i", "r", "rating"): down}
    archive = Archive(tmp_path / "archive.sqlite")
    assert archive.ingest(Listed(arriving)) == 2
    assert archive.state("i") == {("r", "rating"): down}
    assert archive.events("feedback.given") == [up, down]
    archive.close()


@settings(deadline=None, max_examples=30)
@given(events=said(), random=st.randoms(use_true_random=False))
def test_the_archive_holds_what_the_fold_says_in_whatever_order_events_come(
    events: list[Said], random: Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    arriving = events + events[:3]
    random.shuffle(arriving)
    archive = Archive(tmp_path_factory.mktemp("a") / "archive.sqlite")
    assert archive.ingest(Listed(arriving)) == len(events)
    held = {(target, rater, slot): event for target in "ij" for (rater, slot), event in archive.state(target).items()}
    assert held == {cell: event for cell, event in fold(events).items() if isinstance(event, FeedbackGiven)}
    archive.close()


def test_reading_again_or_with_two_readers_adds_nothing(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    stores.log.append_sync([rating("i", "r", "up"), rating("j", "r", "up")])
    assert stores.archive.ingest(stores.logs) == 2
    assert stores.archive.ingest(stores.logs) == 0
    stores.log.append_sync([rating("k", "r", "up")])
    other = Archive(tmp_path / "archive.sqlite")
    assert other.ingest(stores.logs) == 1
    assert stores.archive.ingest(stores.logs) == 0
    assert stores.archive.counts() == {"feedback.given": 3, "held:rating": 3, "poison": 0}
    other.close()
    stores.close()


def test_a_reader_that_was_replaced_is_refused(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    stores.log.append_sync([rating("i", "r", "up")])
    old = stores.archive.claim(["gateway"])
    new = stores.archive.claim(["gateway"])
    with pytest.raises(Conflict, match="taken over"):
        stores.archive.ingest(stores.logs, old)
    assert stores.archive.ingest(stores.logs, new) == 1
    stores.close()


def test_a_rater_reads_what_he_just_wrote(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    stores.log.append_sync([rating("i", "r", "up")])
    stores.archive.ingest(stores.logs)
    as_of = stores.archive.as_of()
    stores.log.append_sync([rating("i", "r", "down"), rating("i", "someone else", "up")])
    state = current_state(stores.archive, stores.logs, "i", "r")
    assert (state.slots["rating"].value, state.as_of) == ("down", as_of)
    stores.log.append_sync([clearing("i", "r")])
    assert current_state(stores.archive, stores.logs, "i", "r").slots == {}
    stores.close()


def test_an_erased_person_is_gone_and_what_arrives_late_is_too(tmp_path: Path) -> None:
    stores, late = stores_in(tmp_path), stores_in(tmp_path)
    stores.log.append_sync(answered(stores, "i", "anna", "Cut it in half."))
    stores.log.append_sync([rating("i", "anna", "up"), rating("other", "anna", "up"), rating("other", "ben", "up")])
    late.log.append_sync([rating("late", "anna", "down")])
    stores.archive.ingest(stores.log)  # not the partition of `late`
    erased = SubjectErased(event_id=new_id(), subject="anna")
    stores.log.append_sync([erased])
    assert current_state(stores.archive, stores.logs, "other", "anna").slots == {}
    stores.archive.ingest(stores.log)
    stores.archive.ingest(late.log)
    assert stores.archive.interaction("i") is None
    assert stores.archive.state("i") == {} and stores.archive.state("late") == {}
    assert list(stores.archive.state("other")) == [("ben", "rating")]
    stores.log.append_sync([rating("other", "anna", "down")])  # she came back
    stores.archive.ingest(stores.logs)
    assert stores.archive.state("other")["anna", "rating"].value == "down"
    late.close()
    stores.close()


def test_unrated_interactions_expire_and_rated_ones_stay(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    events: list[Event] = []
    for name in ("plain", "rated", "cleared"):
        events += answered(stores, name, "anna", "x")
    events += answered(stores, "left", "anna", "x", comparison="c", side="a") + answered(
        stores, "right", "anna", "y", comparison="c", side="b"
    )
    events += [rating("rated", "anna", "up"), rating("cleared", "anna", "up"), rating("c", "anna", "a", slot="choice")]
    last = stores.log.append_sync(events)[-1]
    stores.log.append_sync([clearing("cleared", "anna")])
    stores.archive.ingest(stores.logs)
    day = 24 * 3600 * 1000
    ms = last.stamp >> 16
    assert stores.archive.expire(ms + 29 * day) == 0
    assert stores.archive.expire(ms + 31 * day) == 2
    alive = [name for name in ("plain", "rated", "cleared", "left", "right") if stores.archive.interaction(name)]
    assert alive == ["rated", "left", "right"]
    stores.close()


def test_expiry_reaches_the_partition_too(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    last = stores.log.append_sync(
        [*answered(stores, "plain", "anna", "x"), *answered(stores, "rated", "anna", "y"), rating("rated", "anna", "up")]
    )[-1]
    day, ms = 24 * 3600 * 1000, last.stamp >> 16
    assert stores.expire(ms + 29 * day) == 0 and len(stores.logs.read({}, 10)) == 5
    assert stores.expire(ms + 31 * day) == 1
    assert stores.logs.read({}, 10) == []  # the rated one lives on in the archive
    assert stores.archive.interaction("rated") is not None and stores.archive.interaction("plain") is None
    assert len(stores.log.append_sync([rating("rated", "anna", "down")])) == 1 and stores.ingest() == 1
    stores.close()


def test_the_clearing_stays_as_a_tombstone() -> None:
    old, cleared = rating("i", "r", "up", stamp=1), clearing("i", "r", stamp=2)
    assert isinstance(fold([cleared, old])["i", "r", "rating"], FeedbackCleared)


def test_nothing_of_an_expired_interaction_is_left_in_any_file(tmp_path: Path) -> None:
    stores, gone, day = stores_in(tmp_path), stores_in(tmp_path, "gone"), 24 * 3600 * 1000
    events = [*answered(stores, "here", "anna", "Thin."), *answered(stores, "kept", "ben", "Thick.")]
    here = stores.log.append_sync([*events, rating("kept", "ben", "up")])
    sides = [*answered(gone, "l", "anna", "One.", comparison="c", side="a"), *answered(gone, "r", "anna", "Two.", comparison="c", side="b")]
    taken_back: list[Event] = [rating("c", "anna", "a", slot="choice"), clearing("c", "anna", slot="choice")]
    there = gone.log.append_sync([*sides, *taken_back])
    gone.close()
    stores.ingest()
    stored = {event.event_id.encode() for event in (*here, *there)}
    boxes = {event.sealed.box.encode() for event in (*here[:2], *there) if isinstance(event, InteractionFinished) and event.sealed}

    def found(wanted: set[bytes], folder: Path) -> set[bytes]:
        everything = b"".join(path.read_bytes() for path in folder.rglob("*.sqlite*"))
        return {each for each in wanted if each in everything}

    assert found(stored | boxes, tmp_path) == stored | boxes and len(boxes) == 3  # the search can find them
    now_ms = stamp_ms(here[0].stamp) + 31 * day
    assert stores.expire(now_ms) == 3
    kept = {event.event_id.encode() for event in here[2:]}
    assert found(stored | boxes, tmp_path) == kept and found(stored, tmp_path / "log") == set()
    assert [event.event_id for event in stores.archive.current()] == [here[-1].event_id]
    assert stores.expire(now_ms) == 0 and stores.archive.interaction("kept") is not None
    # A process of that name that comes back goes on behind the offsets that were read.
    again = stores_in(tmp_path, "gone")
    again.log.append_sync([rating("kept", "ben", "down")])
    assert stores.ingest() == 1
    again.close()
    stores.close()
