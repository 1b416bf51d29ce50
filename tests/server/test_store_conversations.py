"""Conversations: a turn is stored whole or not at all, in order, for its tenant alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mico_chat.engine import Usage
from mico_chat.errors import MicoError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message
from mico_server.errors import ConflictError, NotFoundError
from mico_server.store.conversations import (
    Conversation,
    ConversationStore,
    NewTurn,
    StoredMedium,
    title_of,
)
from mico_server.store.conversations import StoredPart as Part
from mico_server.store.conversations import StoredText as Text
from mico_server.store.database import Database
from mico_server.store.media import MediaStore
from mico_server.store.tables import media as media_table
from mico_server.store.tables import now
from tests.server.conftest import BOTH

pytestmark = pytest.mark.anyio


def said(question: str, answer: str = "Yes.", **changes: Any) -> NewTurn:
    arguments: dict[str, Any] = {"finish_reason": "stop", "model": "mini"} | changes
    return NewTurn([Text(text=question)], answer, **arguments)


async def showing(
    media: MediaStore, conversations: ConversationStore, *data: bytes, **where: Any
) -> tuple[str, list[str]]:
    async with media.work_folder() as folder:
        new = []
        for number, bytes_ in enumerate(data):
            folder.file(str(number)).write_bytes(bytes_)
            new.append(await media.prepare("image", folder.file(str(number)), f"{number}.jpg"))
        parts: list[Part] = [StoredMedium(type="image", media_id=medium.id) for medium in new]
        turn = NewTurn([*parts, Text(text="Which?")], "Both.", "stop", "mini", new_media=new)
        id_, _ = await conversations.add_turn("t", where.pop("id_", None), turn, **where)
    return id_, [medium.id for medium in new]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@BOTH
async def test_a_conversation_comes_back_as_it_was(
    media: MediaStore, conversations: ConversationStore
) -> None:
    async with media.work_folder() as folder:
        folder.file("0").write_bytes(b"cat")
        folder.file("1").write_bytes(b"purr")
        uploaded = await media.add("t", "image", folder.file("0"), "cat.jpg", ttl_s=60)
        new = await media.prepare("audio", folder.file("1"), "purr.ogg")
        parts: list[Part] = [
            Text(text="Is this "),
            StoredMedium(type="image", media_id=uploaded.id),
            StoredMedium(type="audio", media_id=new.id),
            Text(text="  the same?\n"),
        ]
        usage = Usage(prompt_tokens=9, completion_tokens=2, media_tokens=5)
        reports = [MediaReport(name="purr.ogg", kind="audio", seconds=float("inf"))]
        turn = NewTurn(parts, "Ja. 🐈 ", "length", "mini", usage, reports, [new])
        before = now()
        id_, number = await conversations.add_turn("t", None, turn, system="Be brief.")
    assert number == 1
    assert await conversations.add_turn("t", id_, said("Why?", "", model="big")) == (id_, 2)

    found = await conversations.load("t", id_)
    assert (found.id, found.tenant, found.title) == (id_, "t", "Is this the same?")
    assert (found.system, found.model) == ("Be brief.", "big")
    assert before < found.created_at < found.updated_at < now()
    first, second = found.turns
    assert (first.number, first.parts, first.answer) == (1, tuple(parts), "Ja. 🐈 ")
    assert (first.finish_reason, first.usage) == ("length", usage)
    assert [(report.name, report.seconds) for report in first.reports] == [("purr.ogg", None)]
    assert (second.number, second.answer, second.usage, second.reports) == (2, "", None, ())
    assert set(found.media) == {uploaded.id, new.id}

    sound = media.path(found.media[new.id])
    assert sound.read_bytes() == b"purr"
    image = media.path(uploaded)
    assert conversations.messages(found) == [
        Message.system("Be brief."),
        Message.user(
            "Is this ",
            MediaFile("image", image, "cat.jpg"),
            MediaFile("audio", sound, "purr.ogg"),
            "  the same?\n",
        ),
        Message.assistant("Ja. 🐈 "),
        Message.user("Why?"),
        Message.assistant(""),
    ]


async def test_anothers_conversation_is_as_none(conversations: ConversationStore) -> None:
    id_, _ = await conversations.add_turn("t", None, said("Hi"))
    ids = ["conv-" + "0" * 24, "", "conv-\0", "\ud800", "' OR 1=1 --"]
    for tenant, other in [("other", id_), *(("t", other) for other in ids)]:
        for call in (
            conversations.load(tenant, other),
            conversations.delete(tenant, other),
            conversations.rename(tenant, other, "x"),
            conversations.truncate(tenant, other, 1),
            conversations.add_turn(tenant, other, said("Hi")),
            conversations.list(tenant, limit=1, before=other),
        ):
            with pytest.raises(NotFoundError) as missing:
                await call
            assert str(missing.value) == f"no conversation {other!r}"
    assert await conversations.list("other", limit=9) == ()
    assert len((await conversations.load("t", id_)).turns) == 1


async def test_turns_that_are_refused_leave_nothing(
    media: MediaStore, conversations: ConversationStore, tmp_path: Path
) -> None:
    id_, (shown,) = await showing(media, conversations, b"1")
    async with media.work_folder() as folder:
        folder.file("0").write_bytes(b"secret")
        other = await media.add("other", "image", folder.file("0"), "x.jpg", ttl_s=60)
    before = files(tmp_path / "media")

    def of(*parts: Part) -> NewTurn:
        return NewTurn(parts, "A.", "stop", "mini")

    for turn, error, reason in (
        (of(StoredMedium(type="depth", media_id=shown)), RequestError, "kind image, but"),
        (of(StoredMedium(type="image", media_id=other.id)), NotFoundError, other.id),
    ):
        with pytest.raises(error, match=reason):
            await conversations.add_turn("t", id_, turn)
    with pytest.raises(MicoError):
        await showing(media, conversations, b"2", b"3", id_="conv-" + "0" * 24)
    assert files(tmp_path / "media") == before
    assert len((await conversations.load("t", id_)).turns) == 1


@BOTH
async def test_one_of_two_requests_continues(
    media: MediaStore, conversations: ConversationStore, tmp_path: Path
) -> None:
    id_, _ = await conversations.add_turn("t", None, said("Hi"), number=1)
    results = await asyncio.gather(
        *(showing(media, conversations, bytes([n]), id_=id_, number=2) for n in range(8)),
        return_exceptions=True,
    )
    lost = [result for result in results if isinstance(result, ConflictError)]
    assert len(lost) == 7
    assert "turn 2 was to be added, but the next one is 3" in str(lost[0])
    found = await conversations.load("t", id_)
    assert [turn.number for turn in found.turns] == [1, 2]
    assert len(files(tmp_path / "media")) == len(await media.list("t", limit=9)) == 1
    with pytest.raises(ConflictError):
        await conversations.add_turn("t", id_, said("Hi"), number=5)
    with pytest.raises(ConflictError):
        await conversations.add_turn("t", None, said("Hi"), number=2)
    assert len(await conversations.list("t", limit=9)) == 1


async def test_deleting_takes_what_nothing_else_shows(
    media: MediaStore, conversations: ConversationStore, tmp_path: Path
) -> None:
    one, (alone, shared) = await showing(media, conversations, b"alone", b"shared")
    async with media.work_folder() as folder:
        folder.file("0").write_bytes(b"upload")
        upload = await media.add("t", "image", folder.file("0"), "x.jpg", ttl_s=60)
    parts = [StoredMedium(type="image", media_id=id_) for id_ in (shared, upload.id)]
    two, _ = await conversations.add_turn("t", None, NewTurn(parts, "A.", "stop", "mini"))

    await conversations.delete("t", one)
    with pytest.raises(NotFoundError):
        await conversations.load("t", one)
    with pytest.raises(NotFoundError):
        await media.get("t", alone)
    assert conversations.messages(await conversations.load("t", two))
    await conversations.delete("t", two)
    assert await media.list("t", limit=9) == (upload,), "promised until it expires"
    assert files(tmp_path / "media") == [media.path(upload)]


@BOTH
@pytest.mark.parametrize("method", ["delete", "truncate"])
async def test_nothing_is_left_of_a_turn_that_comes_while_others_go(
    media: MediaStore,
    conversations: ConversationStore,
    database: Database,
    tmp_path: Path,
    method: str,
) -> None:
    async def one(number: int) -> None:
        id_, _ = await conversations.add_turn("t", None, said("Hi"))
        delete = method == "delete"
        go = conversations.delete("t", id_) if delete else conversations.truncate("t", id_, 1)
        come = showing(media, conversations, bytes([number]), id_=id_)
        await asyncio.gather(come, go, return_exceptions=True)

    await asyncio.gather(*(one(number) for number in range(12)))
    async with database.writing() as connection:
        await connection.execute(
            media_table.update()
            .where(media_table.c.expires_at.is_not(None))
            .values(expires_at=now())
        )
    await media.sweep()
    found = [
        await conversations.load("t", info.id) for info in await conversations.list("t", limit=20)
    ]
    shown = [record for conversation in found for record in conversation.media.values()]
    assert files(tmp_path / "media") == sorted(map(media.path, shown))


@BOTH
async def test_taking_turns_back(
    media: MediaStore, conversations: ConversationStore, database: Database
) -> None:
    id_, _ = await conversations.add_turn("t", None, said("One"))
    _, (shown,) = await showing(media, conversations, b"cat", id_=id_)
    await conversations.add_turn("t", id_, said("Three"))
    for number in (-1, 0, 4, 10**30):
        with pytest.raises(NotFoundError, match=f"no turn {number}"):
            await conversations.truncate("t", id_, number)

    await conversations.truncate("t", id_, 2)
    found = await conversations.load("t", id_)
    assert ([turn.number for turn in found.turns], found.media) == ([1], {})
    assert (await media.get("t", shown)).expires_at is not None, "not for ever"
    assert (await media.sweep()).records == 0, "but for a retry"

    turn = NewTurn([StoredMedium(type="image", media_id=shown)], "A dog.", "stop", "mini")
    assert await conversations.add_turn("t", id_, turn, number=2) == (id_, 2)
    assert (await media.get("t", shown)).expires_at is None

    await conversations.truncate("t", id_, 1)
    async with database.writing() as connection:
        await connection.execute(media_table.update().values(expires_at=now()))
    assert (await media.sweep()).records == 1
    assert (await conversations.load("t", id_)).turns == ()
    assert await conversations.add_turn("t", id_, said("Anew")) == (id_, 1)


async def test_a_title_follows_the_first_message_until_a_user_chooses_one(
    conversations: ConversationStore,
) -> None:
    id_, _ = await conversations.add_turn("t", None, said("a sheep"))
    for message, title in (("a goat", "a goat"), ("a cow", "Mine")):
        if title == "Mine":
            await conversations.rename("t", id_, title)
        await conversations.truncate("t", id_, 1)
        await conversations.add_turn("t", id_, said(message))
        await conversations.add_turn("t", id_, said("and then?"))
        assert [c.title for c in await conversations.list("t", limit=9)] == [title]
        assert len(await conversations.list("t", query=title, limit=9)) == 1
    await conversations.truncate("t", id_, 2)
    assert (await conversations.load("t", id_)).title == "Mine"


SEARCHES = [
    ("", "ABCD"),
    ("cat", "AB"),
    ("CAT", "AB"),
    ("ÄPFEL", "C"),
    ("a\u0308pfel", "C"),  # the same letter in two characters
    ("strasse", "C"),
    ("100%", "D"),
    ("%", "D"),
    ("_", "D"),
    ("\\", "D"),
    ("/", "D"),
    ("c_t", ""),
    ("c%t", ""),
    ("' OR 1=1 --", ""),
    ("renamed", "B"),
    ("second answer", "A"),
    ("first message here", "B"),  # still said, if not in the title
]


@BOTH
async def test_search(conversations: ConversationStore) -> None:
    texts = {
        "A": said("A Cat?"),
        "B": said("The first message here", "concatenated"),
        "C": said("Äpfel", "Straße"),
        "D": said("100% of a_b\\c/d"),
    }
    ids = {}
    for name, turn in texts.items():
        ids[(await conversations.add_turn("t", None, turn))[0]] = name
    await conversations.add_turn("other", None, said("cat Äpfel 100%"))
    by_name = {name: id_ for id_, name in ids.items()}
    await conversations.add_turn("t", by_name["A"], said("More", "The SECOND answer"))
    await conversations.rename("t", by_name["B"], "Renamed")
    newest = [ids[info.id] for info in await conversations.list("t", limit=9)]
    assert newest == ["A", "D", "C", "B"], "the last answered first"
    page = await conversations.list("t", limit=2)
    behind = await conversations.list("t", limit=9, before=page[-1].id)
    assert [ids[info.id] for info in behind] == newest[2:]
    for query, found in SEARCHES:
        listed = await conversations.list("t", query=query, limit=9)
        assert sorted(ids[info.id] for info in listed) == sorted(found), query


async def test_long_and_unstorable_queries(conversations: ConversationStore) -> None:
    for query in ("nul\0", "half \ud83d", "x" * 1001):
        with pytest.raises(RequestError, match="query"):
            await conversations.list("t", query=query, limit=1)
    assert await conversations.list("t", query="ﷺ%" * 500, limit=1) == (), "folding makes it grow"


@BOTH
@pytest.mark.parametrize("text", ["nul\0", "half \ud83d"])
async def test_text_that_cannot_be_stored(conversations: ConversationStore, text: str) -> None:
    id_, _ = await conversations.add_turn("t", None, said("Hi"))
    for call in (
        conversations.add_turn("t", id_, said(text)),
        conversations.add_turn("t", None, said("Hi"), system=text),
        conversations.rename("t", id_, text),
    ):
        with pytest.raises(RequestError, match=r"NUL character|surrogate pair"):
            await call
    await conversations.add_turn("t", id_, said("Hi", f"a{text}b"))
    answer = (await conversations.load("t", id_)).turns[-1].answer
    assert answer == f"a{text[:-1]}\ufffdb", "what the model said is not lost"


@BOTH
async def test_a_client_that_leaves_while_a_turn_is_stored(
    media: MediaStore, conversations: ConversationStore, tmp_path: Path
) -> None:
    for delay in range(10):
        task = asyncio.create_task(showing(media, conversations, bytes([delay])))
        await asyncio.sleep(delay / 1000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    found: list[Conversation] = [
        await conversations.load("t", info.id) for info in await conversations.list("t", limit=20)
    ]
    paths = [part.path for c in found for part in conversations.messages(c)[0].files]
    assert sorted(str(path) for path in paths) == [str(path) for path in files(tmp_path / "media")]


@pytest.mark.parametrize(
    ("text", "kinds", "title"),
    [
        ("  What\n is\tthis? ", (), "What is this?"),
        ("", ("image", "audio", "image"), "image, audio"),
        (" \n\u202e", ("video",), "video"),
        ("word " * 20, (), "word " * 10 + "word…"),
        ("字" * 100, (), "字" * 59 + "…"),
        ("a\u202eb", (), "a b"),
    ],
)
def test_titles(text: str, kinds: tuple[Kind, ...], title: str) -> None:
    media = [StoredMedium(type=kind, media_id="media-1") for kind in kinds]
    assert title_of([Text(text=text), *media]) == title
    assert len(title) <= 60
