"""Stored conversations: turns of a user's message and its answer, numbered from 1.

A turn is stored before it is answered, in one transaction: the message with its media, or nothing.
Its answer is added later. If the process is killed meanwhile, the turn stays unanswered.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field
from sqlalchemy import and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message, Part, TextPart
from mico_chat.wire import TurnEnd, Usage
from mico_server.errors import ConflictError, NotFoundError
from mico_server.store.blobs import blob_id
from mico_server.store.database import Database, Rows, uninterrupted
from mico_server.store.media import MediaRecord, MediaStore, NewMedium, report_json
from mico_server.store.tables import (
    check_text,
    cleaned,
    conversations,
    folded,
    now,
    turn_media,
    turns,
)

MAX_TITLE = 200

MOST_TITLED = 2000  # characters of a message, among which the words of its title are looked for

UNTITLED = "New chat"
"""The title of a conversation whose first turn was taken back, until it has a first turn again."""


class StoredText(BaseModel):
    type: Literal["text"] = "text"
    text: str


class StoredMedium(BaseModel):
    type: Kind
    media_id: str


StoredPart: TypeAlias = Annotated[StoredText | StoredMedium, Field(discriminator="type")]


@dataclass(frozen=True)
class NewTurn:
    """A turn to be stored. ``new_media`` are those of ``parts`` that are not stored yet.

    ``reports`` has one report for each medium. ``created_at`` distinguishes the turn from a later
    turn of the same number.
    """

    parts: Sequence[StoredPart]
    model: str
    answer: str = ""
    finish_reason: TurnEnd = "unanswered"
    usage: Usage | None = None
    reports: Sequence[MediaReport] = ()
    confidence: float | None = None
    unsure: bool | None = None
    new_media: Sequence[NewMedium] = ()
    created_at: datetime = field(default_factory=now)


class Turn(BaseModel):
    number: int
    parts: tuple[StoredPart, ...]
    answer: str
    finish_reason: TurnEnd
    usage: Usage | None
    reports: tuple[MediaReport, ...]
    confidence: float | None
    unsure: bool | None
    created_at: datetime


@dataclass(frozen=True)
class ConversationInfo:
    """A conversation without its turns; ``model`` gave the last answer, at ``updated_at``."""

    id: str
    tenant: str
    title: str
    system: str | None
    model: str
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class Conversation(ConversationInfo):
    """A whole conversation, and the media that it shows, by their ids."""

    turns: tuple[Turn, ...]
    media: Mapping[str, MediaRecord]


class ConversationStore:
    """Conversations in the database; every method hides those of other tenants."""

    def __init__(self, database: Database, media_store: MediaStore) -> None:
        self._database = database
        self._media = media_store

    @asynccontextmanager
    async def answering(self, tenant: str, id_: str) -> AsyncIterator[None]:
        """Hold a conversation, so that nobody else asks in it, at this or another replica."""
        async with self._database.claim(f"{tenant} {id_}") as alone:
            if not alone:
                raise ConflictError(
                    f"conversation {id_}: another question is being answered; wait for it"
                )
            yield

    @uninterrupted
    async def add_turn(
        self,
        tenant: str,
        id_: str,
        number: int,
        turn: NewTurn,
        *,
        create: bool = False,
        system: str | None = None,
    ) -> None:
        """Store an unanswered turn, whose number in the conversation must be ``number``.

        With ``create`` the turn begins a new conversation, with this ``system`` message.
        """
        for part in turn.parts:
            if isinstance(part, StoredText):
                check_text(part.text, "message")
        check_text(system or "", "system")
        kinds = {p.media_id: p.type for p in turn.parts if isinstance(p, StoredMedium)}
        links = [{"conversation_id": id_, "number": number, "media_id": m} for m in kinds]
        row = {"conversation_id": id_, "number": number, "created_at": turn.created_at}
        row |= {"parts": [part.model_dump() for part in turn.parts]}
        row |= await asyncio.to_thread(_answer, turn)
        try:
            async with self._database.writing() as connection:
                if create:
                    await _create(connection, tenant, id_, turn.model, system)
                else:
                    await _CONVERSATIONS.one(connection, tenant, id_, read=False)
                next_ = await _last_number(connection, id_) + 1
                if number != next_:
                    raise ConflictError(
                        f"conversation {id_}: turn {number} was to be added, but the next one is "
                        f"{next_}; load the conversation again"
                    )
                if number == 1:
                    await _retitle(connection, id_, UNTITLED, title_of(turn.parts))
                await self._media.put(connection, tenant, turn.new_media, uploaded=False)
                await self._media.show(connection, tenant, kinds)
                await connection.execute(insert(turns).values(row))
                if links:
                    await connection.execute(insert(turn_media), links)
        except Exception:
            await self._media.collect([blob_id(tenant, new.sha256) for new in turn.new_media])
            raise

    @uninterrupted
    async def answer_turn(
        self, tenant: str, id_: str, number: int, turn: NewTurn, *, system: str | None = None
    ) -> None:
        """Answer a turn of :meth:`add_turn`; ``system`` replaces the old system message."""
        values = await asyncio.to_thread(_answer, turn)
        async with self._database.writing() as connection:
            await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            answered = await connection.execute(
                update(turns).where(_waiting(id_, number, turn)).values(values)
            )
            if not answered.rowcount:
                raise ConflictError(
                    f"conversation {id_}: turn {number} was taken back before it was answered"
                )
            changed = {"model": turn.model, "updated_at": now()}
            changed |= {} if system is None else {"system": system}
            await connection.execute(
                update(conversations).where(conversations.c.id == id_).values(**changed)
            )
            new = {medium.id for medium in turn.new_media}
            shown = [part.media_id for part in turn.parts if isinstance(part, StoredMedium)]
            reports = zip(shown, turn.reports, strict=True)
            await self._media.describe(connection, {m: r for m, r in reports if m in new})

    @uninterrupted
    async def take_back(self, tenant: str, id_: str, number: int, turn: NewTurn) -> None:
        """Undo :meth:`add_turn` of an unanswered turn, and the conversation that it began.

        Nothing happens if the turn does not exist any more.
        """
        async with self._database.writing() as connection:
            await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            shown = await _media_of(connection, id_, number)
            gone = await connection.execute(delete(turns).where(_waiting(id_, number, turn)))
            if not gone.rowcount:
                return
            if number == 1 and not await _last_number(connection, id_):
                # An older conversation that has lost all its turns stays.
                await connection.execute(
                    delete(conversations).where(
                        conversations.c.id == id_,
                        conversations.c.created_at >= turn.created_at,
                    )
                )
            await self._media.let_go(connection, shown)
            own = {new.id for new in turn.new_media}
            unused = await self._media.forget(connection, own, uploaded=False)
        await self._media.collect(unused)

    @uninterrupted
    async def load(self, tenant: str, id_: str) -> Conversation:
        async with self._database.reading() as connection:
            row = await _CONVERSATIONS.one(connection, tenant, id_)
            found = await connection.execute(
                select(turns).where(turns.c.conversation_id == id_).order_by(turns.c.number)
            )
            turns_ = tuple(Turn.model_validate(dict(row._mapping)) for row in found)
            shown = await self._media.shown_in(connection, id_)
        return Conversation(**row._mapping, turns=turns_, media={m.id: m for m in shown})

    def messages(self, conversation: Conversation) -> list[Message]:
        """The conversation as the assistant takes it; :func:`with_question` continues it."""
        system = conversation.system
        found = [] if system is None else [Message.system(system)]
        for turn in conversation.turns:
            parts: list[Part] = []
            for part in turn.parts:
                if isinstance(part, StoredText):
                    parts.append(TextPart(part.text))
                else:
                    record = conversation.media[part.media_id]
                    parts.append(MediaFile(record.kind, self._media.path(record), record.name))
            found = with_question(found, Message("user", tuple(parts)))
            if turn.finish_reason != "unanswered":
                found.append(Message.assistant(turn.answer))
        return found

    @uninterrupted
    async def list(
        self, tenant: str, *, query: str | None = None, limit: int, before: str | None = None
    ) -> tuple[ConversationInfo, ...]:
        """Up to ``limit`` conversations, the last one answered first, from behind ``before`` on.

        A ``query`` is searched for in titles, questions and answers.
        """
        wanted = []
        if query:
            check_text(query, "query")
            text = folded(query)
            said = exists().where(
                turns.c.conversation_id == conversations.c.id,
                turns.c.text_folded.contains(text, autoescape=True),
            )
            wanted = [or_(conversations.c.title_folded.contains(text, autoescape=True), said)]
        async with self._database.reading() as connection:
            rows = await _CONVERSATIONS.page(connection, tenant, limit, before, *wanted)
            return tuple(ConversationInfo(**row._mapping) for row in rows)

    @uninterrupted
    async def rename(self, tenant: str, id_: str, title: str) -> None:
        check_text(title, "title")
        if not title.strip() or len(title) > MAX_TITLE:
            raise RequestError(
                f"title: {len(title)} characters; it must have 1 to {MAX_TITLE}, not all spaces"
            )
        async with self._database.writing() as connection:
            await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            await connection.execute(
                update(conversations)
                .where(conversations.c.id == id_)
                .values(title=title, title_folded=folded(title))
            )

    @uninterrupted
    async def delete(self, tenant: str, id_: str) -> None:
        """Delete a conversation, and the media that came with it and are shown nowhere else."""
        async with self._database.writing() as connection:
            await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            shown = await _media_of(connection, id_)
            await connection.execute(delete(conversations).where(conversations.c.id == id_))
            unused = await self._media.forget(connection, shown, uploaded=False)
        await self._media.collect(unused)

    @uninterrupted
    async def truncate(self, tenant: str, id_: str, from_number: int) -> None:
        """Take a turn and all later turns back; the media that came with them stay for an hour."""
        async with self._database.writing() as connection:
            await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            if not 1 <= from_number <= await _last_number(connection, id_):
                raise NotFoundError(f"conversation {id_} has no turn {from_number}")
            if from_number == 1:
                # The first turn's words leave the title, unless the user chose the title.
                first = turns.c.conversation_id == id_, turns.c.number == 1
                row = (await connection.execute(select(turns).where(*first))).one()
                title = title_of(Turn.model_validate(dict(row._mapping)).parts)
                await _retitle(connection, id_, title, UNTITLED)
            shown = await _media_of(connection, id_, from_number)
            await connection.execute(
                delete(turns).where(turns.c.conversation_id == id_, turns.c.number >= from_number)
            )
            await self._media.let_go(connection, shown)


def with_question(messages: Sequence[Message], question: Message) -> list[Message]:
    """Messages with a question behind them.

    An unanswered question before it becomes its first part, because many chat templates want user
    and assistant to take turns.
    """
    if not messages or messages[-1].role != "user":
        return [*messages, question]
    parts = (*messages[-1].content, TextPart("\n"), *question.content)
    return [*messages[:-1], Message("user", parts)]


def title_of(parts: Sequence[StoredPart]) -> str:
    """The first words of a message, at most 60 characters, or the kinds of its media."""
    start = text_in(parts)[:MOST_TITLED]
    words = " ".join("".join(c if c.isprintable() else " " for c in start).split())
    if not words:
        return ", ".join(dict.fromkeys(part.type for part in parts if part.type != "text"))
    if len(words) <= 60:
        return words
    # At the end of the last word; a script without spaces is cut anywhere.
    return f"{words[:59].rsplit(' ', 1)[0]}…"


def text_in(parts: Sequence[StoredPart]) -> str:
    return " ".join(part.text for part in parts if isinstance(part, StoredText))


async def _create(
    connection: AsyncConnection, tenant: str, id_: str, model: str, system: str | None
) -> None:
    row = {"id": id_, "tenant": tenant, "system": system, "model": model}
    row |= {"title": UNTITLED, "title_folded": folded(UNTITLED)}
    created = now()
    try:
        await connection.execute(
            insert(conversations).values(**row, created_at=created, updated_at=created)
        )
    except IntegrityError as error:  # the id exists, perhaps as another tenant's
        raise NotFoundError(f"no conversation {id_!r}") from error


async def _retitle(connection: AsyncConnection, id_: str, old: str, new: str) -> None:
    await connection.execute(
        update(conversations)
        .where(conversations.c.id == id_, conversations.c.title == old)
        .values(title=new, title_folded=folded(new))
    )


def _answer(turn: NewTurn) -> dict[str, Any]:
    return {
        "answer": cleaned(turn.answer),
        "text_folded": folded(f"{text_in(turn.parts)}\n{cleaned(turn.answer)}"),
        "finish_reason": turn.finish_reason,
        "usage": None if turn.usage is None else turn.usage.model_dump(),
        "reports": [report_json(report) for report in turn.reports],
        "confidence": turn.confidence,
        "unsure": turn.unsure,
    }


def _waiting(id_: str, number: int, turn: NewTurn) -> Any:
    return and_(
        turns.c.conversation_id == id_,
        turns.c.number == number,
        turns.c.created_at == turn.created_at,
        turns.c.finish_reason == "unanswered",
    )


async def _last_number(connection: AsyncConnection, id_: str) -> int:
    last = select(func.max(turns.c.number)).where(turns.c.conversation_id == id_)
    return await connection.scalar(last) or 0


_CONVERSATIONS = Rows(
    conversations,
    select(*(c for c in conversations.c if c.name != "title_folded")),
    newest="updated_at",
)


async def _media_of(connection: AsyncConnection, id_: str, from_number: int = 1) -> set[str]:
    shown = select(turn_media.c.media_id).where(
        turn_media.c.conversation_id == id_, turn_media.c.number >= from_number
    )
    return set(await connection.scalars(shown))
