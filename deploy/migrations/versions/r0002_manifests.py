"""An adapter's manifest beside its row, so that a machine without its folder knows what it is. Older ones are read from theirs."""

from alembic import op
from sqlalchemy import JSON, Column

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("adapters", Column("manifest_json", JSON, nullable=True))
