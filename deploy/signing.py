"""Who made an adapter, if that is asked: OpenSSF model signing with an elliptic-curve key, in a bundle beside the adapter's folder.

The id already says that nothing was changed; a signature says that somebody with the private key made it. Off unless
`engine.adapter_public_key` is set. Needs the extra `signing`; nothing here reaches a network.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from deploy.tensors import refuse
from feedback.errors import ConfigError, InvalidInput

SIGNATURE_BYTES = 1 << 20
PACKAGES = ("model_signing", "OpenSSL")


def signature_of(folder: Path) -> Path:
    """Where the signature of an adapter's folder lies: beside it, so that the folder stays what its id says."""
    return folder.with_name(f"{folder.name}.sig")


def missing() -> str | None:
    """What has to be installed before anything can be signed or checked; None where all is there."""
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking)} cannot be imported; pip install 'plaudit[signing]'" if lacking else None


def sign(folder: Path, private_key: Path) -> Path:
    """Sign an adapter with a PEM key (`openssl ecparam -name prime256v1 -genkey`). Returns the signature's path.

    Raises ConfigError and InvalidInput.
    """
    _needed("adapter signing")
    from model_signing import signing

    path = signature_of(folder)
    try:
        signing.Config().use_elliptic_key_signer(private_key=private_key).sign(folder, path)
    except Exception as exc:  # the library names no errors of its own; whoever signs reads this one
        raise InvalidInput(f"{folder.name[:16]} could not be signed with {private_key}: {_words(exc)}", field="adapter") from exc
    return path


class Signatures:
    """Checks signatures by one public key."""

    def __init__(self, public_key: Path) -> None:
        """Raises ConfigError where the key is no file or the extra is not installed."""
        _needed("engine.adapter_public_key is set")
        if not public_key.is_file():
            raise ConfigError(f"engine.adapter_public_key is {str(public_key)!r}, which is no file", field="engine.adapter_public_key")
        self._key = public_key

    def copy(self, source: Path, folder: Path, what: str) -> None:
        """Take the signature of `source` to the private `folder`. Raises InvalidInput where there is none."""
        try:
            descriptor = os.open(signature_of(source), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                raw = file.read(SIGNATURE_BYTES + 1)
        except OSError as exc:
            refuse(f"{what} has no signature ({exc.strerror}: {signature_of(source).name}), engine.adapter_public_key asks for one")
        if len(raw) > SIGNATURE_BYTES:
            refuse(f"{what}: its signature has more than {SIGNATURE_BYTES} bytes, the most that is read")
        signature_of(folder).write_bytes(raw)
        signature_of(folder).chmod(0o444)

    def check(self, folder: Path, what: str) -> None:
        """Raises InvalidInput unless the signature beside the folder is of these files, all of them, and by our key."""
        from model_signing import hashing, verifying

        try:
            # Told how to hash instead of by the signature, which could leave files out.
            config = verifying.Config().use_elliptic_key_verifier(public_key=self._key)
            config.set_hashing_config(hashing.Config().use_file_serialization()).verify(folder, signature_of(folder))
        except Exception as exc:  # the library names no errors of its own; whoever takes the adapter hears it
            raise InvalidInput(f"{what}: its signature does not hold for {self._key}: {_words(exc)}", field="adapter") from exc


def _needed(why: str) -> None:
    if (lacking := missing()) is not None:
        raise ConfigError(f"{why}, but {lacking}", field="engine.adapter_public_key")


def _words(exc: Exception) -> str:
    return f"{type(exc).__name__} {' '.join(str(exc).split())[:160]}".strip()
