"""A PostgreSQL server of its own for the tests, where the machine has one."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from sqlalchemy import create_engine

PLACES = "/usr/lib/postgresql/*/bin", "/usr/local/pgsql/bin", "/usr/pgsql-*/bin"


def binaries() -> Path | None:
    """The folder of `initdb` and `pg_ctl`, of the newest version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    folders = [path for place in PLACES for path in Path("/").glob(place.lstrip("/")) if (path / "pg_ctl").exists()]
    return max(folders, key=lambda path: [int(part) for part in path.parent.name.split("-")[-1].split(".") if part.isdigit()], default=None)


class Postgres:
    """Speaks on a socket in its own folder; keeps nothing that outlives the machine's power."""

    def __init__(self, bin_dir: Path) -> None:
        self._bin = bin_dir
        # Not pytest's folder: root's, and the server refuses to run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="plaudit-postgres-"))
        self._url = f"postgresql+psycopg://postgres@/postgres?host={self.folder}"
        self._numbers = itertools.count()
        try:
            if os.getuid() == 0:
                shutil.chown(self.folder, "postgres", "postgres")
            self._run("initdb", "-D", str(self.folder / "data"), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
            options = f"-c fsync=off -c listen_addresses='' -c unix_socket_directories='{self.folder}'"
            self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-o", options, "-l", str(self.folder / "log"), "start")
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def new(self) -> str:
        """The URL of an empty schema, which is all that one test sees."""
        name = f"test_{next(self._numbers)}"
        engine = create_engine(self._url)
        with engine.begin() as db:
            db.exec_driver_sql(f"CREATE SCHEMA {name}")
        engine.dispose()
        return f"{self._url}&options=-csearch_path%3D{name}"

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), *arguments]
        command = ["runuser", "-u", "postgres", "--", *command] if os.getuid() == 0 else command
        # The server inherits the output, so a pipe would never end.
        with (self.folder / "said").open("ab") as said:
            done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=120, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{program} ended with {done.returncode}: {(self.folder / 'said').read_text()[-2000:]}")
