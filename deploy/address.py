"""Which addresses a secret may be sent to, and where the gateway of a data folder answers."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

MAX_CHARS = 2000
FILE = "gateway.url"


def problem(url: str, *, plain: bool = False) -> str | None:
    """Why nothing may be sent there; None where it may: https, or http on this machine, with `plain` http anywhere."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        return f"is no URL: {exc}"
    if (
        parts.scheme not in ("http", "https")
        or not host
        or len(url) > MAX_CHARS
        or not url.isascii()
        or not url.isprintable()
        or " " in url
    ):
        return f"is no http or https URL of at most {MAX_CHARS} characters"
    if parts.username is not None or parts.password is not None or parts.fragment:
        return "has a login or a fragment in it; leave that out"
    if parts.scheme == "http" and not plain and not _loopback(host):
        return f"is plain http to {host}, where others could read it; use https"
    return None


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def announcing(data_dir: Path, host: str, port: int) -> Iterator[None]:
    """While it lasts, `announced` finds the gateway that listens here. The kernel ends it when this process dies."""
    if (address := ipaddress.ip_address(host)).is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    descriptor = os.open(data_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # a look holds it for a moment only
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, url.encode(), 0)
        yield
    finally:
        os.close(descriptor)


def announced(data_dir: Path) -> str | None:
    """Where the gateway that runs on this data folder answers; None where none runs. Whatever took over the port of one that is gone never
    gets a key, nor does an address that somebody else has put there."""
    try:
        with os.fdopen(os.open(data_dir / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
            told, folder = os.fstat(file.fileno()), data_dir.stat()
            if told.st_uid not in (os.geteuid(), folder.st_uid) or (told.st_mode | folder.st_mode) & stat.S_IWOTH:
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read() or None
    except OSError:
        pass
    return None
