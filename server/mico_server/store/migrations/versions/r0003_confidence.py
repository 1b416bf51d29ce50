"""The confidence of answers about media, and which of them are marked unsure."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nothing is known about older answers.
    op.add_column("turns", sa.Column("confidence", sa.Double))
    op.add_column("turns", sa.Column("unsure", sa.Boolean))
