"""How far each webhook has been told of alias moves, and the event of each move, whose id it is told under."""

from alembic import op
from sqlalchemy import BigInteger, Column, Integer, String

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("alias_history", Column("event_id", String(36), nullable=True))
    op.create_table(
        "webhooks",
        Column("endpoint", String(64), primary_key=True),
        Column("told", BigInteger, nullable=False),
        Column("tries", Integer, nullable=False),
        Column("next_ms", BigInteger, nullable=False),
    )
