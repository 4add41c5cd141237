"""Since when a rollout is where it is, and since when it cannot be judged. One that ran before counts from its canary's beginning."""

from alembic import op
from sqlalchemy import BigInteger, Column

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("rollouts", Column("since_ms", BigInteger, nullable=True))
    op.add_column("rollouts", Column("error_ms", BigInteger, nullable=True))
