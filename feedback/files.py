"""Files that are still there, and whole, after a power cut: fsynced, and their folders too. Everything here raises OSError."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that was not there and that only its owner reads; fsynced at the end, where nothing failed before."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """fsync a file, or a folder: what was made or renamed in it stays so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(top: Path) -> None:
    """fsync a folder and all below it."""
    for folder in (top, *(path for path in top.rglob("*") if path.is_dir())):
        sync(folder)
