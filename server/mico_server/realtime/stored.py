"""The stored chat of a session: its turns stand there as those of /v1/chat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from mico_chat.media import MediaFile
from mico_chat.messages import Message
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
    in it with ``media`` alone. ``history`` is what was said in it before the session. ``held`` is
    the turn of recordings that were stored before they are written down.
    """

    client: Client
    id: str
    new: bool
    media: bool
    history: Sequence[Kept] = ()
    aside: ChatTurn | None = None
    held: ChatTurn | None = None
    holding: asyncio.Lock = field(default_factory=asyncio.Lock)

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
            messages = [await one.message() for one in asked]
            turn = await self._asking(asked, messages, model, stack)
            await stack.enter_async_context(turn.stored())
            self.held, self.new = None, False
            yield turn
            self._set_aside(turn)
            for one in asked:
                one.stored = turn.kept
                sounds = () if turn.kept else one.sounds
                one.sounds = tuple(replace(sound, id=None) for sound in sounds)

    async def hold(self, asked: Sequence[Kept], model: str) -> None:
        """Store the recordings of what is asked so far, without words: they outlive the process."""
        spoken = [one for one in asked if one.sounds]
        async with self.holding, AsyncExitStack() as stack:
            turn = await self._asking(spoken, [one.read for one in spoken], model, stack, bare=True)
            await stack.enter_async_context(turn.stored())
            turn.set_aside()
            self.held, self.new = turn, False
            stored = iter(turn.media)
            for one in spoken:
                one.sounds = tuple(replace(sound, id=next(stored).id) for sound in one.sounds)

    async def leave(self, asked: Sequence[Kept], model: str) -> None:
        """The session ends. Recordings that were held and not answered get their words; they go if
        nothing was said in them."""
        heard = [one.heard for one in asked if one.heard is not None]
        if self.held is None or any(one.cancelled() or one.exception() for one in heard):
            return  # nobody knows whether something was said
        async with AsyncExitStack() as stack:
            messages = [await one.message() for one in asked]
            turn = await self._asking(asked, messages, model, stack)
            await stack.enter_async_context(turn.stored())
            if any(one.text for one in messages):
                turn.set_aside()

    async def _asking(
        self,
        asked: Sequence[Kept],
        messages: Sequence[Message],
        model: str,
        stack: AsyncExitStack,
        *,
        bare: bool = False,
    ) -> ChatTurn:
        """The turn of a question: the one that is held, or a new one, which is not stored yet.

        A ``bare`` one has recordings alone.
        """
        service, tenant = self.client.service, self.client.tenant
        folder = await stack.enter_async_context(service.media.work_folder())
        media: list[MediaFile] = []
        for said, one in zip(messages, asked, strict=True):
            for file in (*(() if bare else said.files), *one.sounds) if self.media else ():
                path = folder.file(str(len(media)))
                media.append(await asyncio.to_thread(_written, file, path))
        text = "" if bare else "\n".join(one.text for one in messages if one.text)
        fields = ChatFields(message=text, model=model, conversation_id=self.id, create=self.new)
        form = ChatForm(tuple(media), GREEDY, fields)
        if (held := self.held) is not None:
            async with AsyncExitStack() as claim:
                alone = service.conversations.answering(tenant, self.id)
                await claim.enter_async_context(alone)
                if await held.reword(form):
                    await stack.enter_async_context(claim.pop_all())
                    return held
            self.held = None
        return await ChatTurn.opened(MediaReader(service, tenant, folder), form, stack)

    def _set_aside(self, turn: ChatTurn | None) -> None:
        self.aside = turn if turn is not None and turn.aside is not None else None


def _written(file: MediaFile, path: Path) -> MediaFile:
    """The medium in a file of its own, which storing it moves away."""
    if file.id is not None:
        return file
    path.write_bytes(file.read())
    return replace(file, source=path)
