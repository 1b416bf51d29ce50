"""The number of a turn that was deleted is not given to another."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    last = sa.Column("last_number", sa.Integer, nullable=False, server_default="0")
    op.add_column("conversations", last)
