"""The items of a conversation in real time: as a client sees them, and as the model reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import dropwhile, takewhile
from typing import Any

from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.messages import Message, TextPart
from mico_chat.speech.events import Content, Item
from mico_chat.tools import read_calls
from mico_server.fetch.media_reader import MediaReader
from mico_server.store.tables import check_text

MOST_ITEMS, MOST_TEXT_BYTES, MOST_MEDIA_BYTES = 256, 4 << 20, 64 << 20
"""Of a longer conversation the oldest items are forgotten, system messages last, or the oldest
media, until half is left: after each such step the model computes the whole conversation anew."""

_TEXTS = {"input_text", "output_text", "text", "output_audio", "audio"}


def words_until(text: str, share: float) -> str:
    """The whole words in the first ``share``, 0 to 1, of a sentence."""
    part = text[: round(len(text) * share)]
    return part if part == text else part.rpartition(" ")[0]


@dataclass
class Kept:
    """An item, and the message that the model reads. ``heard`` comes to be what is said in its
    sound. ``said`` has the sentences that were spoken, each with its seconds.

    A user's item is ``stored`` in a chat, or will be, with the ``sounds`` that the model is not
    shown. ``cut`` shortens what is stored of an answer.
    """

    item: Item
    read: Message
    heard: asyncio.Task[str] | None = None
    said: list[tuple[str, float]] = field(default_factory=list)
    stored: bool = False
    sounds: tuple[MediaFile, ...] = ()
    cut: Callable[[str], Awaitable[None]] | None = None

    async def message(self) -> Message:
        words = "" if self.heard is None else await asyncio.shield(self.heard)
        more = [TextPart(words)] if words else []
        return replace(self.read, content=(*self.read.content, *more))

    def truncate(self, end_ms: int) -> None:
        """Keep what was said until then; of a sentence within, the words up to its share.

        Raises:
            RequestError: it has no sound, or less of it.
        """
        whole = 1000 * sum(seconds for _, seconds in self.said)
        if not self.said or end_ms > whole + 1:
            reason = f"{end_ms}; {self.item.id} has {whole:.0f} ms of sound"
            raise RequestError.at("audio_end_ms", reason)
        kept, left = "", end_ms / 1000
        for text, seconds in self.said:
            share = min(1.0, left / seconds) if seconds else 1.0  # code is not spoken
            kept += words_until(text, share)
            left -= seconds
            if left <= 0:
                break
        self.set_text(kept)

    def set_text(self, text: str) -> None:
        self.read = Message.assistant(*([text] if text else []))
        for part in self.item.content:
            name = "transcript" if part.type == "output_audio" else "text"
            setattr(part, name, text)


async def read_item(item: Item, reader: MediaReader, calls: Mapping[str, str]) -> Kept:
    """An item of a client; its media are read, and left out of the item. Sounds are not.

    ``calls`` has the names of the tools that were called, by the ids of the calls.
    """
    if item.type == "function_call":
        return Kept(item, called(item))
    if item.type == "function_call_output":
        id_, output = str(item.call_id), str(item.output)
        if id_ not in calls:
            raise RequestError.at("item.call_id", f"{id_[:64]!r} is no call in this conversation")
        check_text(output, "item.output")
        return Kept(item, Message("tool", (TextPart(output),), tool_call_id=id_, name=calls[id_]))
    assert item.role is not None
    content: list[dict[str, Any]] = []
    for number, part in enumerate(item.content):
        where = f"item.content[{number}]"
        data = part.model_dump(exclude_none=True)
        if part.type in _TEXTS:
            text = part.text if part.text is not None else part.transcript
            if text is None:
                raise RequestError.at(f"{where}.text", "missing")
            check_text(text, where)
            content.append({"type": "text", "text": text})
        elif part.type == "input_image":
            view = {"url": data.get("image_url"), "detail": data.get("detail", "auto")}
            content.append({"type": "image_url", "image_url": view})
        elif part.type != "input_audio":
            content.append(data)
    for number, part in enumerate(item.content):
        if part.type not in _TEXTS:
            item.content[number] = Content(type=part.type)
    if not content:
        return Kept(item, Message(item.role, ()))
    (read,) = await reader.messages([{"role": item.role, "content": content}], "item")
    return Kept(item, read)


def called(item: Item) -> Message:
    """A call as the model reads it."""
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    return Message("assistant", (), tool_calls=read_calls([call], "item"))


class Conversation:
    """Items in their order. Of more than ``most_media`` media the newer half is kept."""

    def __init__(self, most_media: int, items: Iterable[Kept] = ()) -> None:
        self._most_media = most_media
        self._items = list(items)

    def named(self, id_: str, where: str = "item_id") -> Kept:
        for kept in self._items:
            if kept.item.id == id_:
                return kept
        raise RequestError.at(where, f"there is no item {id_[:64]!r} in this conversation")

    def add(self, kept: Kept, after: str | None = None) -> tuple[str | None, list[str]]:
        """Add an item at the end, or ``after`` another ("root": before all).

        Returns:
            the id of the item before it, and those of items that are forgotten for it.
        """
        if any(one.item.id == kept.item.id for one in self._items):
            raise RequestError.at("item.id", f"there is an item {kept.item.id!r} already")
        place = len(self._items)
        if after is not None:
            before = None if after == "root" else self.named(after, "previous_item_id")
            place = 0 if before is None else self._items.index(before) + 1
        self._items.insert(place, kept)
        self._forget_media(kept)
        old = list[str]()
        while self._too_much(1 if not old else 2):
            said = (one is not kept and one.item.role != "system" for one in self._items)
            oldest = next((at for at, goes in enumerate(said) if goes), None)
            if oldest is None and not self._too_much(1):
                break
            old.append(self._items.pop(oldest or 0).item.id)
            place -= (oldest or 0) < place
        return self._items[place - 1].item.id if place > 0 else None, old

    async def next(self) -> tuple[Kept, list[str]]:
        """A turn like the user's last one, which is likely to come next, and the ids of the items
        that are forgotten for it now."""
        back = dropwhile(lambda one: one.item.role != "user", reversed(self._items))
        said = [await one.message() for one in takewhile(lambda one: one.item.role == "user", back)]
        parts = [part for message in reversed(said) for part in message.content]
        next_ = Kept(Item(role="user"), Message("user", tuple(parts)))
        _, forgotten = self.add(next_)
        self._items.remove(next_)
        return next_, forgotten

    def _too_much(self, of: int) -> bool:
        """Whether there are more items than one, and more than one ``of`` so many parts."""
        n_bytes = sum(one.read.n_bytes for one in self._items)
        n = len(self._items)
        return n > 1 and (n > MOST_ITEMS // of or n_bytes > MOST_TEXT_BYTES // of)

    def _forget_media(self, newest: Kept) -> None:
        files = [part for one in self._items for part in one.read.files]
        if len(files) <= self._most_media and sum(f.size for f in files) <= MOST_MEDIA_BYTES:
            return
        n, n_bytes = 0, 0
        for one in reversed(self._items):
            n, n_bytes = n + len(one.read.files), n_bytes + sum(f.size for f in one.read.files)
            of = 1 if one is newest else 2
            if n > self._most_media // of or n_bytes > MOST_MEDIA_BYTES // of:
                texts = (part for part in one.read.content if isinstance(part, TextPart))
                one.read = replace(one.read, content=tuple(texts))

    @property
    def calls(self) -> dict[str, str]:
        calls = (call for kept in self._items for call in kept.read.tool_calls)
        return {call.id: call.name for call in calls}

    def remove(self, id_: str) -> None:
        self._items.remove(self.named(id_))

    def asked(self) -> list[Kept]:
        """The user's items behind the last one that is stored."""
        said = [kept for kept in self._items if kept.item.role == "user"]
        return said[max((at for at, one in enumerate(said, 1) if one.stored), default=0) :]

    async def messages(self, instructions: str, *more: Kept) -> list[Message]:
        """What the model reads of the items, and of ``more`` behind them, once all sounds are
        written down; turns that follow each other of one role are one message, and the result of a
        call stands behind it."""
        found: list[Message] = []
        system = [instructions] if instructions else []
        for message in [await kept.message() for kept in (*self._items, *more)]:
            if message.role == "system":
                system.append(message.text)
            elif message.role == "tool":
                ids = [[call.id for call in one.tool_calls] for one in found]
                at = [place for place, own in enumerate(ids, 1) if message.tool_call_id in own]
                for place in at[:1]:  # none, if the call was forgotten
                    behind = takewhile(lambda one: one.role == "tool", found[place:])
                    found.insert(place + len(list(behind)), message)
            elif not (message.content or message.tool_calls):
                continue
            elif found and (last := found[-1]).role == message.role:
                between = [TextPart("\n")] if last.content and message.content else []
                content = (*last.content, *between, *message.content)
                calls = (*last.tool_calls, *message.tool_calls)
                found[-1] = replace(last, content=content, tool_calls=calls)
            else:
                found.append(message)
        if not found:
            raise RequestError("the conversation is empty: there is nothing to answer")
        return [*([Message.system("\n\n".join(system))] if system else []), *found]
