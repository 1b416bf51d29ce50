"""Keys, media and conversations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("rate_limit", sa.Text),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("revoked_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("secret_sha256", name="uq_keys_secret_sha256"),
    )
    op.create_table(
        "blobs",
        sa.Column("id", sa.String(81), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_blobs"),
    )
    op.create_table(
        "media",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("blob_id", sa.String(81), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("uploaded", sa.Boolean, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME),
        sa.Column("report", sa.JSON),
        sa.PrimaryKeyConstraint("id", name="pk_media"),
        sa.ForeignKeyConstraint(["blob_id"], ["blobs.id"], name="fk_media_blobs"),
    )
    op.create_index("ix_media_blob_id", "media", ["blob_id"])
    op.create_index("ix_media_expires_at", "media", ["expires_at"])
    op.create_index("ix_media_tenant_created_at_id", "media", ["tenant", "created_at", "id"])
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("title_folded", sa.Text, nullable=False),
        sa.Column("system", sa.Text),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
    )
    op.create_index(
        "ix_conversations_tenant_updated_at_id",
        "conversations",
        ["tenant", "updated_at", "id"],
    )
    op.create_table(
        "turns",
        sa.Column("conversation_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("parts", sa.JSON, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("text_folded", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("usage", sa.JSON),
        sa.Column("reports", sa.JSON, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("conversation_id", "number", name="pk_turns"),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name="fk_turns_conversations",
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "turn_media",
        sa.Column("conversation_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("media_id", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("conversation_id", "number", "media_id", name="pk_turn_media"),
        sa.ForeignKeyConstraint(
            ["conversation_id", "number"],
            ["turns.conversation_id", "turns.number"],
            name="fk_turn_media_turns",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["media_id"], ["media.id"], name="fk_turn_media_media"),
    )
    op.create_index("ix_turn_media_media_id", "turn_media", ["media_id"])
