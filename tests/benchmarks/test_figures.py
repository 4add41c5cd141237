"""The page of figures."""

from __future__ import annotations

from benchmarks.figures import page, table


def test_a_table_has_its_rows_names_as_head() -> None:
    assert table([{"who": "ours", "s": 1.23456}, {"who": "theirs", "s": None}])[1:] == [
        "| who | s |",
        "| --- | --- |",
        "| ours | 1.23 |",
        "| theirs | None |",
    ]
    assert table([]) == []


def test_a_page_shows_checks_table_and_control() -> None:
    check = {"what": "ratio", "value": 2.0, "bound": ">= 1.2", "ok": True}
    result = {"name": "x", "ok": True, "checks": [check], "figures": {"table": [{"who": "ours"}]}, "versions": {}, "seed": 0}
    text = page([result | {"control": {"what": "slowed", "caught": True}}])
    assert "| ratio | 2 | >= 1.2 | yes |\n\n| who |\n| --- |\n| ours |\n\nControl: slowed: caught." in text
