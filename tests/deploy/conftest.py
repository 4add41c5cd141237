"""The registry's database, on SQLite and on PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_world import Postgres, binaries
from sqlalchemy import Engine

from feedback.database import open_database


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for the whole run."""
    found = binaries()
    if found is None:
        assert os.environ.get("CI") != "true", "CI must test on PostgreSQL: install it (initdb, pg_ctl)"
        pytest.skip("no PostgreSQL on this machine (initdb, pg_ctl)")
    server = Postgres(found)
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.sqlite'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new()


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()
