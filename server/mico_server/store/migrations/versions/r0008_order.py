"""Pins, the archive, and the index of what turns say."""

import sqlalchemy as sa
from alembic import op

from mico_server.store.search import create_index

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("pinned", "archived"):
        column = sa.Column(name, sa.Boolean, nullable=False, server_default=sa.false())
        op.add_column("conversations", column)
    op.drop_index("ix_conversations_tenant_updated_at_id", "conversations")
    order = ["tenant", "pinned", "updated_at", "id"]
    op.create_index("ix_conversations_tenant_pinned_updated_at_id", "conversations", order)
    create_index(op.get_bind())
