"""Conversations and media that change their tenant: those made without a key, when keys come or go.

A file is named by its tenant, so the new tenant gets a name of its own for the same bytes: a hard
link, or a copy where the file system lacks links. The old name goes when the database has the new
one; what a crash leaves between the two, the service's sweep removes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Table, func, or_, select, update

from mico_chat.errors import ConfigError
from mico_server.auth import USER_SEPARATOR
from mico_server.blobs import blob_id, blob_path, copy
from mico_server.database import Database, uninterrupted
from mico_server.media_store import MediaStore, lock_blob
from mico_server.tables import blobs, conversations, media


@dataclass(frozen=True)
class Amount:
    """How much a tenant and its users have."""

    conversations: int
    media: int

    def __bool__(self) -> bool:
        return bool(self.conversations or self.media)

    def __str__(self) -> str:
        counts = ((self.conversations, "conversation"), (self.media, "file"))
        named = [f"{n} {what}" if n == 1 else f"{n} {what}s" for n, what in counts if n]
        return " and ".join(named) or "nothing"


class History:
    """What the tenants of a service have. ``folder`` is that of its media."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder
        self._store = MediaStore(database, folder)

    @uninterrupted
    async def of(self, tenant: str) -> Amount:
        """What a tenant and its users have."""
        async with self._database.reading() as connection:
            counts = [
                await connection.scalar(
                    select(func.count()).select_from(table).where(_belongs(table, tenant))
                )
                for table in (conversations, media)
            ]
        return Amount(*(count or 0 for count in counts))

    @uninterrupted
    async def move(self, source: str, target: str) -> Amount:
        """Give all that a tenant has to another: ``source/USER`` becomes ``target/USER``.

        Raises:
            ConfigError: if none of the files is in the folder; nothing is changed then.
        """
        old: set[str] = set()
        found = 0
        async with self._database.writing() as connection:
            # The conversations first: whoever goes on with one at this moment holds its lock, and
            # its media are there when it is let go.
            moved = await connection.execute(_renamed(conversations, source, target))
            rows = (
                await connection.execute(
                    select(media.c.id, media.c.tenant, media.c.blob_id, blobs.c.bytes)
                    .join(blobs, blobs.c.id == media.c.blob_id)
                    .where(_belongs(media, source))
                    .order_by(media.c.id)
                    .with_for_update(of=media)
                )
            ).all()
            for row in sorted(rows, key=lambda row: row.blob_id.partition("/")[2]):
                tenant = target + row.tenant[len(source) :]
                new = blob_id(tenant, row.blob_id.partition("/")[2])
                await lock_blob(connection, new, row.bytes)
                found += await asyncio.to_thread(copy, self._folder, row.blob_id, new)
                await connection.execute(
                    update(media).where(media.c.id == row.id).values(tenant=tenant, blob_id=new)
                )
                old.add(row.blob_id)
            if rows and not found:
                raise ConfigError(
                    f"{blob_path(self._folder, rows[0].blob_id)}: there is no such file: "
                    "name the media folder of the service with --media-dir"
                )
        await self._store.collect(old)
        return Amount(moved.rowcount, len(rows))


def _belongs(table: Table, tenant: str) -> ColumnElement[bool]:
    """Rows of a tenant and of its users."""
    # Not by LIKE: SQLite's takes A and a as the same.
    start = tenant + USER_SEPARATOR
    users = func.substr(table.c.tenant, 1, len(start)) == start
    return or_(table.c.tenant == tenant, users)


def _renamed(table: Table, source: str, target: str) -> Any:
    rest = func.substr(table.c.tenant, len(source) + 1)
    return update(table).where(_belongs(table, source)).values(tenant=target + rest)
