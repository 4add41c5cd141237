"""Pseudonyms, keys, tokens and API keys: who may say what, and what stays secret."""

from __future__ import annotations

import base64
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from feedback_world import stores_in
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event, text

from feedback import audit
from feedback.clock import wall_ms
from feedback.database import open_database
from feedback.errors import ConfigError, Conflict, Gone, InvalidInput, NotAllowed, NotAuthenticated, NotDurable, NotFound
from feedback.events import FeedbackText, Sealed
from feedback.ids import Ids
from feedback.keys import ApiKeys
from feedback.subjects import Subjects
from feedback.tokens import Claims, Tokens, rotate

KEY = Fernet.generate_key()
CLAIMS = Claims(target="i", target_kind="interaction", interactions=("i",), subject="s", actions=("rating", "comment"), expires=100)
TOKENS = Tokens([KEY], now=lambda: 50.0)
TOKEN = TOKENS.mint(CLAIMS)


def test_a_token_says_what_was_minted_and_survives_rotation() -> None:
    assert TOKENS.check(TOKEN) == CLAIMS
    newer = Fernet.generate_key()
    assert Tokens([newer, KEY], now=lambda: 50.0).check(TOKEN) == CLAIMS
    with pytest.raises(NotAuthenticated):
        Tokens([newer], now=lambda: 50.0).check(TOKEN)


class Deaf(Tokens):
    """The control: never looks at the file again before it refuses."""

    def _changed(self) -> bool:
        return False


def test_a_token_of_a_new_key_is_accepted_by_gateways_that_have_not_looked_yet(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    path = tmp_path / "keys" / "token.keys"
    claims = CLAIMS.model_copy(update={"expires": 2**40})
    one, other, deaf = Tokens(path), Tokens(path), Deaf(path)
    first = one.mint(claims)
    assert other.check(first) == deaf.check(first) == claims
    rotate(path, stores.engine, "ada")
    assert len(path.read_bytes().split()) == 2 and path.stat().st_mode & 0o77 == 0
    one._look_at = 0.0  # its second has passed
    second = one.mint(claims)
    assert other.check(second) == claims and one.check(first) == claims
    with pytest.raises(NotAuthenticated):
        deaf.check(second)
    rotate(path, stores.engine, "ada")
    third = Tokens(path).mint(claims)
    for tokens in (one, other):
        tokens._look_at = 0.0
        assert tokens.check(third) == tokens.check(second) == claims
        with pytest.raises(NotAuthenticated):
            tokens.check(first)
    rows = [(row["actor"], row["action"]) for row in audit.read(stores.engine)]
    assert rows == [("ada", "token_keys.rotated")] * 2 and audit.verify(stores.engine)[1] is None
    stores.close()


def test_a_key_file_that_breaks_while_a_gateway_runs_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "token.keys"
    path.write_bytes(KEY)
    tokens = Tokens(path, now=lambda: 50.0)
    for broken in (b"", b"no key"):
        path.write_bytes(broken)
        tokens._look_at = 0.0
        assert tokens.check(tokens.mint(CLAIMS)) == CLAIMS
    path.unlink()
    tokens._look_at = 0.0
    assert tokens.check(TOKEN) == CLAIMS
    newer = Fernet.generate_key()
    path.write_bytes(newer + b"\n" + KEY)
    assert tokens.check(Tokens([newer]).mint(CLAIMS)) == CLAIMS


def test_a_rotation_that_cannot_be_recorded_changes_nothing(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    path = tmp_path / "keys" / "token.keys"
    before = path.read_bytes()
    with stores.engine.begin() as db:
        db.execute(text("DROP TABLE audit"))
    with pytest.raises(NotDurable):
        rotate(path, stores.engine, "ada")
    assert path.read_bytes() == before
    stores.close()


def test_an_expired_token_is_gone() -> None:
    assert Tokens([KEY], now=lambda: 99.9).check(TOKEN) == CLAIMS
    with pytest.raises(Gone, match="expired"):
        Tokens([KEY], now=lambda: 100.0).check(TOKEN)


@settings(deadline=None)
@given(st.integers(0, len(TOKEN) - 1), st.characters())
def test_no_changed_character_is_accepted(where: int, char: str) -> None:
    changed = TOKEN[:where] + char + TOKEN[where + 1 :]
    if changed != TOKEN:
        with pytest.raises(NotAuthenticated):
            TOKENS.check(changed)


@settings(deadline=None)
@given(st.integers(0, len(TOKEN)), st.sampled_from("!\n \x00=é"))
def test_no_inserted_character_is_accepted(where: int, char: str) -> None:
    with pytest.raises(NotAuthenticated):
        TOKENS.check(TOKEN[:where] + char + TOKEN[where:])


def test_the_control_a_bare_fernet_takes_strings_that_nobody_minted() -> None:
    # Why `check` re-encodes: base64 skips foreign bytes, so without that rule these two would both be "our" token.
    assert Fernet(KEY).decrypt((TOKEN[:10] + "!" + TOKEN[10:]).encode()) == Fernet(KEY).decrypt(TOKEN.encode())


def test_a_huge_token_and_a_broken_key_file_are_refused() -> None:
    with pytest.raises(NotAuthenticated, match="4096"):
        TOKENS.check("A" * 5000)
    with pytest.raises(ConfigError, match=r"token\.keys"):
        Tokens([b"short"])


def test_a_text_opens_until_its_person_is_erased_and_a_returning_one_gets_a_new_key(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    subjects = stores.subjects
    anna, text = subjects.pseudonym("default", "anna"), FeedbackText(comment="too long")
    sealed = subjects.seal((anna,), text)
    assert "too long" not in base64.b64decode(sealed.box).decode("latin1")
    assert subjects.open(sealed, FeedbackText) == text
    leaf = subjects.leaf_key(anna)
    assert subjects.erase(anna) == 1
    with pytest.raises(Gone):
        subjects.open(sealed, FeedbackText)
    again = subjects.seal((anna,), text)
    assert subjects.open(again, FeedbackText) == text
    assert subjects.leaf_key(anna) != leaf
    with pytest.raises(Gone):
        subjects.open(sealed, FeedbackText)
    stores.close()


def test_the_bytes_of_a_destroyed_key_are_nowhere_in_the_database(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    stores.subjects.seal(("anna",), FeedbackText())
    db = sqlite3.connect(tmp_path / "registry.sqlite")
    wrapped = bytes(db.execute("SELECT wrapped FROM subject_keys").fetchone()[0])
    db.close()
    files = list(tmp_path.glob("registry.sqlite*"))
    assert any(wrapped in file.read_bytes() for file in files)  # the search can find it
    stores.subjects.erase("anna")
    assert not any(wrapped in file.read_bytes() for file in files if file.exists())
    stores.close()


def test_a_correction_needs_both_peoples_keys(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    sealed = stores.subjects.seal(("anna", "ben"), FeedbackText(correction="Cut off both ends first."))
    assert stores.subjects.open(sealed, FeedbackText).correction == "Cut off both ends first."
    stores.subjects.erase("ben")
    with pytest.raises(Gone):
        stores.subjects.open(sealed, FeedbackText)
    stores.close()


def test_two_processes_agree_on_a_new_persons_key_and_a_box_cannot_be_moved(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    kek, pseudonym = ((tmp_path / "keys" / name).read_bytes() for name in ("kek", "pseudonym"))
    other = Subjects(stores.engine, kek, pseudonym)
    sealed = stores.subjects.seal(("anna",), FeedbackText(comment="c"))
    assert other.open(sealed, FeedbackText).comment == "c"
    assert stores.subjects.open(other.seal(("anna",), FeedbackText(comment="d")), FeedbackText).comment == "d"
    stores.subjects.seal(("ben",), FeedbackText())
    with pytest.raises(InvalidInput, match="sealed"):
        other.open(Sealed(subjects=("ben",), box=sealed.box), FeedbackText)
    wrong = Subjects(stores.engine, b"x" * 32, pseudonym)
    with pytest.raises(ConfigError, match="kek"):
        wrong.open(sealed, FeedbackText)
    stores.close()


def test_a_crowd_of_new_people_shares_commits_and_a_failed_one_fails_for_all_in_it(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    other = open_database(stores.engine.url.render_as_string(hide_password=False))
    commits = 0

    def committed(_: object) -> None:
        nonlocal commits
        commits += 1

    event.listen(stores.engine, "commit", committed)

    def seal(number: int) -> str:
        try:
            return stores.subjects.seal((f"person {number}",), FeedbackText(comment=str(number))).box
        except NotDurable as exc:
            return str(exc)

    def crowd(numbers: range, wait_s: float) -> list[str]:
        with ThreadPoolExecutor(len(numbers)) as threads, other.connect() as held:
            held.exec_driver_sql("BEGIN IMMEDIATE")
            waiting = [threads.submit(seal, number) for number in numbers]
            time.sleep(wait_s)
            held.rollback()
            return [each.result() for each in waiting]

    boxes = crowd(range(40), 0.5)
    assert 1 <= commits <= 4, "the first alone, then those who came meanwhile"
    texts = [stores.subjects.open(Sealed(subjects=(f"person {number}",), box=box), FeedbackText) for number, box in enumerate(boxes)]
    assert [each.comment for each in texts] == [str(number) for number in range(40)]
    event.listen(stores.engine, "checkout", lambda connection, *_: connection.execute("PRAGMA busy_timeout=100"))
    assert set(crowd(range(40, 50), 2.0)) == {"a subject's key could not be stored: database is locked"}
    assert not any(stores.subjects.known(f"person {number}") for number in range(40, 50)), "nothing of it is written"
    assert all("database" not in box for box in (seal(number) for number in range(40, 50))), "and asked again it works"
    other.dispose()
    stores.close()


def test_an_api_key_is_checked_scoped_disabled_and_never_stored_in_clear(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    keys = ApiKeys(stores.engine)
    assert keys.count() == 0
    key, secret = keys.create("Ada Lovelace", ("chat", "feedback"), person=True)
    assert keys.check(secret) == key and keys.list() == [key]
    assert not any(secret[16:].encode() in file.read_bytes() for file in tmp_path.glob("registry.sqlite*"))
    key.require("chat")
    with pytest.raises(NotAllowed, match="adapters:promote"):
        key.require("adapters:promote")
    for wrong in (secret[:-1] + ("a" if secret[-1] != "a" else "b"), "pl_x", "pl_" + "A" * 12 + "_" + "B" * 32, ""):
        with pytest.raises(NotAuthenticated):
            keys.check(wrong)
    keys.disable(key.id)
    with pytest.raises(NotAuthenticated, match="disabled"):
        keys.check(secret)
    _, old = keys.create("expired", ("chat",), expires_ms=wall_ms() - 1)
    with pytest.raises(NotAuthenticated, match="expired"):
        keys.check(old)
    with pytest.raises(NotFound):
        keys.disable("nobody")
    with pytest.raises(InvalidInput, match="root"):
        keys.create("x", ("root",))  # type: ignore[arg-type]
    with pytest.raises(Conflict, match="already"):
        keys.disable(key.id)
    for origin in ("app.example", "https://app.example/", "https://APP.example", "*", "null"):
        with pytest.raises(InvalidInput, match="origins"):
            keys.create("x", ("chat",), origins=(origin,))
    rows = [(row["actor"], row["action"], row["subject"]) for row in audit.read(stores.engine)]
    assert rows[:2] == [("this machine", "key.created", key.id), ("this machine", "key.disabled", key.id)] and len(rows) == 3
    for owner in (" ", "x" * 201):
        with pytest.raises(InvalidInput, match="1 to 200"):
            keys.create(owner, ("chat",))
    with stores.engine.begin() as db:
        db.execute(text("DROP TABLE api_keys"))
    with pytest.raises(NotDurable, match="api_keys"):
        keys.create("too late", ("chat",))
    with pytest.raises(NotDurable, match="api_keys"):
        keys.check("pl_" + "A" * 12 + "_" + "B" * 32)
    stores.close()


def test_ids_repeat_for_the_same_request_only() -> None:
    ids = Ids(b"k" * 32)
    one = ids.feedback("t", "s", "rating", "i", b"{}", "key")
    assert one == ids.feedback("t", "s", "rating", "i", b"{}", "key")
    others = [
        ids.feedback("t", "s", "rating", "i", b"{ }", "key"),
        ids.feedback("t", "s", "rating", "other", b"{}", "key"),
        ids.feedback("t", "s", "comment", "i", b"{}", "key"),
        ids.feedback("t", "s2", "rating", "i", b"{}", "key"),
        ids.feedback("t", "s", "rating", "i", b"{}", None),
        ids.feedback("t", "s", "rating", "i", b"{}", None),
        Ids(b"l" * 32).feedback("t", "s", "rating", "i", b"{}", "key"),
    ]
    assert len({one, *others}) == 8
    assert ids.digest("x", "ab", "c") != ids.digest("x", "a", "bc")
    assert ids.idempotency("t", "s", None) is None
