"""The stored chat of a session: its turns stand there as those of /v1/chat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mico_chat.media import MediaFile
from mico_chat.options import GREEDY
from mico_chat.speech.events import Item
from mico_server.dialects.chat import ChatFields, ChatForm, ChatTurn
from mico_server.fetch.media_reader import MediaReader
from mico_server.realtime.conversation import Kept
from mico_server.service import Client
from mico_server.store.tables import new_id


@dataclass
class StoredChat:
    """A chat of the client's, which exists unless it is ``new``. Recordings and pictures are stored
    in it with ``media`` alone. ``history`` is what was said in it before the session.
    """

    client: Client
    id: str
    new: bool
    media: bool
    history: Sequence[Kept] = ()
    aside: ChatTurn | None = None

    @classmethod
    async def opened(cls, client: Client, wanted: str, *, media: bool) -> StoredChat:
        """The chat of this id, or a "new" one.

        Raises:
            NotFoundError: the client has no such chat.
        """
        if wanted == "new":
            return cls(client, new_id("conv"), True, media)
        store = client.service.conversations
        said = store.messages(await store.load(client.tenant, wanted))
        history = [Kept(Item(role=one.role), one, stored=True) for one in said]
        return cls(client, wanted, False, media, history)

    @asynccontextmanager
    async def turn(self, asked: Sequence[Kept], model: str) -> AsyncIterator[ChatTurn | None]:
        """A turn that asks this, stored from now on; if nothing is asked, the one that was set
        ``aside``, perhaps none."""
        service, tenant = self.client.service, self.client.tenant
        async with AsyncExitStack() as stack:
            turn, self.aside = self.aside, None
            if not asked:
                if turn is not None:
                    held = service.conversations.answering(tenant, self.id)
                    await stack.enter_async_context(held)
                    turn.go_on()
                yield turn
                self._set_aside(turn)
                return
            folder = await stack.enter_async_context(service.media.work_folder())
            messages = [await one.message() for one in asked]
            media: list[MediaFile] = []
            for said, one in zip(messages, asked, strict=True):
                for file in (*said.files, *one.sounds) if self.media else ():
                    path = folder.file(str(len(media)))
                    media.append(await asyncio.to_thread(_written, file, path))
            text = "\n".join(one.text for one in messages if one.text)
            fields = ChatFields(message=text, model=model, conversation_id=self.id, create=self.new)
            reader = MediaReader(service, tenant, folder)
            form = ChatForm(tuple(media), GREEDY, fields)
            turn = await ChatTurn.opened(reader, form, stack)
            await stack.enter_async_context(turn.stored())
            self.new = False
            yield turn
            self._set_aside(turn)
            if turn.kept:
                for one in asked:
                    one.stored, one.sounds = True, ()

    def _set_aside(self, turn: ChatTurn | None) -> None:
        self.aside = turn if turn is not None and turn.aside is not None else None


def _written(file: MediaFile, path: Path) -> MediaFile:
    """The medium in a file of its own, which storing it moves away."""
    if file.id is not None:
        return file
    path.write_bytes(file.read())
    return replace(file, source=path)
