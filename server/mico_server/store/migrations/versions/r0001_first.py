"""Keys, media and conversations."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.String(64)
_TIME = sa.DateTime(timezone=True)


def _column(name: str, type_: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, type_, nullable=False, **options)


def upgrade() -> None:
    op.create_table(
        "keys",
        _column("id", _ID),
        _column("name", sa.Text),
        _column("tenant", sa.Text),
        _column("secret_sha256", _ID),
        sa.Column("rate_limit", sa.Text),
        _column("created_at", _TIME),
        sa.Column("revoked_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("secret_sha256", name="uq_keys_secret_sha256"),
    )
    op.create_table(
        "blobs",
        _column("id", sa.String(81)),
        _column("bytes", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_blobs"),
    )
    op.create_table(
        "media",
        _column("id", _ID),
        _column("tenant", sa.Text),
        _column("blob_id", sa.String(81)),
        _column("kind", sa.String(16)),
        _column("name", sa.Text),
        _column("uploaded", sa.Boolean),
        _column("created_at", _TIME),
        sa.Column("expires_at", _TIME),
        sa.Column("report", sa.JSON),
        sa.PrimaryKeyConstraint("id", name="pk_media"),
        sa.ForeignKeyConstraint(["blob_id"], ["blobs.id"], name="fk_media_blobs"),
    )
    op.create_table(
        "conversations",
        _column("id", _ID),
        _column("tenant", sa.Text),
        _column("title", sa.Text),
        _column("title_folded", sa.Text),
        sa.Column("system", sa.Text),
        _column("model", sa.Text),
        _column("created_at", _TIME),
        _column("updated_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
    )
    op.create_table(
        "turns",
        _column("conversation_id", _ID),
        _column("number", sa.Integer, autoincrement=False),
        _column("parts", sa.JSON),
        _column("answer", sa.Text),
        _column("text_folded", sa.Text),
        _column("finish_reason", sa.String(16)),
        sa.Column("usage", sa.JSON),
        _column("reports", sa.JSON),
        _column("created_at", _TIME),
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
        _column("conversation_id", _ID),
        _column("number", sa.Integer, autoincrement=False),
        _column("media_id", _ID),
        sa.PrimaryKeyConstraint("conversation_id", "number", "media_id", name="pk_turn_media"),
        sa.ForeignKeyConstraint(
            ["conversation_id", "number"],
            ["turns.conversation_id", "turns.number"],
            name="fk_turn_media_turns",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["media_id"], ["media.id"], name="fk_turn_media_media"),
    )
    for table, columns in (
        ("media", ["blob_id"]),
        ("media", ["expires_at"]),
        ("media", ["tenant", "created_at", "id"]),
        ("conversations", ["tenant", "updated_at", "id"]),
        ("turn_media", ["media_id"]),
    ):
        op.create_index("_".join(["ix", table, *columns]), table, columns)
