"""How much one key may store: files of batches, and media, of all its users together.

The sum is taken in the transaction that adds something, over one index of each table, so that it is
always true. Media of the same tenant and content share a file on disk, whose bytes count once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from mico_chat.errors import LimitError
from mico_chat.fair import owner_of
from mico_server.store.tables import files, media

_DELETE = "delete some: DELETE /v1/files/ID, /v1/media/ID, or conversations that show media"


@dataclass(frozen=True)
class Quota:
    """Most bytes, and most files and media, of a key; None is no bound."""

    bytes: int | None = None
    number: int | None = None

    @asynccontextmanager
    async def within(
        self, connection: AsyncConnection, tenant: str, name: str
    ) -> AsyncIterator[None]:
        """Refuse what the block adds, called ``name``, if the owner of ``tenant`` has too much."""
        if self.bytes is None and self.number is None:
            yield
            return
        owner = owner_of(tenant)
        if connection.dialect.name == "postgresql":  # SQLite has one writer at a time
            lock = func.pg_advisory_xact_lock(func.hashtextextended(f"quota {owner}", 0))
            await connection.execute(select(lock))
        yield
        each = select(func.count().label("n"), func.max(media.c.blob_bytes).label("bytes"))
        blobs = each.where(media.c.owner == owner).group_by(media.c.blob_id).subquery()
        of_media = select(func.sum(blobs.c.n), func.sum(blobs.c.bytes))
        of_files = select(func.count(), func.sum(files.c.bytes)).where(files.c.owner == owner)
        both = [(await connection.execute(query)).one() for query in (of_media, of_files)]
        number, stored = (sum(int(n or 0) for n in column) for column in zip(*both, strict=True))
        for what, found, most, setting in (
            ("files and media", number, self.number, "FILES"),
            ("bytes of files and media", stored, self.bytes, "BYTES"),
        ):
            if most is not None and found > most:
                reason = f"{found} {what} would be stored for this key, over the limit of {most}"
                raise LimitError(name, f"{reason} (MICO_SERVER_MAX_STORED_{setting}); {_DELETE}")
