"""The tables as they were when revisions began. A database from before has some or all of them, which stay as they are."""

from alembic import op
from sqlalchemy import JSON, BigInteger, Boolean, Column, Float, Integer, LargeBinary, MetaData, String, Table

revision = "0001"
down_revision = None

metadata = MetaData()
Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(60), nullable=False),
    Column("subject", String(80), nullable=False),
    Column("reason", String, nullable=False),
    Column("digest", String(64), nullable=False),
)
Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("rows", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
)
Table(
    "erasures",
    metadata,
    Column("subject", String(64), primary_key=True),
    Column("stamp", BigInteger, nullable=False),
)
Table(
    "subject_keys",
    metadata,
    Column("subject", String(64), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("wrapped", LargeBinary, nullable=True),
    Column("created_ms", BigInteger, nullable=False),
    Column("erased_ms", BigInteger, nullable=True),
)
Table(
    "erased_from",
    metadata,
    Column("subject", String(64), primary_key=True),
    Column("snapshot", String(64), primary_key=True),
    Column("rows", Integer, nullable=False),
)
Table(
    "api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("owner", String(200), nullable=False),
    Column("person", Boolean, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("origins", JSON, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=True),
    Column("disabled", Boolean, nullable=False),
)
Table(
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
)
Table(
    "alias_history",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(20), nullable=False),
    Column("before", String(64), nullable=True),
    Column("after", String(64), nullable=True),
    Column("actor", String(200), nullable=False),
    Column("reason", String, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)
Table(
    "aliases",
    metadata,
    Column("name", String(20), primary_key=True),
    Column("adapter", String(64), nullable=True),
)
Table(
    "attestations",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("adapter", String(64), nullable=False, index=True),
    Column("kind", String(40), nullable=False),
    Column("body", JSON, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)
Table(
    "holdings",
    metadata,
    Column("replica", String(200), primary_key=True),
    Column("names", JSON, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)
Table(
    "leases",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("holder", String(80), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
)
Table(
    "outbox",
    metadata,
    Column("event_id", String(36), primary_key=True),
    Column("value", String, nullable=False),
    Column("sent", Boolean, nullable=False),
)
Table(
    "registry_facts",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
Table(
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
)


def upgrade() -> None:
    metadata.create_all(op.get_bind())
