"""Turns have versions: a turn names the one before it, and a conversation the one shown last."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("conversations", sa.Column("head", sa.Integer))
    counter = sa.Column("revision", sa.Integer, nullable=False, server_default="0")
    op.add_column("conversations", counter)
    parent = sa.Column("parent", sa.Integer, nullable=False, server_default="0")
    op.add_column("turns", parent)
    op.execute("UPDATE turns SET parent = number - 1")
