"""TLS with certificates on both sides and a SASL login, against a real broker: what is set reaches it, and what is wrong is refused."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from feedback_world import rating
from kafka_world import MARKS
from pydantic import SecretStr

from deploy.broker import Broker
from deploy.process import free_port
from feedback.clock import HybridClock
from feedback.config import KafkaSettings
from feedback.errors import NotDurable
from feedback.kafka_log import KafkaLog

pytestmark = [*MARKS, pytest.mark.slow]
Key = ec.EllipticCurvePrivateKey
JAAS = 'org.apache.kafka.common.security.plain.PlainLoginModule required user_ann="open sesame";'


def certificate(name: str, key: Key, by: x509.Certificate | None, signer: Key) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(by.subject if by else subject).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
    made = made.not_valid_after(now + datetime.timedelta(days=1)).add_extension(x509.BasicConstraints(by is None, None), critical=True)
    return made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False).sign(signer, hashes.SHA256())


def pem(key: Key, password: bytes | None = None) -> bytes:
    sealed = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed)


@pytest.fixture(scope="module")
def guarded(kafka: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The settings that a second broker asks for; it knows itself as `localhost` only. The first says whether there can be one here."""
    folder = tmp_path_factory.mktemp("tls")
    authority, server, client = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    ca = certificate("ca", authority, None, authority)
    public = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(public))
    (folder / "server.pem").write_bytes(pem(server) + certificate("localhost", server, ca, authority).public_bytes(public))
    (folder / "client.pem").write_bytes(certificate("client", client, ca, authority).public_bytes(public))
    (folder / "client.key").write_bytes(pem(client, b"of the key"))
    stranger = ec.generate_private_key(ec.SECP256R1())
    (folder / "other.pem").write_bytes(certificate("other", stranger, None, stranger).public_bytes(public))
    plain, controller, port = free_port(), free_port(), free_port()
    node = Broker(
        folder / "kafka",
        plain,
        {
            "listeners": f"PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{plain},SASL_SSL://localhost:{port}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(folder / "server.pem"),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(folder / "ca.pem"),
            "listener.name.sasl_ssl.ssl.client.auth": "required",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl_ssl.plain.sasl.jaas.config": JAAS,
        },
    )
    node.start()
    yield {
        "bootstrap": f"localhost:{port}",
        "topic": "guarded",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "PLAIN",
        "sasl_username": "ann",
        "sasl_password": SecretStr("open sesame"),
        "ssl_cafile": folder / "ca.pem",
        "ssl_certfile": folder / "client.pem",
        "ssl_keyfile": folder / "client.key",
        "ssl_key_password": SecretStr("of the key"),
    }
    node.stop()


def through(settings: dict[str, Any]) -> int:
    """How many events come back of one that is sent, and of those that were there."""
    log = KafkaLog(KafkaSettings(**settings), HybridClock())
    try:
        asyncio.run(log.append([rating("i", "r", "up")]))
        return len(log.read({}, 100))
    finally:
        log.close()


def test_what_is_set_opens_the_door(guarded: dict[str, Any]) -> None:
    before = through(guarded)
    port = guarded["bootstrap"].rpartition(":")[2]
    unnamed = guarded | {"bootstrap": f"127.0.0.1:{port}", "ssl_check_hostname": False}
    assert through(unnamed) == before + 1


@pytest.mark.parametrize("wrong", ["password", "authority", "certificate", "name", "plaintext"])
def test_what_is_wrong_is_refused_without_showing_it(wrong: str, guarded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback.kafka_topic.CONNECT_S", 1.5)
    folder, port = guarded["ssl_cafile"].parent, guarded["bootstrap"].rpartition(":")[2]
    changes: dict[str, dict[str, Any]] = {
        "password": {"sasl_password": SecretStr("hunter2")},
        "authority": {"ssl_cafile": folder / "other.pem"},
        "certificate": {"ssl_certfile": None, "ssl_keyfile": None, "ssl_key_password": None},
        "name": {"bootstrap": f"127.0.0.1:{port}"},
        "plaintext": {"security_protocol": "PLAINTEXT", "sasl_mechanism": None, "sasl_username": None, "sasl_password": None},
    }
    with pytest.raises(NotDurable) as caught:
        through(guarded | changes[wrong])
    told = caught.value.message
    assert "hunter2" not in told and "open sesame" not in told
    assert "security_protocol" in told and "sasl_" in told and "ssl_" in told
