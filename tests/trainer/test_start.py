"""What ends a cycle from outside: one error, and the next try goes on where it was."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cycle_world import SETTINGS, make_job
from typer.testing import CliRunner

import plaudit
from commands import learning
from deploy.config import PolicySettings
from deploy.registry import Registry
from feedback.config import FeedbackSettings, Settings
from feedback.errors import Conflict, EngineUnavailable, NotDurable, PlauditError, TrainingRefused
from feedback.stores import Stores, open_stores
from trainer import schedule, start
from trainer.schedule import begun


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Stores]]:
    folder = tmp_path_factory.mktemp("start")
    job = make_job(folder)
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)), "trainer")
    yield job.policy, stores
    stores.close()


def learn(world: tuple[Path, Stores]) -> None:
    policy, stores = world
    start.learn(stores, Registry(stores.engine), policy, PolicySettings(name="tiny"), SETTINGS, lambda what, share: None)


@pytest.mark.parametrize(
    ("fault", "told", "goes_on"),
    [
        (EngineUnavailable("rollouts.urls: none of 2 servers is left"), "none of 2 servers is left", True),
        (OSError(errno.ENOSPC, "No space left on device"), "cycles: No space left on device; make room there and run", True),
        (TrainingRefused("labels: 0 are left", field="labels"), "0 are left", False),
    ],
)
def test_only_what_was_refused_begins_anew(
    world: tuple[Path, Stores], monkeypatch: pytest.MonkeyPatch, fault: Exception, told: str, goes_on: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(start, "run_cycle", fail)
    kind = type(fault) if isinstance(fault, PlauditError) else NotDurable
    with pytest.raises(kind, match=told):
        learn(world)
    assert (begun(world[1].settings.feedback.data_dir) is not None) == goes_on


def test_a_second_trainer_on_the_same_folder_is_refused(world: tuple[Path, Stores], monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*_: Any, **__: Any) -> None:
        learn(world)

    monkeypatch.setattr(start, "run_cycle", meanwhile)
    with pytest.raises(Conflict, match="another process trains there now; wait until its cycle has ended"):
        learn(world)


@pytest.mark.parametrize(("field", "goes_on"), [("labels", True), ("loss", False)])
def test_the_trainer_goes_on_after_a_refusal_that_more_ratings_may_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, goes_on: bool
) -> None:
    (tmp_path / "plaudit.toml").write_text(f'[feedback]\ndata_dir = "{tmp_path}"\n[cycle]\nmin_new_ratings = 10\nmetrics_port = 0\n')
    held, tries, ratings = iter((10, 19, 20)), list[int](), [0]
    monkeypatch.setattr(schedule, "ratings_now", lambda archive: ratings[0])

    def refuse(*_: Any) -> str:
        tries.append(ratings[0])
        raise TrainingRefused(f"{field}: too few", field=field)

    def look_again(_: float) -> None:
        ratings[0] = next(held)  # the trainer ends where it is empty

    monkeypatch.setattr(learning, "_train", refuse)
    monkeypatch.setattr(time, "sleep", look_again)
    done = CliRunner().invoke(plaudit.app, ["trainer", "--config", str(tmp_path / "plaudit.toml")])
    assert tries == ([10, 20] if goes_on else [10])
    assert (isinstance(done.exception, TrainingRefused) is False) == goes_on
    assert ("refused: labels: too few; tried again after 10 new ratings" in done.output) == goes_on


@pytest.mark.parametrize("option", ["--dry-run", "--plan"])
def test_of_several_processes_the_first_one_looks_beforehand_and_the_others_end(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    def wait() -> None:
        raise AssertionError("it would wait for work that never comes")

    monkeypatch.setattr(start, "follow", wait)
    monkeypatch.setenv("RANK", "1")
    done = CliRunner().invoke(plaudit.app, ["train", option])
    assert (done.exit_code, done.output) == (0, "")
