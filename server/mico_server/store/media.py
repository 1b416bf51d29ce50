"""Stored media: a file for each content, a record for each time that it was sent.

The file is on disk before its record is committed, and removed with the last record of its content.
Both happen under the lock of the content's row in ``blobs``, so that nobody removes a file that
another request, perhaps of another process, has just put there again.
"""

import asyncio
import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Row, delete, exists, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from mico_chat.errors import RequestError
from mico_chat.fair import owner_of
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_server.errors import ConflictError, GoneError
from mico_server.store import blobs as blob_files
from mico_server.store.database import Database, Rows, uninterrupted
from mico_server.store.quota import Quota
from mico_server.store.tables import (
    blobs,
    check_text,
    cleaned,
    media,
    new_id,
    now,
    turn_media,
)

_BATCH = 200
WORK_AGE_S = 86400.0  # seconds after which no request uses a work folder any more
RETRY_S = 3600.0  # seconds for which media stay after their turn was taken back


class MediaRecord(BaseModel):
    """A stored medium. ``name`` is the client's and appears in messages only.

    An ``uploaded`` medium stays until ``expires_at`` (None: until it is deleted) and as long as a
    conversation shows it. Any other medium came with a turn, and is removed when no conversation
    shows it.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    kind: Kind
    name: str
    bytes: int
    sha256: str
    uploaded: bool
    created_at: datetime
    expires_at: datetime | None
    report: MediaReport | None


@dataclass(frozen=True)
class NewMedium:
    """A finished file in a work folder, which will be stored under this id."""

    kind: Kind
    path: Path
    name: str
    sha256: str
    bytes: int
    report: MediaReport | None = None
    id: str = field(default_factory=lambda: new_id("media"))


class MediaStore:
    """Records in the database, and files in ``folder``; replicas share both."""

    def __init__(self, database: Database, folder: Path, quota: Quota | None = None) -> None:
        self._database = database
        self._quota = quota or Quota()
        self._folder = folder.expanduser().absolute()

    def work_folder(self) -> blob_files.WorkFolder:
        return blob_files.WorkFolder(self._folder)

    async def prepare(
        self, kind: Kind, path: Path, name: str, report: MediaReport | None = None
    ) -> NewMedium:
        check_text(name, f"name of the {kind}")
        sha256, size = await asyncio.to_thread(blob_files.finish, path)
        return NewMedium(kind, path, name, sha256, size, report)

    @uninterrupted
    async def add(
        self,
        tenant: str,
        kind: Kind,
        path: Path,
        name: str,
        *,
        ttl_s: float | None,
        report: MediaReport | None = None,
    ) -> MediaRecord:
        """Store an upload for ``ttl_s`` seconds (None: until it is deleted), and move its file."""
        new = await self.prepare(kind, path, name, report)
        expires = None if ttl_s is None else now() + timedelta(seconds=ttl_s)
        try:
            async with self._database.writing() as connection:
                await self.put(connection, tenant, [new], uploaded=True, expires_at=expires)
                row = (await connection.execute(_RECORDS.where(media.c.id == new.id))).one()
        except Exception:
            await self.collect([blob_files.blob_id(tenant, new.sha256)])
            raise
        return _record(row)

    @uninterrupted
    async def get(self, tenant: str, id_: str) -> MediaRecord:
        async with self._database.reading() as connection:
            return _record(await _MEDIA.one(connection, tenant, id_))

    @uninterrupted
    async def list(
        self, tenant: str, *, limit: int, after: str | None = None, kind: Kind | None = None
    ) -> tuple[MediaRecord, ...]:
        """Up to ``limit`` media, the newest first, beginning behind the medium ``after``."""
        wanted = () if kind is None else (media.c.kind == kind,)
        async with self._database.reading() as connection:
            rows = await _MEDIA.page(connection, tenant, limit, after, *wanted)
            return tuple(map(_record, rows))

    def path_of(self, tenant: str, sha256: str) -> Path:
        return blob_files.blob_path(self._folder, blob_files.blob_id(tenant, sha256))

    def path(self, record: MediaRecord) -> Path:
        path = self.path_of(record.tenant, record.sha256)
        if not path.is_file():
            raise GoneError(
                f"medium {record.id} ({record.name}): its {record.bytes} bytes are no longer on "
                "the server's disk; upload it again"
            )
        return path

    @uninterrupted
    async def delete(self, tenant: str, id_: str) -> None:
        """Delete a medium, and its file unless another record has the same content."""
        async with self._database.writing() as connection:
            row = await _MEDIA.one(connection, tenant, id_, read=False)
            shown = await connection.scalar(
                select(turn_media.c.conversation_id).where(turn_media.c.media_id == id_).limit(1)
            )
            if shown is not None:
                raise ConflictError(
                    f"medium {id_} is shown in conversation {shown}; delete that conversation first"
                )
            await connection.execute(delete(media).where(media.c.id == id_))
        await self.collect([row.blob_id])

    @uninterrupted
    async def sweep(self) -> int:
        """Remove expired media that no conversation shows, files without a record, old work.

        Returns how many media were removed.
        """
        removed = 0
        while True:
            async with self._database.writing() as connection:
                expired = (
                    select(media.c.id)
                    .where(media.c.expires_at <= now(), ~_shown())
                    .order_by(media.c.id)
                    .limit(_BATCH)
                )
                gone = await self.forget(connection, list(await connection.scalars(expired)))
            if not gone:
                break
            removed += len(gone)
            await self.collect(gone)
        async with self._database.reading() as connection:
            unused = select(blobs.c.id).where(~exists().where(media.c.blob_id == blobs.c.id))
            orphans = list(await connection.scalars(unused))
        await self.collect(orphans)
        found = blob_files.walk(self._folder)
        while batch := await asyncio.to_thread(lambda: list(itertools.islice(found, _BATCH))):
            async with self._database.reading() as connection:
                known = await connection.scalars(select(blobs.c.id).where(blobs.c.id.in_(batch)))
                orphans = sorted(set(batch) - set(known))
            await self.collect(orphans)
        await asyncio.to_thread(blob_files.sweep_work, self._folder, WORK_AGE_S)
        return removed

    # --- In the transaction of a caller: a turn and its media are stored together. ---

    async def put(
        self,
        connection: AsyncConnection,
        tenant: str,
        new: Collection[NewMedium],
        *,
        uploaded: bool,
        expires_at: datetime | None = None,
    ) -> None:
        """Move files in and record them. If the transaction fails, :meth:`collect` their blobs."""
        if not new:
            return
        created = now()
        # In one order, so that two transactions never wait for each other's locks.
        ordered = sorted(new, key=lambda medium: medium.sha256)
        async with self._quota.within(connection, tenant, ordered[0].name):
            for medium in ordered:
                blob = blob_files.blob_id(tenant, medium.sha256)
                await lock_blob(connection, blob, medium.bytes)
                await connection.execute(
                    insert(media).values(
                        id=medium.id,
                        tenant=tenant,
                        owner=owner_of(tenant),
                        blob_id=blob,
                        blob_bytes=medium.bytes,
                        kind=medium.kind,
                        name=medium.name,
                        uploaded=uploaded,
                        created_at=created,
                        expires_at=expires_at,
                        report=None if medium.report is None else report_json(medium.report),
                    )
                )
        for medium in ordered:
            blob = blob_files.blob_id(tenant, medium.sha256)
            await asyncio.to_thread(blob_files.move_in, medium.path, self._folder, blob)

    async def show(
        self, connection: AsyncConnection, tenant: str, kinds: Mapping[str, Kind]
    ) -> None:
        """Keep media that a turn is about to show; ``kinds`` has their ids and kinds."""
        for id_, kind in sorted(kinds.items()):
            row = await _MEDIA.one(connection, tenant, id_, read=True, key_share=True)
            if row.kind != kind:
                raise RequestError(
                    f"medium {id_} is of kind {row.kind}, but the request gives its kind as {kind}"
                )
        await connection.execute(
            update(media)
            .where(media.c.id.in_(kinds), ~media.c.uploaded, media.c.expires_at.is_not(None))
            .values(expires_at=None)
        )

    async def describe(
        self, connection: AsyncConnection, reports: Mapping[str, MediaReport]
    ) -> None:
        """Add reports to media that were stored before they were decoded."""
        for id_, report in sorted(reports.items()):
            await connection.execute(
                update(media).where(media.c.id == id_).values(report=report_json(report))
            )

    async def shown_in(
        self, connection: AsyncConnection, conversation: str
    ) -> tuple[MediaRecord, ...]:
        shown = select(turn_media.c.media_id).where(turn_media.c.conversation_id == conversation)
        rows = await connection.execute(_RECORDS.where(media.c.id.in_(shown)))
        return tuple(map(_record, rows))

    async def let_go(self, connection: AsyncConnection, ids: Collection[str]) -> None:
        """Let media that came with a turn and are no longer shown expire after :data:`RETRY_S`."""
        await connection.execute(
            update(media)
            .where(media.c.id.in_(ids), ~media.c.uploaded, ~_shown())
            .values(expires_at=now() + timedelta(seconds=RETRY_S))
        )

    async def forget(
        self, connection: AsyncConnection, ids: Collection[str], *, uploaded: bool = True
    ) -> tuple[str, ...]:
        """Delete the records of media that are not shown; uploaded ones only with ``uploaded``.

        Returns the blobs, which the caller must :meth:`collect` after the commit.
        """
        await connection.execute(
            select(media.c.id).where(media.c.id.in_(ids)).order_by(media.c.id).with_for_update()
        )
        # A second statement: it sees what was committed while the first waited for the locks.
        unshown = delete(media).where(media.c.id.in_(ids), ~_shown())
        if not uploaded:
            unshown = unshown.where(~media.c.uploaded)
        return tuple(await connection.scalars(unshown.returning(media.c.blob_id)))

    async def collect(self, unused: Collection[str]) -> None:
        """Remove the files of those blobs that have no record."""
        for blob in sorted(set(unused)):
            async with self._database.writing() as connection:
                await lock_blob(connection, blob, 0)
                if await connection.scalar(select(exists().where(media.c.blob_id == blob))):
                    continue
                await asyncio.to_thread(blob_files.remove, self._folder, blob)
                await connection.execute(delete(blobs).where(blobs.c.id == blob))


def report_json(report: MediaReport) -> Any:
    """A report for a JSON column: without NaN, and with a name that can be stored."""
    named = report.model_copy(update={"name": cleaned(report.name)})
    return json.loads(named.model_dump_json())


def _shown() -> Any:
    return exists().where(turn_media.c.media_id == media.c.id)


_RECORDS = select(media, blobs.c.bytes).join(blobs, blobs.c.id == media.c.blob_id)
_MEDIA = Rows(media, _RECORDS)


def _record(row: Row[Any]) -> MediaRecord:
    sha256 = row.blob_id.partition("/")[2]
    return MediaRecord.model_validate({**row._mapping, "sha256": sha256})


async def lock_blob(connection: AsyncConnection, blob: str, size: int) -> None:
    """Lock a blob's row until the end of the transaction; a missing row is made."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    new = dialect.insert(blobs).values(id=blob, bytes=size)
    # An update that changes nothing waits for the lock; "do nothing" would not.
    same = {"bytes": new.excluded.bytes if size else blobs.c.bytes}
    await connection.execute(new.on_conflict_do_update(index_elements=["id"], set_=same))
