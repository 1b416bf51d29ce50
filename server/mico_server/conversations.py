"""Conversations that are kept: turns of a user's message and its answer.

A turn is stored before it is answered, in one transaction: the message and the media that came
with it, or nothing. Its answer is added when that has ended; a process that is killed meanwhile
leaves a turn that is unanswered. Turns are numbered from 1; whoever continues a conversation can
say which number is expected, and hears of it when another request was faster.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from sqlalchemy import Row, and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message, Part, TextPart
from mico_chat.wire import TurnEnd, Usage
from mico_server.blobs import blob_id
from mico_server.database import Database, uninterrupted
from mico_server.errors import ConflictError, NotFoundError
from mico_server.media_store import MediaRecord, MediaStore, NewMedium, report_json
from mico_server.tables import behind, conversations, is_id, new_id, now, turn_media, turns
from mico_server.texts import check_text, cleaned, folded, title_of

MAX_TITLE = 200
MAX_QUERY = 1000
"""Characters of a title and of a search."""

UNTITLED = "New chat"
"""The title of a conversation whose first turn was taken back, until another one is first."""


class StoredText(BaseModel):
    """A run of text of the user's message."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text"] = "text"
    text: str


class StoredMedium(BaseModel):
    """A medium of the user's message; ``type`` is its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Kind
    media_id: str


StoredPart: TypeAlias = Annotated[StoredText | StoredMedium, Field(discriminator="type")]
_PARTS: TypeAdapter[tuple[StoredPart, ...]] = TypeAdapter(tuple[StoredPart, ...])
_REPORTS: TypeAdapter[tuple[MediaReport, ...]] = TypeAdapter(tuple[MediaReport, ...])


@dataclass(frozen=True)
class NewTurn:
    """A turn to be stored. ``new_media`` are those of ``parts`` that are not stored yet.

    ``reports`` has one for each medium that the answer was given for; ``model`` gave it. By
    ``created_at`` a turn is told from another that has taken its number.
    """

    parts: Sequence[StoredText | StoredMedium]
    answer: str
    finish_reason: TurnEnd
    model: str
    usage: Usage | None = None
    reports: Sequence[MediaReport] = ()
    new_media: Sequence[NewMedium] = ()
    created_at: datetime = field(default_factory=now)


@dataclass(frozen=True)
class Turn:
    """A stored turn, the ``number``-th of its conversation, from 1."""

    number: int
    parts: tuple[StoredText | StoredMedium, ...]
    answer: str
    finish_reason: TurnEnd
    usage: Usage | None
    reports: tuple[MediaReport, ...]
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
    """A whole conversation, and the media it shows by their ids."""

    turns: tuple[Turn, ...]
    media: Mapping[str, MediaRecord]


class ConversationStore:
    """Conversations in the database, each seen by its tenant alone."""

    def __init__(self, database: Database, media_store: MediaStore) -> None:
        self._database = database
        self._media = media_store

    @uninterrupted
    async def add_turn(
        self,
        tenant: str,
        conversation_id: str | None,
        turn: NewTurn,
        *,
        system: str | None = None,
        number: int | None = None,
        new_id: str | None = None,
    ) -> tuple[str, int]:
        """Store a turn of a conversation, or (None) of a new one; its id and the turn's number.

        ``new_id`` is for the new one, if it was told already (:func:`new_conversation_id`).
        ``system`` is the conversation's system message from now on; None leaves it as it is.
        ``number`` is the one that the turn must get. A turn that is unanswered changes nothing of
        a conversation that there is: its answer does (:meth:`answer_turn`).

        Raises:
            RequestError: for text that cannot be stored, an empty message, or a medium of another
                kind than its part says.
            NotFoundError: for a conversation or medium that the tenant does not have, and for
                a ``new_id`` that another has taken.
            ConflictError: if the turn would get another number; nothing is stored then.
        """
        _check(turn, system)
        try:
            async with self._database.writing() as connection:
                if conversation_id is None:
                    id_, next_ = await _create(connection, tenant, turn, system, new_id), 1
                else:
                    id_ = conversation_id
                    next_ = await _continue(connection, tenant, id_, turn, system)
                if number is not None and number != next_:
                    raise ConflictError(
                        f"conversation {id_}: turn {number} was to be added, but the next one is "
                        f"{next_}; load the conversation again"
                    )
                if next_ == 1:
                    await _take_title(connection, id_, turn)
                await self._insert(connection, tenant, id_, next_, turn)
        except Exception:
            await self._media.collect([blob_id(tenant, new.sha256) for new in turn.new_media])
            raise
        return id_, next_

    @asynccontextmanager
    async def answering(self, tenant: str, id_: str) -> AsyncIterator[None]:
        """Hold a conversation, so that nobody else asks in it, at another replica either.

        Raises:
            ConflictError: while another holds it.
        """
        async with self._database.claim(f"{tenant} {id_}") as alone:
            if not alone:
                raise ConflictError(
                    f"conversation {id_}: another question is being answered; wait for it"
                )
            yield

    @uninterrupted
    async def answer_turn(
        self, tenant: str, id_: str, number: int, turn: NewTurn, *, system: str | None = None
    ) -> None:
        """Add the answer to a turn that was stored without one (the same ``created_at``).

        Raises:
            NotFoundError: as :meth:`load`.
            ConflictError: if the turn was taken back meanwhile.
        """
        async with self._database.writing() as connection:
            await _one(connection, tenant, id_, lock=True)
            answered = await connection.execute(
                update(turns).where(_waiting(id_, number, turn)).values(_answer(turn))
            )
            if not answered.rowcount:
                raise ConflictError(
                    f"conversation {id_}: turn {number} was taken back before it was answered"
                )
            await connection.execute(
                update(conversations)
                .where(conversations.c.id == id_)
                .values(_changes(turn, system))
            )
            # The last reports are those of the media that this turn shows.
            shown = [part.media_id for part in turn.parts if isinstance(part, StoredMedium)]
            await self._media.describe(
                connection,
                {
                    media_id: report
                    for media_id, report in zip(shown, turn.reports, strict=True)
                    if media_id in {new.id for new in turn.new_media}
                },
            )

    @uninterrupted
    async def take_back(self, tenant: str, id_: str, number: int, turn: NewTurn) -> None:
        """Undo :meth:`add_turn` of a turn that is unanswered, and of a conversation it began.

        Nothing happens to a turn that is not there any more.

        Raises:
            NotFoundError: as :meth:`load`.
        """
        async with self._database.writing() as connection:
            await _one(connection, tenant, id_, lock=True)
            shown = await _media_of(connection, id_, number)
            gone = await connection.execute(delete(turns).where(_waiting(id_, number, turn)))
            if not gone.rowcount:
                return
            if number == 1 and not await _last_number(connection, id_):
                # One that was there before, and has lost all its turns, stays.
                await connection.execute(
                    delete(conversations).where(
                        conversations.c.id == id_,
                        conversations.c.created_at >= turn.created_at,
                    )
                )
            own = {new.id for new in turn.new_media}
            await self._media.let_go(connection, shown - own)
            unused = await self._media.forget(connection, own, uploaded=False)
        await self._media.collect(unused)

    @uninterrupted
    async def load(self, tenant: str, id_: str) -> Conversation:
        """A conversation with its turns and its media.

        Raises:
            NotFoundError: if there is none of this id, or another tenant's.
        """
        async with self._database.reading() as connection:
            row = await _one(connection, tenant, id_)
            found = await connection.execute(
                select(turns).where(turns.c.conversation_id == id_).order_by(turns.c.number)
            )
            turns_ = tuple(_turn(turn) for turn in found)
            shown = await self._media.shown_in(connection, id_)
        return Conversation(**row._mapping, turns=turns_, media={m.id: m for m in shown})

    def messages(self, conversation: Conversation) -> list[Message]:
        """The conversation as the assistant takes it, to be continued with :func:`asked_in`.

        Raises:
            GoneError: if a medium has vanished from the disk.
        """
        system = conversation.system
        found = [] if system is None else [Message.system(system)]
        for turn in conversation.turns:
            asked = Message("user", tuple(self._part(conversation, p) for p in turn.parts))
            found = asked_in(found, asked)
            if turn.finish_reason != "unanswered":
                found.append(Message.assistant(turn.answer))
        return found

    @uninterrupted
    async def list(
        self, tenant: str, *, query: str | None = None, limit: int, before: str | None = None
    ) -> tuple[ConversationInfo, ...]:
        """Up to ``limit`` conversations, the last one answered first; those that come behind the
        conversation ``before``; those with ``query`` in their title, questions or answers.

        Raises:
            NotFoundError: if there is no conversation ``before``.
            RequestError: for a query that is too long or has unprintable characters.
        """
        wanted = _infos().where(conversations.c.tenant == tenant)
        if query:
            check_text(query, "query")
            if len(query) > MAX_QUERY:
                raise RequestError(f"query: {len(query)} characters, at most {MAX_QUERY}")
            text = folded(query)
            said = exists().where(
                turns.c.conversation_id == conversations.c.id,
                turns.c.text_folded.contains(text, autoescape=True),
            )
            wanted = wanted.where(
                or_(conversations.c.title_folded.contains(text, autoescape=True), said)
            )
        newest_first = conversations.c.updated_at.desc(), conversations.c.id.desc()
        wanted = wanted.order_by(*newest_first).limit(limit)
        async with self._database.reading() as connection:
            if before is not None:
                last = await _one(connection, tenant, before)
                wanted = wanted.where(behind(conversations, "updated_at", last))
            rows = await connection.execute(wanted)
            return tuple(ConversationInfo(**row._mapping) for row in rows)

    @uninterrupted
    async def rename(self, tenant: str, id_: str, title: str) -> None:
        """Give a conversation another title.

        Raises:
            NotFoundError: as :meth:`load`.
            RequestError: for a title that is empty, too long or cannot be stored.
        """
        check_text(title, "title")
        if not title.strip() or len(title) > MAX_TITLE:
            raise RequestError(
                f"title: {len(title)} characters; it must have 1 to {MAX_TITLE}, not all spaces"
            )
        async with self._database.writing() as connection:
            await _one(connection, tenant, id_, lock=True)
            await connection.execute(
                update(conversations)
                .where(conversations.c.id == id_)
                .values(title=title, title_folded=folded(title))
            )

    @uninterrupted
    async def delete(self, tenant: str, id_: str) -> None:
        """Delete a conversation, and the media that came with its turns and nothing else shows.

        Raises:
            NotFoundError: as :meth:`load`.
        """
        async with self._database.writing() as connection:
            await _one(connection, tenant, id_, lock=True)
            shown = await _media_of(connection, id_)
            await connection.execute(delete(conversations).where(conversations.c.id == id_))
            unused = await self._media.forget(connection, shown, uploaded=False)
        await self._media.collect(unused)

    @uninterrupted
    async def truncate(self, tenant: str, id_: str, from_number: int) -> None:
        """Take a turn and all after it back, to ask it again or otherwise.

        The media that came with them stay for an hour, so that they can be shown again.

        Raises:
            NotFoundError: as :meth:`load`, and if there is no such turn.
        """
        async with self._database.writing() as connection:
            await _one(connection, tenant, id_, lock=True)
            if not 1 <= from_number <= await _last_number(connection, id_):
                raise NotFoundError(f"conversation {id_} has no turn {from_number}")
            if from_number == 1:
                await _free_title(connection, id_)
            shown = await _media_of(connection, id_, from_number)
            await connection.execute(
                delete(turns).where(turns.c.conversation_id == id_, turns.c.number >= from_number)
            )
            await self._media.let_go(connection, shown)

    async def _insert(
        self, connection: AsyncConnection, tenant: str, id_: str, number: int, turn: NewTurn
    ) -> None:
        kinds = {p.media_id: p.type for p in turn.parts if isinstance(p, StoredMedium)}
        await self._media.put(connection, tenant, turn.new_media, uploaded=False)
        await self._media.show(connection, tenant, kinds)
        await connection.execute(
            insert(turns).values(
                conversation_id=id_,
                number=number,
                parts=[part.model_dump() for part in turn.parts],
                created_at=turn.created_at,
                **_answer(turn),
            )
        )
        if kinds:
            links = [{"conversation_id": id_, "number": number, "media_id": m} for m in kinds]
            await connection.execute(insert(turn_media), links)

    def _part(self, conversation: Conversation, part: StoredText | StoredMedium) -> Part:
        if isinstance(part, StoredText):
            return TextPart(part.text)
        record = conversation.media[part.media_id]
        return MediaFile(record.kind, self._media.path(record), record.name)


def asked_in(said: Sequence[Message], question: Message) -> list[Message]:
    """What was said with a question behind it.

    A question that was not answered becomes the first part of it: many chat templates want user
    and assistant to take turns, and the user sees both.
    """
    if not said or said[-1].role != "user":
        return [*said, question]
    parts = (*said[-1].content, TextPart("\n"), *question.content)
    return [*said[:-1], Message("user", parts)]


def new_conversation_id() -> str:
    """An id for a conversation that is about to be stored."""
    return new_id("conv")


def _check(turn: NewTurn, system: str | None) -> None:
    if not turn.parts:
        raise RequestError("message: it is empty; expected text or media")
    for part in turn.parts:
        if isinstance(part, StoredText):
            check_text(part.text, "message")
    if system is not None:
        check_text(system, "system")
    shown = {part.media_id for part in turn.parts if isinstance(part, StoredMedium)}
    lost = {new.id for new in turn.new_media} - shown
    if lost:
        raise ValueError(f"{len(lost)} new media that no part of the message shows")


def _text(parts: Sequence[StoredText | StoredMedium]) -> str:
    return " ".join(part.text for part in parts if isinstance(part, StoredText))


def _title(parts: Sequence[StoredText | StoredMedium]) -> str:
    kinds = tuple(part.type for part in parts if isinstance(part, StoredMedium))
    return title_of(_text(parts), kinds)


async def _create(
    connection: AsyncConnection,
    tenant: str,
    turn: NewTurn,
    system: str | None,
    told_id: str | None,
) -> str:
    id_, created = told_id or new_conversation_id(), now()
    title = _title(turn.parts)
    try:
        await connection.execute(
            insert(conversations).values(
                id=id_,
                tenant=tenant,
                title=title,
                title_folded=folded(title),
                system=system,
                model=turn.model,
                created_at=created,
                updated_at=created,
            )
        )
    except IntegrityError as error:  # the id is taken, by whoever it may be
        raise _no_conversation(id_) from error
    return id_


async def _free_title(connection: AsyncConnection, id_: str) -> None:
    """Before the first turn goes: its words leave the title, unless a user chose the title."""
    first = select(turns.c.parts).where(turns.c.conversation_id == id_, turns.c.number == 1)
    title = _title(_PARTS.validate_python(await connection.scalar(first)))
    await _retitle(connection, id_, title, UNTITLED)


async def _take_title(connection: AsyncConnection, id_: str, turn: NewTurn) -> None:
    """Where a first turn was taken back, the new one gives the title."""
    await _retitle(connection, id_, UNTITLED, _title(turn.parts))


async def _retitle(connection: AsyncConnection, id_: str, old: str, new: str) -> None:
    await connection.execute(
        update(conversations)
        .where(conversations.c.id == id_, conversations.c.title == old)
        .values(title=new, title_folded=folded(new))
    )


async def _continue(
    connection: AsyncConnection, tenant: str, id_: str, turn: NewTurn, system: str | None
) -> int:
    """Lock a conversation and change what a turn changes of it; the turn's number."""
    await _one(connection, tenant, id_, lock=True)
    if turn.finish_reason != "unanswered":
        await connection.execute(
            update(conversations).where(conversations.c.id == id_).values(_changes(turn, system))
        )
    return await _last_number(connection, id_) + 1


def _changes(turn: NewTurn, system: str | None) -> dict[str, Any]:
    """What an answered turn changes of its conversation."""
    changed: dict[str, Any] = {"model": turn.model, "updated_at": now()}
    return changed if system is None else {**changed, "system": system}


def _answer(turn: NewTurn) -> dict[str, Any]:
    """The columns that an answer fills."""
    return {
        "answer": cleaned(turn.answer),
        "text_folded": folded(f"{_text(turn.parts)}\n{cleaned(turn.answer)}"),
        "finish_reason": turn.finish_reason,
        "usage": None if turn.usage is None else turn.usage.model_dump(),
        "reports": [report_json(report) for report in turn.reports],
    }


def _waiting(id_: str, number: int, turn: NewTurn) -> Any:
    """Which row a turn is that waits for its answer."""
    return and_(
        turns.c.conversation_id == id_,
        turns.c.number == number,
        turns.c.created_at == turn.created_at,
        turns.c.finish_reason == "unanswered",
    )


async def _last_number(connection: AsyncConnection, id_: str) -> int:
    last = select(func.max(turns.c.number)).where(turns.c.conversation_id == id_)
    return await connection.scalar(last) or 0


def _infos() -> Any:
    return select(*(c for c in conversations.c if c.name != "title_folded"))


async def _one(
    connection: AsyncConnection, tenant: str, id_: str, *, lock: bool = False
) -> Row[Any]:
    if not is_id("conv", id_):
        raise _no_conversation(id_)
    query = _infos().where(conversations.c.tenant == tenant, conversations.c.id == id_)
    row = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
    if row is None:
        raise _no_conversation(id_)
    return row


def _no_conversation(id_: str) -> NotFoundError:
    return NotFoundError(f"no conversation {id_!r}")


async def _media_of(connection: AsyncConnection, id_: str, from_number: int = 1) -> set[str]:
    shown = select(turn_media.c.media_id).where(
        turn_media.c.conversation_id == id_, turn_media.c.number >= from_number
    )
    return set(await connection.scalars(shown))


def _turn(row: Row[Any]) -> Turn:
    return Turn(
        number=row.number,
        parts=_PARTS.validate_python(row.parts),
        answer=row.answer,
        finish_reason=row.finish_reason,
        usage=None if row.usage is None else Usage.model_validate(row.usage),
        reports=_REPORTS.validate_python(row.reports),
        created_at=row.created_at,
    )
