"""Scopes of keys, and the counters of rate limits that replicas share."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # An older key keeps the rights that it had.
    scopes = sa.Column("scopes", sa.Text, nullable=False, server_default="chat metrics")
    op.add_column("keys", scopes)
    shared = op.get_bind().dialect.name == "postgresql"
    op.create_table(
        "rate_limit_hits",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("hits", sa.ARRAY(sa.Double) if shared else sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rate_limit_hits"),
        # Written at every request, and worth nothing after a crash.
        prefixes=["UNLOGGED"] if shared else [],
    )
