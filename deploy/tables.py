"""The registry's tables. Portable between SQLite and PostgreSQL. A change here comes with a revision in `migrations/versions/`."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Boolean, Column, Float, Integer, MetaData, String, Table

metadata = MetaData()

adapters = Table(
    "adapters",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("path", String, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("temperature", Float, nullable=False),
    Column("state", String(16), nullable=False),
    Column("registered_by", String(200), nullable=False),
    Column("registered_ms", BigInteger, nullable=False),
    Column("reason", String, nullable=False),
    Column("manifest_json", JSON, nullable=True),
)
attestations = Table(
    "attestations",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("adapter", String(64), nullable=False, index=True),
    Column("kind", String(40), nullable=False),
    Column("body", JSON, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)
aliases = Table("aliases", metadata, Column("name", String(20), primary_key=True), Column("adapter", String(64), nullable=True))
alias_history = Table(
    "alias_history",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(20), nullable=False),
    Column("before", String(64), nullable=True),
    Column("after", String(64), nullable=True),
    Column("actor", String(200), nullable=False),
    Column("reason", String, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("event_id", String(36), nullable=True),
)
rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("adapter", String(64), nullable=False),
    Column("stable", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("state", String(20), nullable=False),
    Column("weight", Float, nullable=False),
    Column("salt", String(32), nullable=False),
    Column("started_ms", BigInteger, nullable=False),
    Column("canary_ms", BigInteger, nullable=True),
    Column("reason", String, nullable=False),
    Column("verdicts", JSON, nullable=False),
    Column("approved_by", String(200), nullable=True),
    Column("since_ms", BigInteger, nullable=True),
    Column("error_ms", BigInteger, nullable=True),
)
leases = Table(
    "leases",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("holder", String(80), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
)
holdings = Table(
    "holdings",
    metadata,
    Column("replica", String(200), primary_key=True),
    Column("names", JSON, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)
outbox = Table(
    "outbox",
    metadata,
    Column("event_id", String(36), primary_key=True),
    Column("value", String, nullable=False),
    Column("sent", Boolean, nullable=False, default=False),
)
webhooks = Table(
    "webhooks",
    metadata,
    Column("endpoint", String(64), primary_key=True),
    Column("told", BigInteger, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("next_ms", BigInteger, nullable=False),
)
facts = Table("registry_facts", metadata, Column("name", String(40), primary_key=True), Column("value", BigInteger, nullable=False))
