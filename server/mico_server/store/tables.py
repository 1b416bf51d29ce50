"""The tables of everything that outlives the process, and the ids and texts in them.

A new database gets them as they are here; the migrations bring an older one to the same state.
"""

import re
import secrets
import unicodedata
from datetime import UTC, datetime
from functools import cache

import sqlalchemy as sa

from mico_chat import fields
from mico_chat.errors import RequestError
from mico_chat.fair import USER_SEPARATOR


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware time; SQLite has no time zones, so its times are UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC)


def now() -> datetime:
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """``media-`` and 24 random hexadecimal digits, for the prefix ``media``."""
    return f"{prefix}-{secrets.token_hex(12)}"


def is_id(prefix: str, text: str) -> bool:
    """Whether a client's text has the form of such an id; no other text is looked up."""
    return re.fullmatch(f"{prefix}-[0-9a-f]{{24}}", text) is not None


def belongs(table: sa.Table, tenant: str) -> sa.ColumnElement[bool]:
    """The rows of a tenant and of its users."""
    # Not by LIKE: SQLite's LIKE does not distinguish A from a.
    start = tenant + USER_SEPARATOR
    users = sa.func.substr(table.c.tenant, 1, len(start)) == start
    return sa.or_(table.c.tenant == tenant, users)


# PostgreSQL has no NUL in its texts, and no encoding has half of a surrogate pair.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def check_text(text: str, where: str) -> None:
    """Refuse a text that a database or JSON cannot carry."""
    fields.check_text(text, where)
    if (position := text.find("\0")) >= 0:
        raise RequestError.at(
            where, f"a NUL character at position {position}; send text without it"
        )


def cleaned(text: str) -> str:
    """The model's text with U+FFFD in place of each character that cannot be stored."""
    return _UNSTORABLE.sub("\ufffd", text)


MOST_MARKS = 30
"""At most these combining marks stand behind each other: Unicode's Stream-Safe Text Format (UAX
#15, section 13)."""


def folded(text: str) -> str:
    """The text without case and with one form of each accented letter, for searches.

    Databases disagree on the case of all but ASCII letters, so Python does it. Python sorts the
    combining marks of a letter in a time that grows with the square of their number, and nothing
    else runs meanwhile: marks beyond :data:`MOST_MARKS` are left out.
    """
    if text.isascii():
        return text.casefold()
    text = _too_many_marks().sub(r"\1", text)
    return " ".join(map(_folded, text.split(" ")))  # other threads may run between two words


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


@cache
def _too_many_marks() -> re.Pattern[str]:
    """Too many characters in a row whose compatibility decomposition begins with a mark."""
    last = 0x1E94A  # the last character with a combining class in Unicode 17
    marks = "".join(
        c
        for c in map(chr, range(0x300, last + 1))
        if unicodedata.combining(unicodedata.normalize("NFKD", c)[0])
    )
    return re.compile(f"([{marks}]{{{MOST_MARKS}}})[{marks}]+")


_ID = sa.String(64)

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("rate_limit", sa.Text),
    # Scopes with spaces between them. The default is for keys that are older than scopes.
    sa.Column("scopes", sa.Text, nullable=False, server_default="chat metrics"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("revoked_at", UtcDateTime),
)

# Times of a key's requests in seconds since 1970, the oldest first: one row for each key and limit.
# Replicas on PostgreSQL use it. PostgreSQL does not log the table: a crash empties it.
rate_limit_hits = sa.Table(
    "rate_limit_hits",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("hits", sa.JSON().with_variant(sa.ARRAY(sa.Double), "postgresql"), nullable=False),
)
_unlog = sa.DDL("ALTER TABLE rate_limit_hits SET UNLOGGED")  # type: ignore[no-untyped-call]
sa.event.listen(rate_limit_hits, "after_create", _unlog.execute_if("postgresql"))

# A file of the media folder. Its row is locked while the file is put there or removed.
blobs = sa.Table(
    "blobs",
    metadata,
    sa.Column("id", sa.String(81), primary_key=True),  # 16 digits of the tenant's hash, /, SHA-256
    sa.Column("bytes", sa.BigInteger, nullable=False),
)

media = sa.Table(
    "media",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("blob_id", sa.ForeignKey("blobs.id"), nullable=False, index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    # True: uploaded on its own, and kept until it expires. False: it came and goes with a turn.
    sa.Column("uploaded", sa.Boolean, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, index=True),
    sa.Column("report", sa.JSON(none_as_null=True)),
    # The tenant without its user, and the bytes of the blob: for sums over the index alone.
    sa.Column("owner", sa.Text),
    sa.Column("blob_bytes", sa.BigInteger),
    sa.Index(None, "tenant", "created_at", "id"),
    sa.Index(None, "owner", "blob_id", "blob_bytes"),
)

conversations = sa.Table(
    "conversations",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("title_folded", sa.Text, nullable=False),
    sa.Column("system", sa.Text),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    # The turn that is shown last; NULL: the one with the highest number.
    sa.Column("head", sa.Integer),
    sa.Column("revision", sa.Integer, nullable=False, server_default="0"),  # counts its changes
    # Pinned ones stand first in the list; archived ones have left it.
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("archived", sa.Boolean, nullable=False, server_default=sa.false()),
    # The highest number of a turn that was there when one was deleted: none is given twice.
    sa.Column("last_number", sa.Integer, nullable=False, server_default="0"),
    sa.Index(None, "tenant", "pinned", "updated_at", "id"),
)

# A user's message and its answer, behind the turn ``parent`` (0: at the beginning). Turns with the
# same parent are versions of each other.
turns = sa.Table(
    "turns",
    metadata,
    sa.Column(
        "conversation_id", sa.ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True
    ),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # from 1
    sa.Column("parts", sa.JSON, nullable=False),
    sa.Column("answer", sa.Text, nullable=False),
    # Question, answer, file names, and what was read or heard; mico_server.store.search indexes it.
    sa.Column("text_folded", sa.Text, nullable=False),
    sa.Column("finish_reason", sa.String(16), nullable=False),
    sa.Column("usage", sa.JSON(none_as_null=True)),
    sa.Column("reports", sa.JSON, nullable=False),
    sa.Column("confidence", sa.Double),
    sa.Column("unsure", sa.Boolean),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("parent", sa.Integer, nullable=False, server_default="0"),
    sa.Column("model", sa.Text),  # that answers; NULL: unknown
    # The version beside which another model answers the same question, and the better one of both.
    sa.Column("beside", sa.Integer),
    sa.Column("preferred", sa.Integer),
)

# Which turn shows which medium: a medium that is shown cannot be deleted.
turn_media = sa.Table(
    "turn_media",
    metadata,
    sa.Column("conversation_id", _ID, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("media_id", sa.ForeignKey("media.id"), primary_key=True, index=True),
    sa.ForeignKeyConstraint(
        ["conversation_id", "number"],
        ["turns.conversation_id", "turns.number"],
        ondelete="CASCADE",
    ),
)

# Names that somebody taught, with the features of their examples and none of the media. The space
# says which models can use them.
taught = sa.Table(
    "taught",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("space", sa.String(64), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("ids", sa.JSON, nullable=False),  # the model's tokens of the name
    sa.Column("examples", sa.Integer, nullable=False),
    sa.Column("features", sa.LargeBinary, nullable=False),  # of each example: little-endian float32
    sa.Column("corrections", sa.JSON, nullable=False),  # the turns whose answers the name corrects
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Index(None, "tenant", "created_at", "id"),
)

# Files of requests and answers in the folder of uploads, named by their ids.
files = sa.Table(
    "files",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("purpose", sa.String(16), nullable=False),  # batch, batch_output
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("owner", sa.Text),  # as of media
    sa.Index(None, "tenant", "created_at", "id"),
    sa.Index(None, "owner", "bytes"),
)

# Requests of a file that are answered in the background. The files of its answers are written while
# it runs, and get their rows in ``files`` when it ends.
batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("input_file_id", _ID, nullable=False, index=True),
    sa.Column("output_file_id", _ID, nullable=False),
    sa.Column("error_file_id", _ID, nullable=False),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("completed", sa.Integer, nullable=False),
    sa.Column("failed", sa.Integer, nullable=False),
    sa.Column("times", sa.JSON, nullable=False),  # seconds since 1970 of its states
    sa.Column("labels", sa.JSON(none_as_null=True)),  # the client's own
    sa.Column("errors", sa.JSON, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Index(None, "tenant", "created_at", "id"),
)
