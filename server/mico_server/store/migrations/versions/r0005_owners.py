"""The owners of media and files, and the bytes of media: what a key stores is summed over them."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"
    owner = "substr(tenant, 1, instr(tenant || '/', '/') - 1)"
    owner = owner if sqlite else "split_part(tenant, '/', 1)"
    for table in ("media", "files"):
        op.add_column(table, sa.Column("owner", sa.Text))
        op.execute(f"UPDATE {table} SET owner = {owner}")
    op.add_column("media", sa.Column("blob_bytes", sa.BigInteger))
    of_blob = "(SELECT bytes FROM blobs WHERE blobs.id = media.blob_id)"
    op.execute(f"UPDATE media SET blob_bytes = {of_blob}")
    op.create_index(
        "ix_media_owner_blob_id_blob_bytes", "media", ["owner", "blob_id", "blob_bytes"]
    )
    op.create_index("ix_files_owner_bytes", "files", ["owner", "bytes"])
