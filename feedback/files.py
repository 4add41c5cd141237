"""Files that are still there, and whole, after a power cut: fsynced, and their folders too. These raise OSError. And a lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from feedback.errors import NotDurable


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that was not there and that only its owner reads; fsynced at the end, where nothing failed before."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """A reader, and whoever comes after a power cut, finds the old content or all of the new. One writer at a time."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


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


@contextlib.contextmanager
def locked_folder(folder: Path, next_step: str = "") -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that dies. Raises NotDurable where the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as exc:
        raise NotDurable(f"the folder {folder} cannot be used: {exc.strerror}{next_step}", retry_after_s=2) from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
