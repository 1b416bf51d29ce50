"""Keys, media and conversations: the tables of the first version, which only older databases have.

A new database begins with the tables of :mod:`mico_server.store.tables`.
"""

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass
