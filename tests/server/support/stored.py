"""What a service stores, and short ways for tests to store something."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import update

from mico_chat.media.medium import MediaReport
from mico_server.store.conversation import (
    Conversation,
    NewTurn,
    StoredMedium,
    StoredPart,
    StoredText,
)
from mico_server.store.conversations import ConversationStore
from mico_server.store.database import Database
from mico_server.store.media import MediaRecord, MediaStore, NewMedium
from mico_server.store.tables import media as media_table
from mico_server.store.tables import new_id, now


@dataclass(frozen=True)
class Stores:
    """The stores on a database and a folder; the methods act for the tenant ``t`` by default."""

    database: Database
    folder: Path

    @property
    def media(self) -> MediaStore:
        return MediaStore(self.database, self.folder)

    @property
    def conversations(self) -> ConversationStore:
        return ConversationStore(self.database, self.media)

    async def add(self, data: bytes = b"bytes", **changes: Any) -> MediaRecord:
        """Store an upload."""
        given = {"tenant": "t", "kind": "image", "name": "cat.jpg", "ttl_s": 60.0, **changes}
        async with self.media.work_folder() as work:
            work.file("0").write_bytes(data)
            return await self.media.add(path=work.file("0"), **given)

    async def say(
        self,
        question: str = "Hi",
        answer: str = "Yes.",
        *,
        tenant: str = "t",
        id_: str | None = None,
        number: int | None = None,
        after: int | None = None,
        system: str | None = None,
        show: Sequence[str] = (),
        send: Sequence[bytes] = (),
        reports: Sequence[MediaReport] = (),
    ) -> str:
        """Store a question and its answer in a conversation, or in a new one; returns its id.

        The question shows stored images by their ids, and sends new ones. It follows the turn
        ``after``, or the last one.
        """
        create, id_ = id_ is None, id_ or new_id("conv")
        former = None if create else (await self.load(id_, tenant)).system
        if number is None:
            earlier = None if create else await self.load(id_, tenant)
            number = 1 if earlier is None else earlier.next_number
            if after is None and earlier is not None:
                after = earlier.turns[-1].number if earlier.turns else 0
        after = number - 1 if after is None else after
        async with self.media.work_folder() as work:
            new: list[NewMedium] = []
            for n, data in enumerate(send):
                work.file(str(n)).write_bytes(data)
                new.append(await self.media.prepare("image", work.file(str(n)), f"{n}.jpg"))
            ids = [*show, *(medium.id for medium in new)]
            parts: list[StoredPart] = [StoredMedium(type="image", media_id=one) for one in ids]
            parts.append(StoredText(text=question))
            turn = NewTurn(parts, "mini", new_media=new, parent=after)
            await self.conversations.add_turn(
                tenant, id_, number, turn, create=create, system=system
            )
        reports = reports or [MediaReport(name="0.jpg", kind="image")] * len(ids)
        ended = replace(turn, answer=answer, finish_reason="stop", reports=reports)
        told = {"system": system, "former": former}
        await self.conversations.answer_turn(tenant, id_, number, ended, **told)
        return id_

    async def load(self, id_: str, tenant: str = "t") -> Conversation:
        return await self.conversations.load(tenant, id_)

    async def expire(self, *records: MediaRecord) -> None:
        """Let the time of these media be over, or of all that do not stay for good."""
        past = now() - timedelta(seconds=1)
        over = update(media_table).where(media_table.c.expires_at.is_not(None))
        if records:
            over = over.where(media_table.c.id.in_([record.id for record in records]))
        async with self.database.writing() as connection:
            await connection.execute(over.values(expires_at=past))

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())
