"""With a public key set, only what its private key signed is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.sealed import MAX_RANK, honest, make_policy
from deploy import signing
from deploy.loading import Intake
from deploy.signing import Signatures, missing, sign, signature_of
from feedback.errors import ConfigError, InvalidInput

signed = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """(private, public), as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private.write_bytes(key.private_bytes(*plain))
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@signed
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_what_the_key_signed_is_taken(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    ours, public = key_pair(tmp_path, "ours")
    theirs, _ = key_pair(tmp_path, "theirs")
    intake = Intake.of(policy, tmp_path / "private", MAX_RANK, Signatures(public))
    source = honest(policy, tmp_path / "store").seal()
    other = honest(policy, tmp_path / "store", seed=1).seal()

    def refused(reason: str) -> None:
        with pytest.raises(InvalidInput, match=reason):
            intake.take(source)
        assert list(intake.root.iterdir()) == []

    refused("has no signature")
    sign(source, theirs)
    refused("does not hold")
    sign(other, ours).rename(signature_of(source))
    refused("does not hold")
    signature_of(source).write_bytes(b"{}")
    refused("does not hold")
    signature_of(source).write_bytes(b" " * (1 << 21))
    refused("more than 1048576 bytes")
    sign(source, ours)
    folder = intake.take(source)
    assert intake.take(source) == folder, "the signature was kept beside the copy"
    intake.drop(folder)
    assert list(intake.root.iterdir()) == []
    with pytest.raises(InvalidInput, match="could not be signed"):
        sign(source, public)


def test_a_key_without_the_packages_or_the_file_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(ConfigError, match=r"adapter_public_key is set, but no_such_package cannot be imported; pip install") as caught:
        Signatures(tmp_path / "key.pub")
    assert caught.value.field == "engine.adapter_public_key"
    monkeypatch.setattr(signing, "PACKAGES", ())
    with pytest.raises(ConfigError, match="which is no file"):
        Signatures(tmp_path / "key.pub")
