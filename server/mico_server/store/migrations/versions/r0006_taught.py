"""The names that people taught."""

from alembic import op

from mico_server.store.tables import taught

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    taught.create(op.get_bind())
