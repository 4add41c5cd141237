"""The version of the registry's database, and how an older one is brought up to date.

Every change of a table, in whichever room, is a file in `migrations/versions/` beside the change itself; a test compares what the
revisions make with what the rooms declare. A process upgrades the database when it opens it, one at a time and all or nothing.
Revisions only add, so that processes of the version before may go on until they are replaced.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine

from feedback.database import moment, upgrading
from feedback.errors import ConfigError

MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(engine: Engine) -> None:
    """Bring the tables to this code's version. Raises ConfigError where a newer version has made them, NotDurable where the database
    cannot be read or written."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    with moment(engine) as db:
        if _known(db, script) == script.get_current_head():
            return
    with upgrading(engine) as db:
        if _known(db, script) == script.get_current_head():
            return  # another process was faster
        config.attributes["connection"] = db
        command.upgrade(config, "head")


def _known(db: Connection, script: ScriptDirectory) -> str | None:
    """The database's revision; None before the first. Raises ConfigError where this code does not know it."""
    revision = MigrationContext.configure(db).get_current_revision()
    try:
        script.get_revision(revision or "base")
    except CommandError as exc:
        raise ConfigError(
            f"registry.url: the database is of revision {revision}, this version of Plaudit knows up to {script.get_current_head()}: "
            "a newer one has upgraded it; install that version, or restore the backup from before the upgrade",
            field="registry.url",
        ) from exc
    return revision
