"""The topic: how its brokers are reached, whether its settings keep what is sent there, and which topic it is.

A topic that drops events by its own settings is refused before anything is sent. A missing one is made, once; one that is deleted under a
running process stays away until somebody makes it again, because its deletion was somebody's decision.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from feedback.config import KafkaSettings
from feedback.errors import ConfigError, NotDurable, PlauditError

RETRY_AFTER_S = 5
CONNECT_S = 5.0
MIN_RETENTION_MS = 30 * 24 * 3600 * 1000
MIN_MESSAGE_BYTES = 1_048_576


@dataclass(frozen=True)
class TopicFacts:
    """What was found when the topic was checked."""

    key: str
    """Names this very topic: one that is deleted and made again under the same name has another key."""
    partitions: int
    max_message_bytes: int


def library() -> Any:
    """`kafka-python` (extra `kafka`). Raises ConfigError where it is not installed."""
    try:
        import kafka
    except ImportError as exc:
        raise ConfigError("kafka.bootstrap is set, but kafka-python is not installed: install plaudit[kafka]", field="kafka") from exc
    # It warns at every attempt to connect, while an outage is told once, by whoever meets it.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    return kafka


def connected(make: Callable[..., Any], settings: KafkaSettings, begun: list[Any] | None = None, **options: Any) -> Any:
    """A client of the library. Where it cannot connect, nothing of it stays behind: its constructor leaves a thread and four sockets.

    Closing what is in `begun` from another thread ends the wait for an answer."""
    from kafka.net.compat import KafkaNetClient

    begun = [] if begun is None else begun

    def client(**given: Any) -> Any:
        begun.append(KafkaNetClient(**given))
        return begun[-1]

    try:
        return make(kafka_client=client, **connection(settings), **options)
    except library().errors.KafkaError:
        for each in begun:
            each.close()
        raise


def connection(settings: KafkaSettings) -> dict[str, Any]:
    """What every client of the library is given: brokers, TLS and SASL."""
    password = settings.sasl_password.get_secret_value() if settings.sasl_password else None
    key_password = settings.ssl_key_password.get_secret_value() if settings.ssl_key_password else None
    files = {"ssl_cafile": settings.ssl_cafile, "ssl_certfile": settings.ssl_certfile, "ssl_keyfile": settings.ssl_keyfile}
    options = {
        "bootstrap_servers": [each.strip() for each in (settings.bootstrap or "").split(",")],
        "security_protocol": settings.security_protocol,
        "sasl_mechanism": settings.sasl_mechanism,
        "sasl_plain_username": settings.sasl_username,
        "sasl_plain_password": password,
        "ssl_check_hostname": settings.ssl_check_hostname,
        "ssl_password": key_password,
        "bootstrap_timeout_ms": int(CONNECT_S * 1000),
        **{name: str(path) for name, path in files.items() if path is not None},
    }
    return {name: value for name, value in options.items() if value is not None}


def away(settings: KafkaSettings, exc: Exception) -> PlauditError:
    """What a failure of the library means to the caller."""
    errors = library().errors
    if isinstance(exc, (errors.AuthorizationError, errors.SaslAuthenticationFailedError, errors.UnsupportedSaslMechanismError)):
        told = f"Kafka at {settings.bootstrap} refuses this client ({exc}); check the sasl_ and ssl_ settings of [kafka] and its ACLs"
        return NotDurable(told, field="kafka.security_protocol", retry_after_s=RETRY_AFTER_S)
    # The library says of a refused certificate or login only that it could not connect.
    told = (
        f"Kafka at {settings.bootstrap} does not answer over {settings.security_protocol} ({exc}); events wait on this machine until it "
        "does; where it runs, check security_protocol and the sasl_ and ssl_ settings of [kafka]"
    )
    return NotDurable(told, field="kafka.bootstrap", retry_after_s=RETRY_AFTER_S)


class Topic:
    """The topic of the settings. Thread-safe; connects at first use."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._kafka = library()
        self._settings = settings
        self._admin: Any = None
        self._seen = ""
        self._begun: list[Any] = []
        self._closed = False
        self._lock = threading.Lock()

    def check(self) -> TopicFacts:
        """Make the topic if it is missing, and read its settings. Raises ConfigError naming each setting that would lose events, NotDurable
        where no broker answers or the topic was deleted since this process first saw it."""
        with self._lock, self._translated():
            return self._check()

    def key(self) -> str:
        """Which topic bears the name now; one that this process has not seen yet is checked. Raises as `check` does."""
        with self._lock, self._translated():
            found = self._described()
            return self._seen if found is not None and _key(found) == self._seen else self._check().key

    def leave(self, group: str, instance: str) -> None:
        """Take a member with a name of its own out of the group at once; the broker would otherwise wait for its return."""
        with self._lock, self._translated():
            member = self._kafka.admin.MemberToRemove(group_instance_id=instance)
            self._admin_client().remove_group_members(group, [member])

    def close(self) -> None:
        """Whoever waits for an answer meanwhile gets NotDurable at once, and so does who asks later."""
        self._closed = True
        for each in list(self._begun):
            each.close()
        with self._lock:
            self._drop()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Failures of the library leave as ours, and the connection that failed is given up."""
        try:
            yield
        except self._kafka.errors.KafkaError as exc:
            self._drop()
            raise away(self._settings, exc) from exc

    def _check(self) -> TopicFacts:
        name = self._settings.topic
        found = self._described()
        if found is None and not self._seen:
            self._create()
            found = self._described()
        if found is None:
            raise self._gone()
        replicas = min((len(each["replica_nodes"]) for each in found["partitions"]), default=1)
        values = self._values()
        problems = wrong(values, replicas)
        if problems:
            raise ConfigError(
                f"topic '{name}' would lose events: {'; '.join(problems)}; alter it with kafka-configs.sh --alter --topic {name} "
                "--add-config NAME=VALUE, or choose another kafka.topic",
                field="kafka.topic",
            )
        self._seen = _key(found)
        return TopicFacts(self._seen, len(found["partitions"]), int(values["max.message.bytes"]))

    def _drop(self) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None

    def _admin_client(self) -> Any:
        if self._closed:
            raise self._kafka.errors.KafkaConnectionError("this process ends")
        if self._admin is None:
            self._begun.clear()
            self._admin = connected(self._kafka.KafkaAdminClient, self._settings, self._begun, request_timeout_ms=5000)
        return self._admin

    def _described(self) -> Any:
        found = self._admin_client().describe_topics([self._settings.topic])[0]
        error = self._kafka.errors.for_code(found["error_code"])
        if error is self._kafka.errors.UnknownTopicOrPartitionError:
            return None
        if error is not self._kafka.errors.NoError:
            raise error(self._settings.topic)
        return found

    def _create(self) -> None:
        settings = self._settings
        wanted = {
            "cleanup.policy": "delete",
            "retention.ms": str(settings.retention_days * 24 * 3600 * 1000),
            "retention.bytes": "-1",
            "max.message.bytes": str(2 * MIN_MESSAGE_BYTES),
            "min.insync.replicas": str(max(1, settings.replication - 1)),
        }
        topic = {"num_partitions": settings.partitions, "replication_factor": settings.replication, "configs": wanted}
        errors = self._kafka.errors
        try:
            self._admin_client().create_topics({settings.topic: topic}, wait_for_metadata=True)
        except errors.TopicAlreadyExistsError:
            self._admin_client().wait_for_topics([settings.topic])  # another process was faster
        except (
            errors.InvalidReplicationFactorError,
            errors.InvalidTopicError,
            errors.InvalidPartitionsError,
            errors.PolicyViolationError,
        ) as exc:
            raise ConfigError(
                f"topic '{settings.topic}' cannot be made with kafka.partitions = {settings.partitions} and "
                f"kafka.replication = {settings.replication} ({exc.message}); change them to what the brokers allow",
                field="kafka.replication",
            ) from exc

    def _values(self) -> dict[str, str]:
        from kafka.admin import ConfigResource, ConfigResourceType

        name = self._settings.topic
        found = self._admin_client().describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)], config_filter="all")
        return {key: str(each["value"]) for key, each in found["topic"][name].items()}

    def _gone(self) -> NotDurable:
        return NotDurable(
            f"topic '{self._settings.topic}' was deleted; events wait on this machine and everything is sent again once it is back: "
            "make it again, or start this process again, which makes it",
            field="kafka.topic",
            retry_after_s=RETRY_AFTER_S,
        )


def wrong(values: Mapping[str, str], replicas: int) -> list[str]:
    """Which of a topic's settings would lose events: name, value and limit of each."""
    problems = []
    if values["cleanup.policy"] != "delete":
        problems.append(f"cleanup.policy is {values['cleanup.policy']}, it must be delete")
    if (retention := int(values["retention.ms"])) != -1 and retention < MIN_RETENTION_MS:
        problems.append(f"retention.ms is {retention}, it must be at least {MIN_RETENTION_MS} (30 days) or -1")
    if values["retention.bytes"] != "-1":
        problems.append(f"retention.bytes is {values['retention.bytes']}, it must be -1, or a busy day shortens the 30 days")
    if (size := int(values["max.message.bytes"])) < MIN_MESSAGE_BYTES:
        problems.append(f"max.message.bytes is {size}, it must be at least {MIN_MESSAGE_BYTES}")
    insync = int(values["min.insync.replicas"])
    if insync > replicas:
        problems.append(
            f"min.insync.replicas is {insync} with {replicas} replicas, so nothing could ever be confirmed; it must be at most {replicas}"
        )
    if replicas >= 3 and insync < 2:
        problems.append(f"min.insync.replicas is {insync} with {replicas} replicas, so one broker alone may confirm; it must be at least 2")
    if values.get("unclean.leader.election.enable", "false") != "false":
        problems.append("unclean.leader.election.enable is true, it must be false")
    return problems


def _key(found: Any) -> str:
    return f"{found['name']}/{found['topic_id']}"
