"""Files of requests, and batches that answer them in the background.

A file's content lies in a folder of its own, named by the file's id. The files of a batch's answers
are there while it runs, so that a batch goes on where a restart interrupted it; they become files
of the tenant in the transaction that ends the batch.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import delete, insert, select, update

from mico_chat.fair import owner_of
from mico_chat.system import sync
from mico_server.errors import ConflictError, GoneError
from mico_server.store.database import Database, Rows, uninterrupted
from mico_server.store.quota import Quota
from mico_server.store.tables import batches, belongs, check_text, files, new_id, now

Purpose = Literal["batch", "batch_output"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "cancelling", "cancelled"
]
ENDED: tuple[BatchStatus, ...] = ("failed", "completed", "cancelled")
RUNNING: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")


class FileRecord(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)

    id: str
    tenant: str
    purpose: Purpose
    name: str
    bytes: int
    created_at: datetime


class BatchRecord(BaseModel):
    """``times`` has the seconds since 1970 at which the batch came into its states.

    ``output_file_id`` and ``error_file_id`` are files of the tenant once the batch has ended, if
    they hold any lines. ``errors`` are those of the input file as a whole.
    """

    model_config = ConfigDict(frozen=True, from_attributes=True)

    id: str
    tenant: str
    endpoint: str
    status: BatchStatus
    input_file_id: str
    output_file_id: str
    error_file_id: str
    total: int
    completed: int
    failed: int
    times: dict[str, int]
    labels: dict[str, str] | None
    errors: list[dict[str, Any]]
    created_at: datetime


class BatchStore:
    """Records in the database, and files in ``folder``; replicas share both.

    ``woken`` is set when there may be work for the runner of batches. Where a method takes None as
    the tenant, it means all tenants.
    """

    def __init__(self, database: Database, folder: Path, quota: Quota | None = None) -> None:
        self.database = database
        self._quota = quota or Quota()
        self.woken = asyncio.Event()
        self._folder = folder

    # --- Files ---

    def path(self, id_: str) -> Path:
        """Where the content of a file is; only ids that were made here come this far."""
        return self._folder / id_

    def content(self, record: FileRecord) -> Path:
        path = self.path(record.id)
        if not path.is_file():
            raise GoneError(f"file {record.id} ({record.name}) is no longer on the server's disk")
        return path

    @uninterrupted
    async def add_file(self, tenant: str, name: str, path: Path) -> FileRecord:
        """Store a file of requests; it is moved away from ``path``."""
        check_text(name, "file")
        values = _file(new_id("file"), tenant, "batch", name, path.stat().st_size)
        target = self.path(values["id"])
        await asyncio.to_thread(self._move, path, target)
        try:
            async with (
                self.database.writing() as connection,
                self._quota.within(connection, tenant, name),
            ):
                await connection.execute(insert(files).values(values))
        except BaseException:
            target.unlink()
            raise
        return FileRecord.model_validate(values)

    def _move(self, source: Path, target: Path) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync(source)
        os.replace(source, target)
        sync(self._folder)

    @uninterrupted
    async def file(self, tenant: str, id_: str) -> FileRecord:
        async with self.database.reading() as connection:
            return FileRecord.model_validate(await _FILES.one(connection, tenant, id_))

    @uninterrupted
    async def files(
        self, tenant: str, *, limit: int, after: str | None, purpose: str | None
    ) -> list[FileRecord]:
        """Up to ``limit`` files, the newest first, beginning behind the file ``after``."""
        wanted = () if purpose is None else (files.c.purpose == purpose,)
        async with self.database.reading() as connection:
            rows = await _FILES.page(connection, tenant, limit, after, *wanted)
        return [FileRecord.model_validate(row) for row in rows]

    @uninterrupted
    async def delete_file(self, tenant: str, id_: str) -> None:
        async with self.database.writing() as connection:
            await _FILES.one(connection, tenant, id_)
            used = select(batches.c.id).where(
                batches.c.input_file_id == id_, batches.c.status.not_in(ENDED)
            )
            if (batch := await connection.scalar(used)) is not None:
                raise ConflictError(
                    f"file {id_} is being answered in batch {batch}: cancel it first"
                )
            await connection.execute(delete(files).where(files.c.id == id_))
        await asyncio.to_thread(self.path(id_).unlink, missing_ok=True)

    # --- Batches ---

    @uninterrupted
    async def create(
        self, tenant: str, endpoint: str, file: str, labels: Mapping[str, str] | None
    ) -> BatchRecord:
        values: dict[str, Any] = {
            "id": new_id("batch"),
            "tenant": tenant,
            "endpoint": endpoint,
            "status": "validating",
            "input_file_id": file,
            "output_file_id": new_id("file"),
            "error_file_id": new_id("file"),
            **dict.fromkeys(("total", "completed", "failed"), 0),
            "times": {},
            "labels": None if labels is None else dict(labels),
            "errors": [],
            "created_at": now(),
        }
        async with (
            self.database.writing() as connection,
            self._quota.within(connection, tenant, f"batch of {file}"),  # its answers are stored
        ):
            await _FILES.one(connection, tenant, file)
            await connection.execute(insert(batches).values(values))
        self.woken.set()
        return BatchRecord.model_validate(values)

    @uninterrupted
    async def batch(self, tenant: str | None, id_: str) -> BatchRecord:
        async with self.database.reading() as connection:
            return BatchRecord.model_validate(await _BATCHES.one(connection, tenant, id_))

    @uninterrupted
    async def batches(
        self, tenant: str | None, *, limit: int, after: str | None
    ) -> list[BatchRecord]:
        """Up to ``limit`` batches, the newest first, beginning behind the batch ``after``."""
        async with self.database.reading() as connection:
            rows = await _BATCHES.page(connection, tenant, limit, after)
            return [BatchRecord.model_validate(row) for row in rows]

    @uninterrupted
    async def waiting(self) -> set[str]:
        """The owners of batches that have not ended."""
        query = select(batches.c.tenant).where(batches.c.status.in_(RUNNING)).distinct()
        async with self.database.reading() as connection:
            return {owner_of(tenant) for tenant in await connection.scalars(query)}

    @uninterrupted
    async def next_of(self, owner: str, other_than: Collection[str]) -> BatchRecord | None:
        """The oldest batch of an owner that has not ended."""
        query = select(batches).where(batches.c.status.in_(RUNNING), belongs(batches, owner))
        query = query.where(batches.c.id.not_in(other_than))
        query = query.order_by(batches.c.created_at, batches.c.id).limit(1)
        async with self.database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else BatchRecord.model_validate(row)

    @uninterrupted
    async def cancel(self, tenant: str | None, id_: str) -> BatchRecord:
        record = await self.batch(tenant, id_)
        if record.status in ENDED:
            raise ConflictError(f"batch {id_} has ended ({record.status}); it cannot be cancelled")
        found = await self.move(record, "cancelling")
        self.woken.set()
        return found

    @uninterrupted
    async def move(
        self,
        batch: BatchRecord,
        status: BatchStatus,
        *,
        errors: Sequence[Mapping[str, Any]] = (),
        counts: Mapping[str, int] | None = None,
    ) -> BatchRecord:
        """Bring a batch into a state, unless it has ended, or is being cancelled.

        ``counts`` are new values of ``total``, ``completed`` and ``failed``. The files of a batch
        that ends become the tenant's.
        """
        id_ = batch.id
        kept = ENDED if status in ("cancelling", *ENDED) else (*ENDED, "cancelling")
        query = select(batches).where(batches.c.id == id_)
        async with self.database.writing() as connection:
            row = (await connection.execute(query.with_for_update())).one()
            if row.status in kept:
                return BatchRecord.model_validate(row)
            times = {f"{status}_at": int(time.time()), **row.times}
            values: dict[str, Any] = {"status": status, "times": times, **(counts or {})}
            if errors:
                values["errors"] = [dict(error) for error in errors]
            await connection.execute(update(batches).where(batches.c.id == id_).values(values))
            for kind in ("output", "error") if status in ENDED else ():
                file = getattr(batch, f"{kind}_file_id")
                if self.path(file).is_file():
                    name, size = f"{id_}_{kind}.jsonl", self.path(file).stat().st_size
                    made = _file(file, row.tenant, "batch_output", name, size)
                    await connection.execute(insert(files).values(made))
            return BatchRecord.model_validate((await connection.execute(query)).one())

    @uninterrupted
    async def count(self, id_: str, completed: int, failed: int) -> BatchStatus:
        """Store how many requests were answered; returns the batch's present state."""
        async with self.database.writing() as connection:
            changed = update(batches).where(batches.c.id == id_)
            changed = changed.values(completed=completed, failed=failed)
            status: BatchStatus = await connection.scalar(changed.returning(batches.c.status))
            return status


def _file(id_: str, tenant: str, purpose: Purpose, name: str, size: int) -> dict[str, Any]:
    made = {"id": id_, "tenant": tenant, "purpose": purpose, "name": name, "bytes": size}
    return {**made, "owner": owner_of(tenant), "created_at": now()}


_FILES, _BATCHES = Rows(files, select(files)), Rows(batches, select(batches))
