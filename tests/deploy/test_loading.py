"""What was hashed is what is loaded; everything that is not an honest adapter is refused before the server hears of it."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from benchmarks.hostile import CASES
from benchmarks.sealed import MAX_RANK, honest, make_policy
from deploy.loading import FILES, Intake
from deploy.manifest import CONFIG, WEIGHTS
from feedback.errors import ConfigError, InvalidInput, NotFound, PlauditError


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "policy")


@pytest.fixture
def intake(policy: Path, tmp_path: Path) -> Intake:
    return Intake.of(policy, tmp_path / "private", MAX_RANK)


def test_an_honest_adapter_is_copied_where_nobody_writes(policy: Path, intake: Intake, tmp_path: Path) -> None:
    source = honest(policy, tmp_path / "store").seal()
    folder = intake.take(source)
    assert folder.parent == intake.root and folder.name.startswith(f"{source.name}-") and intake.unchanged(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in FILES)
    assert all(stat.S_IMODE(path.lstat().st_mode) == 0o444 for path in folder.iterdir())
    assert all(stat.S_IMODE(path.lstat().st_mode) == 0o755 for path in (folder, intake.root))
    assert [path.name for path in intake.root.iterdir()] == [folder.name], "nothing half-taken is left"


@pytest.mark.parametrize("what", list(CASES))
def test_one_thing_wrong_is_refused_in_one_line(what: str, policy: Path, intake: Intake, tmp_path: Path) -> None:
    make, reason = CASES[what]
    source = make(honest(policy, tmp_path / "store"))
    with pytest.raises((InvalidInput, NotFound)) as caught:
        intake.take(source)
    assert reason in caught.value.message and "\n" not in caught.value.message and len(caught.value.message) < 500
    assert list(intake.root.glob("*")) == [], "nothing of it is left where the server reads"


def test_a_copy_serves_again_without_its_source(policy: Path, intake: Intake, tmp_path: Path) -> None:
    source = honest(policy, tmp_path / "store").seal()
    folder = intake.take(source)
    shutil.rmtree(source)
    assert intake.take(source) == folder
    assert Intake.of(policy, intake.root, MAX_RANK).take(source) == folder, "after a restart too"


@pytest.mark.parametrize("name", [*FILES, ""])
def test_a_copy_that_was_touched_is_taken_again_elsewhere(policy: Path, intake: Intake, tmp_path: Path, name: str) -> None:
    source = honest(policy, tmp_path / "store").seal()
    folder = intake.take(source)
    if name:
        (folder / name).chmod(0o644)
        (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b"?")
        (folder / name).chmod(0o444)
    else:
        (folder / "more.py").touch()
    assert not intake.unchanged(folder)
    other = intake.take(source)
    assert other != folder and intake.unchanged(other), "the server's cache is keyed by path: other bytes never get this one again"


def test_exchanged_and_put_back_is_noticed(policy: Path, intake: Intake, tmp_path: Path) -> None:
    """The very same file is there again; between two looks the server may have read another."""
    folder = intake.take(honest(policy, tmp_path / "store").seal())
    (folder / WEIGHTS).rename(tmp_path / "away")
    (tmp_path / "away").rename(folder / WEIGHTS)
    assert not intake.unchanged(folder)
    other = intake.take(honest(policy, tmp_path / "other", seed=1).seal())
    other.rename(tmp_path / "away")
    (tmp_path / "away").rename(other)
    assert not intake.unchanged(other)


def test_a_root_that_others_write_is_refused(policy: Path, tmp_path: Path) -> None:
    source = honest(policy, tmp_path / "store").seal()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="nobody else may write"):
        Intake.of(policy, tmp_path / "open", MAX_RANK).take(source)
    with pytest.raises(ConfigError, match="may be written by everybody"):
        Intake.of(policy, tmp_path / "open" / "private", MAX_RANK).take(source)
    (tmp_path / "link").symlink_to(tmp_path / "store")
    with pytest.raises(ConfigError, match="nobody else may write"):
        Intake.of(policy, tmp_path / "link", MAX_RANK).take(source)


def test_a_file_that_grows_while_it_is_read_fills_no_disk(
    policy: Path, intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = honest(policy, tmp_path / "store").seal()
    monkeypatch.setattr("deploy.loading.CONFIG_BYTES", 10)
    with pytest.raises(InvalidInput, match="at most 10 fit"):
        intake.take(source)
    real = os.fstat

    def shrunk(descriptor: int) -> os.stat_result:
        told = list(real(descriptor))
        told[6] = 1
        return os.stat_result(told)

    monkeypatch.setattr("deploy.loading.os.fstat", shrunk)
    with pytest.raises(InvalidInput, match=f"{CONFIG} grew beyond 10 bytes"):
        intake.take(source)


def test_what_was_dropped_is_gone_and_a_killed_take_leaves_nothing(policy: Path, intake: Intake, tmp_path: Path) -> None:
    folder = intake.take(honest(policy, tmp_path / "store").seal())
    left = intake.root / ".taking-0"
    left.mkdir()
    (left / WEIGHTS).touch()
    second = intake.take(honest(policy, tmp_path / "store", seed=1).seal())
    assert not left.exists() and intake.kept() == sorted([folder, second])
    intake.drop(folder)
    assert intake.kept() == [second] and not intake.unchanged(folder)


def test_a_full_disk_is_one_clear_error(policy: Path, intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deploy.loading._copy_file", full)
    with pytest.raises(PlauditError, match=r"could not be copied .*No space left"):
        intake.take(honest(policy, tmp_path / "store").seal())
    assert intake.kept() == []
