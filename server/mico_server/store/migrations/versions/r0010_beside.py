"""A turn names its model, the turn beside which it was answered, and which of both is preferred."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name, kind in (("model", sa.Text), ("beside", sa.Integer), ("preferred", sa.Integer)):
        op.add_column("turns", sa.Column(name, kind))
