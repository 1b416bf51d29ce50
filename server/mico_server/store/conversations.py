"""Stores conversations.

A turn is stored before it is answered, in one transaction: the message with its media, or nothing.
Its answer is added later, and what is said of it so far now and then. If the process is killed
meanwhile, the turn stays unanswered, with the part that was kept.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

from sqlalchemy import ColumnElement, and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.messages import Message, Part, TextPart
from mico_server.errors import ConflictError, NotFoundError
from mico_server.store.blobs import blob_id
from mico_server.store.conversation import (
    Conversation,
    ConversationInfo,
    NewTurn,
    StoredMedium,
    StoredPart,
    StoredText,
    Turn,
    leaf_near,
    path_to,
    text_in,
    title_of,
    turns_behind,
    with_question,
)
from mico_server.store.database import Database, Rows, uninterrupted
from mico_server.store.media import MediaStore, NewMedium, report_json
from mico_server.store.search import may_say
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

MOST_WORDS = 16  # of a search

UNTITLED = "New chat"
"""The title of a conversation whose first turn was taken back, until it has a first turn again."""


class ConversationStore:
    """Conversations in the database; every method hides those of other tenants."""

    def __init__(self, database: Database, media_store: MediaStore) -> None:
        self._database = database
        self._media = media_store

    @asynccontextmanager
    async def answering(
        self, tenant: str, id_: str, *, beside: bool = False
    ) -> AsyncIterator[None]:
        """Hold a conversation, so that nobody else asks in it, at this or another replica.

        One question more may be answered at the same time: ``beside`` another.
        """
        name = f"{tenant} {id_} beside" if beside else f"{tenant} {id_}"
        async with self._database.claim(name) as alone:
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
    ) -> int | None:
        """Store an unanswered turn, whose number in the conversation must be ``number``.

        It becomes the head, unless it is ``beside`` another; the former one is returned. With
        ``create`` it begins a new conversation, with this ``system`` message. A version of it
        without an answer and with the same question goes.
        """
        new = await _row(id_, number, turn, system)
        try:
            async with self._database.writing() as connection:
                return await self._add(connection, tenant, new, turn, create=create, system=system)
        except Exception:
            await self._media.collect([blob_id(tenant, one.sha256) for one in turn.new_media])
            raise

    async def _add(
        self,
        connection: AsyncConnection,
        tenant: str,
        new: Mapping[str, Any],
        turn: NewTurn,
        *,
        create: bool,
        system: str | None,
    ) -> int | None:
        """:meth:`add_turn` in a transaction; ``new`` is the row of the turn."""
        id_, number = new["conversation_id"], new["number"]
        if create:
            await _create(connection, tenant, id_, turn.model, system)
        row = await _CONVERSATIONS.one(connection, tenant, id_, read=False)
        parents = await _parents(connection, id_)
        next_ = max(row.last_number, *parents, 0) + 1
        if number != next_ or turn.parent not in {0, *parents}:
            raise ConflictError(
                f"conversation {id_}: turn {number} was to be added behind turn {turn.parent}, but "
                f"the next one is {next_}, and there are {sorted(parents)}; load the conversation "
                "again"
            )
        if turn.parent == 0:
            await _retitle_first(connection, id_, title_of(turn.parts))
        await connection.execute(insert(turns).values(new))
        await self._show(connection, tenant, id_, number, turn.parts, turn.new_media)
        if turn.beside is None:
            await self._drop_repeated(connection, id_, number, new)
        else:
            await _check_beside(connection, id_, number)
        stays = turn.beside is not None and turn.preferred != number
        await _changed(connection, id_, **({} if stays else {"head": number}))
        return cast("int | None", row.head)

    async def _show(
        self,
        connection: AsyncConnection,
        tenant: str,
        id_: str,
        number: int,
        parts: Sequence[StoredPart],
        new: Sequence[NewMedium],
    ) -> None:
        """A turn shows the media of these parts, of which the ``new`` ones are not stored yet."""
        await self._media.put(connection, tenant, new, uploaded=False)
        kinds = {p.media_id: p.type for p in parts if isinstance(p, StoredMedium)}
        await self._media.show(connection, tenant, kinds)
        links = [{"conversation_id": id_, "number": number, "media_id": m} for m in kinds]
        if links:
            await connection.execute(insert(turn_media), links)

    @uninterrupted
    async def reword(
        self, tenant: str, id_: str, number: int, turn: NewTurn, new: Sequence[NewMedium]
    ) -> bool:
        """Replace the question of a turn that waits for its answer; ``new`` media come with it.

        False if the turn does not exist any more.
        """
        row = await _row(id_, number, turn, None)
        words = {name: row[name] for name in ("parts", "text_folded")}
        try:
            async with self._database.writing() as connection:
                await _CONVERSATIONS.one(connection, tenant, id_, read=False)
                if turn.parent == 0:
                    await _retitle_first(connection, id_, title_of(turn.parts))
                waiting = update(turns).where(_waiting(id_, number, turn)).values(words)
                if not (await connection.execute(waiting)).rowcount:
                    return False
                shown = await _media_of(connection, id_, [number])
                own = and_(turn_media.c.conversation_id == id_, turn_media.c.number == number)
                await connection.execute(delete(turn_media).where(own))
                await self._show(connection, tenant, id_, number, turn.parts, new)
                await self._media.let_go(connection, shown)
                await _changed(connection, id_)
        except Exception:
            await self._media.collect([blob_id(tenant, one.sha256) for one in new])
            raise
        return True

    async def _drop_repeated(
        self, connection: AsyncConnection, id_: str, number: int, row: Mapping[str, Any]
    ) -> None:
        """Delete a question that got no word of an answer and is now asked again."""
        found = await connection.execute(
            select(turns.c.number, turns.c.parts).where(
                turns.c.conversation_id == id_,
                turns.c.parent == row["parent"],
                turns.c.number != number,
                turns.c.finish_reason == "unanswered",
                turns.c.answer == "",
                turns.c.beside.is_(None),  # such a one may still be answered
            )
        )
        parents = await _parents(connection, id_)
        same = [n for n, parts in found if parts == row["parts"] and n not in parents.values()]
        await connection.execute(delete(turns).where(_numbered(id_, same)))

    @uninterrupted
    async def answer_turn(
        self,
        tenant: str,
        id_: str,
        number: int,
        turn: NewTurn,
        *,
        system: str | None = None,
        former: str | None = None,
    ) -> None:
        """Answer a turn of :meth:`add_turn`.

        ``system`` replaces the system message ``former``; one that was set meanwhile stays.
        """
        values = await asyncio.to_thread(_answer, turn)
        async with self._database.writing() as connection:
            row = await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            answered = await connection.execute(
                update(turns).where(_waiting(id_, number, turn)).values(values)
            )
            if not answered.rowcount:
                raise ConflictError(
                    f"conversation {id_}: turn {number} was taken back before it was answered"
                )
            changed: dict[str, Any] = {"updated_at": now()}
            changed |= {"model": turn.model} if turn.beside is None else {}
            changed |= {} if system is None or row.system != former else {"system": system}
            await _changed(connection, id_, **changed)
            new = {medium.id for medium in turn.new_media}
            shown = [part.media_id for part in turn.parts if isinstance(part, StoredMedium)]
            reports = zip(shown, turn.reports, strict=True)
            await self._media.describe(connection, {m: r for m, r in reports if m in new})

    @uninterrupted
    async def answer_so_far(self, id_: str, number: int, turn: NewTurn, text: str) -> None:
        """Keep the part of an answer that exists, for the case that the process is killed."""
        async with self._database.writing() as connection:
            await connection.execute(
                update(turns).where(_waiting(id_, number, turn)).values(answer=cleaned(text))
            )

    @uninterrupted
    async def cut_answer(self, id_: str, number: int, turn: NewTurn, text: str) -> None:
        """Of an answer that :meth:`answer_turn` stored, keep only ``text``; nothing happens if the
        turn does not exist any more."""
        cut = replace(turn, answer=text, finish_reason="cancelled", confidence=None, unsure=None)
        values = await asyncio.to_thread(_answer, cut)
        async with self._database.writing() as connection:
            await connection.execute(update(turns).where(_same(id_, number, turn)).values(values))
            await _changed(connection, id_)

    @uninterrupted
    async def import_turns(
        self, tenant: str, id_: str, new: Sequence[NewTurn], system: str | None, **changes: Any
    ) -> None:
        """Store a whole new conversation of turns, numbered from 1, in one transaction.

        ``changes`` are those of :meth:`change`.
        """
        rows = [await _row(id_, number, turn, system) for number, turn in enumerate(new, 1)]
        async with self._database.writing() as connection:
            for row, turn in zip(rows, new, strict=True):
                first = row["number"] == 1
                await self._add(connection, tenant, row, turn, create=first, system=system)
            await self._change(connection, tenant, id_, **changes)

    @uninterrupted
    async def take_back(
        self, tenant: str, id_: str, number: int, turn: NewTurn, former: int | None = None
    ) -> None:
        """Undo :meth:`add_turn` of an unanswered turn, and the conversation that it began.

        The head is what it was ``former``ly, unless another one was chosen meanwhile. Nothing
        happens if the turn does not exist any more.
        """
        async with self._database.writing() as connection:
            row = await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            shown = await _media_of(connection, id_, [number])
            titled = await _titles(connection, id_, [number]) if turn.parent == 0 else []
            gone = await connection.execute(delete(turns).where(_waiting(id_, number, turn)))
            if not gone.rowcount:
                return
            parents = await _parents(connection, id_)
            await _untitle(connection, id_, titled, parents)
            if parents:
                heads = [one for one in (row.head, former) if one in parents]
                near = leaf_near(parents, turn.parent)
                await _changed(connection, id_, head=heads[0] if heads else near)
            else:
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
    async def load(self, tenant: str, id_: str, through: int | None = None) -> Conversation:
        """A conversation along the path to its head, or along the newest path ``through`` a turn.

        Raises:
            NotFoundError: there is no such conversation, or no such turn in it.
        """
        async with self._database.reading() as connection:
            row = await _CONVERSATIONS.one(connection, tenant, id_)
            found = await connection.execute(
                select(turns).where(turns.c.conversation_id == id_).order_by(turns.c.number)
            )
            all_ = [Turn.model_validate(dict(row._mapping)) for row in found]
            shown = await self._media.shown_in(connection, id_)
        tree = {turn.number: turn for turn in all_}
        if through is not None and through not in tree:
            raise NotFoundError(f"conversation {id_} has no turn {through}")
        parents = {turn.number: turn.parent for turn in all_}
        head = row.head if row.head in tree else max(tree, default=0)
        if through is not None and through not in path_to(parents, head):
            head = leaf_near(parents, through)
        turns_ = tuple(tree[number] for number in path_to(parents, head))
        media = {medium.id: medium for medium in shown}
        return Conversation(**row._mapping, turns=turns_, media=media, tree=tree)

    def messages(self, conversation: Conversation) -> list[Message]:
        """The conversation as the assistant takes it; :func:`with_question` continues it."""
        system = conversation.system
        found = [] if system is None else [Message.system(system)]
        for turn in conversation.turns:
            parts: list[Part] = []
            for part in turn.parts:
                if isinstance(part, StoredText):
                    parts.append(TextPart(part.text))
                elif part.media_id not in conversation.heard_media:
                    record = conversation.media[part.media_id]
                    medium = MediaFile(record.kind, self._media.path(record), record.name)
                    parts.append(replace(medium, pinned=record.id in conversation.pinned_media))
            found = with_question(found, Message("user", tuple(parts)))
            if turn.answer or turn.finish_reason != "unanswered":
                found.append(Message.assistant(turn.answer))
        return found

    @uninterrupted
    async def list(
        self,
        tenant: str,
        *,
        query: str | None = None,
        limit: int,
        before: str | None = None,
        pinned: bool | None = None,
        archived: bool | None = None,
    ) -> tuple[ConversationInfo, ...]:
        """Up to ``limit`` conversations, from behind ``before`` on: pinned ones first, and among
        both the last one answered first.

        Those that a ``query`` finds have each of its words, or ``"its phrases"``, in the title, a
        question, an answer, a file's name, or what was read or heard in a file.
        """
        check_text(query or "", "query")
        wanted = [] if pinned is None else [conversations.c.pinned == pinned]
        wanted += [] if archived is None else [conversations.c.archived == archived]
        for quoted, word in re.findall(r'"([^"]+)"|(\S+)', query or "")[:MOST_WORDS]:
            text = folded(quoted or word)
            said = self._said(tenant, text)
            wanted.append(or_(conversations.c.title_folded.contains(text, autoescape=True), said))
        async with self._database.reading() as connection:
            rows = await _CONVERSATIONS.page(connection, tenant, limit, before, *wanted)
            return tuple(ConversationInfo(**row._mapping) for row in rows)

    def _said(self, tenant: str, text: str) -> ColumnElement[bool]:
        """The conversations of a tenant in which a folded text was said."""
        says = turns.c.text_folded.contains(text, autoescape=True)
        indexed = may_say(text, sqlite=self._database.is_sqlite)
        if indexed is None:
            return exists().where(turns.c.conversation_id == conversations.c.id, says)
        own = conversations.alias()
        found = select(own.c.id).join(turns, turns.c.conversation_id == own.c.id)
        return conversations.c.id.in_(found.where(own.c.tenant == tenant, indexed, says))

    @uninterrupted
    async def change(
        self,
        tenant: str,
        id_: str,
        *,
        turn: int | None = None,
        pinned_media: Mapping[str, bool] | None = None,
        **values: str | bool | None,
    ) -> None:
        """Change the title, the ``system`` message, ``pinned`` or ``archived``.

        From now on the conversation is read along the newest path through ``turn``. Media are
        pinned, or unpinned, by their ids in all turns that show them.
        """
        async with self._database.writing() as connection:
            await self._change(connection, tenant, id_, turn, pinned_media, **values)

    async def _change(
        self,
        connection: AsyncConnection,
        tenant: str,
        id_: str,
        turn: int | None = None,
        pinned_media: Mapping[str, bool] | None = None,
        **values: str | bool | None,
    ) -> None:
        title = values.get("title")
        if isinstance(title, str):
            check_text(title, "title")
            if not title.strip() or len(title) > MAX_TITLE:
                raise RequestError(
                    f"title: {len(title)} characters; it must have 1 to {MAX_TITLE}, not all spaces"
                )
            values["title_folded"] = folded(title)
        check_text(str(values.get("system") or ""), "system")
        await _CONVERSATIONS.one(connection, tenant, id_, read=False)
        head = {}
        if turn is not None:
            parents = await _parents(connection, id_)
            if turn not in parents:
                raise NotFoundError(f"conversation {id_} has no turn {turn}")
            head["head"] = leaf_near(parents, turn)
        await _pin(connection, id_, pinned_media or {})
        await _changed(connection, id_, **values, **head)

    @uninterrupted
    async def prefer(self, tenant: str, id_: str, number: int, over: int) -> None:
        """Keep that a turn has a better answer than the one ``over`` that was answered beside it.

        The conversation goes on with the better one.
        """
        found = await self.load(tenant, id_, number)
        later = max(number, over)
        pair = found.tree.keys() >= {number, over} and {later, found.tree[later].beside}
        if pair != {number, over}:
            raise RequestError.at("over", f"turn {over} was not answered beside turn {number}")
        for one in (number, over):
            if not found.tree[one].answer or found.tree[one].finish_reason == "unanswered":
                raise ConflictError(f"conversation {id_}: turn {one} has no answer yet")
        async with self._database.writing() as connection:
            await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            kept = update(turns).where(_numbered(id_, [later]), turns.c.beside == min(number, over))
            parents = await _parents(connection, id_)
            changed = await connection.execute(kept.values(preferred=number))
            if not changed.rowcount or number not in parents:
                raise ConflictError(f"conversation {id_} was changed meanwhile; load it again")
            model = found.tree[number].model or found.model
            await _changed(connection, id_, head=leaf_near(parents, number), model=model)

    @uninterrupted
    async def with_preferences(self, tenant: str) -> Sequence[str]:
        """The ids of the conversations with a preference, the oldest first."""
        query = select(conversations.c.id).where(
            conversations.c.tenant == tenant,
            exists().where(
                turns.c.conversation_id == conversations.c.id, turns.c.preferred.is_not(None)
            ),
        )
        ordered = query.order_by(conversations.c.created_at, conversations.c.id)
        async with self._database.reading() as connection:
            return (await connection.scalars(ordered)).all()

    @uninterrupted
    async def state(self, tenant: str) -> str:
        """A text that is another one after each change of the tenant's conversations."""
        count = select(
            func.count(), func.coalesce(func.sum(conversations.c.revision + 1), 0)
        ).where(conversations.c.tenant == tenant)
        newest = select(func.max(conversations.c.created_at)).where(
            conversations.c.tenant == tenant
        )
        async with self._database.reading() as connection:
            total, changes = (await connection.execute(count)).one()
            latest = await connection.scalar(newest)
        return f"{total}-{changes}-{latest.timestamp() if latest else 0:.6f}"

    @uninterrupted
    async def delete(self, tenant: str, id_: str) -> None:
        """Delete a conversation, and the media that came with it and are shown nowhere else."""
        async with self._database.writing() as connection:
            await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            shown = await _media_of(connection, id_, await _parents(connection, id_))
            await connection.execute(delete(conversations).where(conversations.c.id == id_))
            unused = await self._media.forget(connection, shown, uploaded=False)
        await self._media.collect(unused)

    @uninterrupted
    async def delete_turns(
        self, tenant: str, id_: str, number: int, expected: int | None = None
    ) -> None:
        """Delete a turn and all that follow it; the media that came with them stay for an hour.

        Raises:
            ConflictError: that are not as many turns as ``expected``.
        """
        async with self._database.writing() as connection:
            row = await _CONVERSATIONS.one(connection, tenant, id_, read=False)
            parents = await _parents(connection, id_)
            if number not in parents:
                raise NotFoundError(f"conversation {id_} has no turn {number}")
            gone = {number, *turns_behind(parents, number)}
            if expected is not None and len(gone) != expected:
                raise ConflictError(
                    f"conversation {id_}: {len(gone)} turns would go, and not {expected}: it was "
                    "changed meanwhile; load the conversation again"
                )
            left = {child: parent for child, parent in parents.items() if child not in gone}
            head = row.head if row.head in left else leaf_near(left, parents[number])
            if parents[number] == 0:
                await _untitle(connection, id_, await _titles(connection, id_, [number]), left)
            shown = await _media_of(connection, id_, gone)
            await connection.execute(delete(turns).where(_numbered(id_, gone)))
            last = max(row.last_number, *parents)
            await _changed(connection, id_, head=head or None, last_number=last)
            await self._media.let_go(connection, shown)


async def _row(id_: str, number: int, turn: NewTurn, system: str | None) -> dict[str, Any]:
    """A turn as the database has it; its texts and the ``system`` message are checked."""
    for part in turn.parts:
        if isinstance(part, StoredText):
            check_text(part.text, "message")
    check_text(system or "", "system")
    row = {"conversation_id": id_, "number": number, "created_at": turn.created_at}
    row |= {"parts": [part.model_dump() for part in turn.parts], "parent": turn.parent}
    row |= {"model": turn.model, "beside": turn.beside, "preferred": turn.preferred}
    return row | await asyncio.to_thread(_answer, turn)


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


async def _changed(connection: AsyncConnection, id_: str, **values: Any) -> None:
    """Change a conversation, so that :meth:`ConversationStore.state` tells."""
    values["revision"] = conversations.c.revision + 1
    await connection.execute(
        update(conversations).where(conversations.c.id == id_).values(**values)
    )


async def _pin(connection: AsyncConnection, id_: str, pinned: Mapping[str, bool]) -> None:
    if not pinned:
        return
    all_ = select(turns.c.number, turns.c.parts).where(turns.c.conversation_id == id_)
    found = (await connection.execute(all_)).all()
    shown = {part.get("media_id") for row in found for part in row.parts}
    for wrong in sorted(pinned.keys() - shown):
        raise NotFoundError(f"conversation {id_} shows no medium {wrong!r}")
    for number, old in found:
        own = ({"pinned": pinned[m]} if (m := p.get("media_id")) in pinned else {} for p in old)
        new = [{**part, **change} for part, change in zip(old, own, strict=True)]
        if new != old:
            change = update(turns).where(_numbered(id_, [number])).values(parts=new)
            await connection.execute(change)


async def _retitle(connection: AsyncConnection, id_: str, old: Collection[str], new: str) -> None:
    await connection.execute(
        update(conversations)
        .where(conversations.c.id == id_, conversations.c.title.in_(old))
        .values(title=new, title_folded=folded(new))
    )


async def _retitle_first(connection: AsyncConnection, id_: str, title: str) -> None:
    """A title that no user chose becomes that of the newest first question."""
    parents = await _parents(connection, id_)
    firsts = await _titles(connection, id_, [n for n, parent in parents.items() if parent == 0])
    await _retitle(connection, id_, [UNTITLED, *firsts], title)


async def _untitle(
    connection: AsyncConnection, id_: str, gone: Collection[str], left: Mapping[int, int]
) -> None:
    """The words of a first turn that goes leave the title, unless the user chose the title."""
    others = await _titles(connection, id_, [n for n, parent in left.items() if parent == 0])
    await _retitle(connection, id_, gone, others[-1] if others else UNTITLED)


async def _titles(connection: AsyncConnection, id_: str, numbers: Collection[int]) -> list[str]:
    """The titles that these turns give a conversation."""
    rows = select(turns).where(_numbered(id_, numbers)).order_by(turns.c.number)
    found = await connection.execute(rows)
    return [title_of(Turn.model_validate(dict(row._mapping)).parts) for row in found]


def _answer(turn: NewTurn) -> dict[str, Any]:
    texts = [text_in(turn.parts), turn.answer]
    for report in turn.reports:
        texts += [report.name, *(one.text for one in report.written or ())]
        texts += [one.text for one in report.spoken or ()]
    return {
        "answer": cleaned(turn.answer),
        "text_folded": folded(cleaned("\n".join(texts))),
        "finish_reason": turn.finish_reason,
        "usage": None if turn.usage is None else turn.usage.model_dump(),
        "reports": [report_json(report) for report in turn.reports],
        "confidence": turn.confidence,
        "unsure": turn.unsure,
    }


def _same(id_: str, number: int, turn: NewTurn) -> Any:
    return and_(_numbered(id_, [number]), turns.c.created_at == turn.created_at)


def _waiting(id_: str, number: int, turn: NewTurn) -> Any:
    return and_(_same(id_, number, turn), turns.c.finish_reason == "unanswered")


_MARKS = dict.fromkeys(("pinned", "heard"))
"""What two turns that ask the same may mark differently."""


async def _check_beside(connection: AsyncConnection, id_: str, number: int) -> None:
    """Refuse a turn that asks something else than the one beside it, or somewhere else."""
    own, other = turns.alias(), turns.alias()
    pair = and_(other.c.conversation_id == own.c.conversation_id, other.c.number == own.c.beside)
    pair &= other.c.number < own.c.number
    asked = select(own.c.parts, other.c.parts, own.c.parent, other.c.parent).join(other, pair)
    found = await connection.execute(
        asked.where(own.c.conversation_id == id_, own.c.number == number)
    )
    row = found.one_or_none()
    asked_here = [[{**part, **_MARKS} for part in parts] for parts in row[:2]] if row else []
    if row is None or asked_here[0] != asked_here[1] or row[2] != row[3]:
        raise RequestError.at(
            "beside", "that turn asks something else; send its message, and its media by their ids"
        )


def _numbered(id_: str, numbers: Collection[int]) -> Any:
    return and_(turns.c.conversation_id == id_, turns.c.number.in_(numbers))


async def _parents(connection: AsyncConnection, id_: str) -> dict[int, int]:
    """The parent of each turn of a conversation, the oldest turn first."""
    rows = select(turns.c.number, turns.c.parent).where(turns.c.conversation_id == id_)
    found = await connection.execute(rows.order_by(turns.c.number))
    return {row.number: row.parent for row in found}


_CONVERSATIONS = Rows(
    conversations,
    select(*(c for c in conversations.c if c.name != "title_folded")),
    order=("pinned", "updated_at"),
)


async def _media_of(connection: AsyncConnection, id_: str, numbers: Collection[int]) -> set[str]:
    shown = select(turn_media.c.media_id).where(
        turn_media.c.conversation_id == id_, turn_media.c.number.in_(numbers)
    )
    return set(await connection.scalars(shown))
