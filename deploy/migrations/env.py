"""What Alembic runs: the revisions in `versions/`, on the connection and in the transaction that `deploy/schema.py` hands over."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
