"""The search that `make bench-erase` stands on finds what a plain search finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.canaries import Needles

few = st.sampled_from(b"ab\0")  # so that strings begin alike, overlap and stand at every place


@given(st.lists(st.binary(min_size=8, max_size=12) | st.lists(few, min_size=8, max_size=12).map(bytes), min_size=1, max_size=6), st.data())
def test_needles_are_found_as_one_by_one(needles: list[bytes], data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from(needles) | st.lists(few, max_size=20).map(bytes), max_size=8))
    text = b"".join(parts)
    found = Needles({needle: [needle] for needle in needles}).within(text)
    assert sorted(found) == sorted({needle for needle in needles if needle in text})
