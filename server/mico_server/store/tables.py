"""The tables of everything that outlives the process; ids and texts that can be in them.

The migrations make them; a test asserts that both agree.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    TypeDecorator,
    and_,
    or_,
)

from mico_chat import messages
from mico_chat.errors import RequestError


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time; SQLite has no time zones, so its times are UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a time zone: {value}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """``media-`` and 24 random hexadecimal digits, for the prefix ``media``."""
    return f"{prefix}-{secrets.token_hex(12)}"


def is_id(prefix: str, text: str) -> bool:
    """Whether a client's text can be such an id; other texts are not looked up."""
    return re.fullmatch(f"{prefix}-[0-9a-f]{{24}}", text) is not None


def behind(table: Table, column: str, row: Row[Any]) -> ColumnElement[bool]:
    """The rows after ``row``, if the newest by ``column`` is first and ties are ordered by id."""
    same, id_ = table.c[column] == row._mapping[column], row._mapping["id"]
    return or_(table.c[column] < row._mapping[column], and_(same, table.c.id < id_))


# PostgreSQL has no NUL in its texts, and no encoding has half of a surrogate pair.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def check_text(text: str, where: str) -> None:
    """Refuse a text that a database or JSON cannot carry."""
    messages.check_text(text, where)
    if (position := text.find("\0")) >= 0:
        raise RequestError.at(
            where, f"a NUL character at position {position}; send text without it"
        )


def cleaned(text: str) -> str:
    """The model's text with U+FFFD in place of each character that cannot be stored."""
    return _UNSTORABLE.sub("\ufffd", text)


def folded(text: str) -> str:
    """The text as searches compare it: no case, and one form of each accented letter.

    Databases disagree on the case of all but ASCII letters, so Python does it.
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


_ID = String(64)
_HASH = String(64)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

keys = Table(
    "keys",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("name", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("secret_sha256", _HASH, nullable=False, unique=True),
    Column("rate_limit", Text),
    # Scopes with spaces between them. The default is for keys that are older than scopes.
    Column("scopes", Text, nullable=False, server_default="chat metrics"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
)

# Times of a key's requests in seconds since 1970, the oldest first: one row for each key and limit.
# Replicas on PostgreSQL use it. PostgreSQL does not log the table: a crash empties it.
rate_limit_hits = Table(
    "rate_limit_hits",
    metadata,
    Column("id", Text, primary_key=True),
    Column("hits", JSON().with_variant(ARRAY(Double), "postgresql"), nullable=False),
)

# A file of the media folder. Its row is locked while the file is put there or removed.
blobs = Table(
    "blobs",
    metadata,
    Column("id", String(81), primary_key=True),  # 16 digits of the tenant's hash, /, SHA-256
    Column("bytes", BigInteger, nullable=False),
)

media = Table(
    "media",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("blob_id", ForeignKey("blobs.id"), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("name", Text, nullable=False),
    # True: uploaded on its own, and kept until it expires. False: it came and goes with a turn.
    Column("uploaded", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, index=True),
    Column("report", JSON(none_as_null=True)),
    Index(None, "tenant", "created_at", "id"),
)

conversations = Table(
    "conversations",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("title", Text, nullable=False),
    Column("title_folded", Text, nullable=False),
    Column("system", Text),
    Column("model", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Index(None, "tenant", "updated_at", "id"),
)

# A user's message and its answer.
turns = Table(
    "turns",
    metadata,
    Column("conversation_id", ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # from 1
    Column("parts", JSON, nullable=False),
    Column("answer", Text, nullable=False),
    Column("text_folded", Text, nullable=False),  # question and answer, for searches
    Column("finish_reason", String(16), nullable=False),
    Column("usage", JSON(none_as_null=True)),
    Column("reports", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

# Which turn shows which medium: a medium that is shown cannot be deleted.
turn_media = Table(
    "turn_media",
    metadata,
    Column("conversation_id", _ID, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("media_id", ForeignKey("media.id"), primary_key=True, index=True),
    ForeignKeyConstraint(
        ["conversation_id", "number"],
        ["turns.conversation_id", "turns.number"],
        ondelete="CASCADE",
    ),
)
