"""Conversations: a turn is stored whole or not at all, in order, for its tenant alone."""

import asyncio
from dataclasses import replace

import pytest

from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport, SpokenText, WrittenText
from mico_chat.messages import Message
from mico_chat.wire import Usage
from mico_server.errors import ConflictError, NotFoundError
from mico_server.store.conversation import (
    NewTurn,
    StoredMedium,
    StoredPart,
    StoredText,
    title_of,
)
from mico_server.store.tables import new_id, now
from tests.server.conftest import BOTH
from tests.server.support.stored import Stores

pytestmark = pytest.mark.anyio


@BOTH
async def test_a_conversation_comes_back_as_it_was(stores: Stores) -> None:
    media, conversations = stores.media, stores.conversations
    uploaded = await stores.add(b"cat")
    id_ = new_id("conv")
    async with media.work_folder() as folder:
        folder.file("1").write_bytes(b"purr")
        new = await media.prepare("audio", folder.file("1"), "purr.ogg")
        parts: list[StoredPart] = [
            StoredText(text="Is this "),
            StoredMedium(type="image", media_id=uploaded.id),
            StoredMedium(type="audio", media_id=new.id),
            StoredText(text="  the same?\n"),
        ]
        turn = NewTurn(parts, "mini", new_media=[new])
        before = now()
        await conversations.add_turn("t", id_, 1, turn, create=True, system="Be brief.")
    usage = Usage(prompt_tokens=9, completion_tokens=2, media_tokens=5)
    reports = [
        MediaReport(name="cat.jpg", kind="image"),
        MediaReport(name="purr.ogg", kind="audio", seconds=float("inf")),
    ]
    ended = replace(
        turn, answer="Ja. 🐈 ", finish_reason="length", model="big", usage=usage, reports=reports
    )
    await conversations.answer_turn("t", id_, 1, ended)
    await stores.say("Why?", "", id_=id_, system="Be kind.")

    found = await stores.load(id_)
    assert (found.id, found.tenant, found.title) == (id_, "t", "Is this the same?")
    assert (found.system, found.model) == ("Be kind.", "mini"), "those of the last answer"
    assert before < found.created_at < found.updated_at < now()
    first, second = found.turns
    assert (first.number, first.parts, first.answer) == (1, tuple(parts), "Ja. 🐈 ")
    assert (first.finish_reason, first.usage) == ("length", usage)
    assert [report.seconds for report in first.reports] == [None, None], "no JSON has infinity"
    assert (second.number, second.answer, second.usage, second.reports) == (2, "", None, ())
    assert set(found.media) == {uploaded.id, new.id}

    sound, image = media.path(found.media[new.id]), media.path(uploaded)
    assert sound.read_bytes() == b"purr"
    assert conversations.messages(found) == [
        Message.system("Be kind."),
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


async def test_anothers_conversation_is_as_none(stores: Stores) -> None:
    conversations, id_ = stores.conversations, await stores.say()
    turn = NewTurn([StoredText(text="Hi")], "mini")
    ids = ["conv-" + "0" * 24, "", "conv-\0", "\ud800", "' OR 1=1 --"]
    for tenant, other in [("other", id_), *(("t", other) for other in ids)]:
        for call in (
            conversations.load(tenant, other),
            conversations.delete(tenant, other),
            conversations.change(tenant, other, title="x"),
            conversations.delete_turns(tenant, other, 1),
            conversations.add_turn(tenant, other, 2, turn),
            conversations.answer_turn(tenant, other, 1, turn),
            conversations.take_back(tenant, other, 1, turn),
            conversations.list(tenant, limit=1, before=other),
        ):
            with pytest.raises(NotFoundError) as missing:
                await call
            assert str(missing.value) == f"no conversation {other!r}"
    with pytest.raises(NotFoundError):
        await conversations.add_turn("other", id_, 1, turn, create=True)
    assert await conversations.list("other", limit=9) == ()
    assert len((await stores.load(id_)).turns) == 1


async def test_turns_that_are_refused_leave_nothing(stores: Stores) -> None:
    id_ = await stores.say(send=[b"1"])
    (shown,) = (await stores.load(id_)).media
    other = await stores.add(b"secret", tenant="other")
    before = stores.files()
    depth = NewTurn([StoredMedium(type="depth", media_id=shown)], "mini", parent=1)
    with pytest.raises(RequestError, match="kind image, but"):
        await stores.conversations.add_turn("t", id_, 2, depth)
    with pytest.raises(NotFoundError, match=other.id):
        await stores.say(id_=id_, show=[other.id])
    with pytest.raises(NotFoundError):
        await stores.say(id_="conv-" + "0" * 24, number=2, send=[b"2", b"3"])
    assert stores.files() == before
    assert len((await stores.load(id_)).turns) == 1


@BOTH
async def test_one_of_two_requests_continues(stores: Stores) -> None:
    id_ = await stores.say()
    results = await asyncio.gather(
        *(stores.say(id_=id_, number=2, send=[bytes([n])]) for n in range(8)),
        return_exceptions=True,
    )
    lost = [result for result in results if isinstance(result, ConflictError)]
    assert len(lost) == 7
    assert "turn 2 was to be added behind turn 1, but the next one is 3" in str(lost[0])
    assert [turn.number for turn in (await stores.load(id_)).turns] == [1, 2]
    assert len(stores.files()) == len(await stores.media.list("t", limit=9)) == 1
    for other in (id_, None):
        with pytest.raises(ConflictError):
            await stores.say(id_=other, number=5)
    assert len(await stores.conversations.list("t", limit=9)) == 1


async def test_deleting_takes_what_nothing_else_shows(stores: Stores) -> None:
    media, conversations = stores.media, stores.conversations
    one = await stores.say(send=[b"alone", b"shared"])
    alone, shared = sorted((await stores.load(one)).media.values(), key=lambda record: record.name)
    upload = await stores.add(b"upload")
    two = await stores.say(show=[shared.id, upload.id])

    await conversations.delete("t", one)
    with pytest.raises(NotFoundError):
        await stores.load(one)
    with pytest.raises(NotFoundError):
        await media.get("t", alone.id)
    assert conversations.messages(await stores.load(two))
    await conversations.delete("t", two)
    assert await media.list("t", limit=9) == (upload,), "promised until it expires"
    assert stores.files() == [media.path(upload)]


@BOTH
@pytest.mark.parametrize("method", ["delete", "delete_turns"])
async def test_nothing_is_left_of_a_turn_that_comes_while_others_go(
    stores: Stores, method: str
) -> None:
    async def one(number: int) -> None:
        id_ = await stores.say()
        delete = method == "delete"
        store = stores.conversations
        go = store.delete("t", id_) if delete else store.delete_turns("t", id_, 1)
        come = stores.say(id_=id_, send=[bytes([number])])
        await asyncio.gather(come, go, return_exceptions=True)

    await asyncio.gather(*(one(number) for number in range(12)))
    await stores.expire()
    await stores.media.sweep()
    listed = await stores.conversations.list("t", limit=20)
    found = [await stores.load(info.id) for info in listed]
    shown = [record for conversation in found for record in conversation.media.values()]
    assert stores.files() == sorted(map(stores.media.path, shown))


@BOTH
async def test_taking_turns_back(stores: Stores) -> None:
    conversations, media = stores.conversations, stores.media
    id_ = await stores.say("One")
    await stores.say(id_=id_, send=[b"cat"])
    (shown,) = (await stores.load(id_)).media
    await stores.say("Three", id_=id_)
    for number in (-1, 0, 4, 10**30):
        with pytest.raises(NotFoundError, match=f"no turn {number}"):
            await conversations.delete_turns("t", id_, number)

    await conversations.delete_turns("t", id_, 2)
    found = await stores.load(id_)
    assert ([turn.number for turn in found.turns], found.media) == ([1], {})
    assert (await media.get("t", shown)).expires_at is not None, "not for ever"
    assert await media.sweep() == 0, "but for a retry"
    await stores.say(id_=id_, show=[shown])
    assert (await media.get("t", shown)).expires_at is None

    await conversations.delete_turns("t", id_, 1)
    await stores.expire()
    assert await media.sweep() == 1
    assert (await stores.load(id_)).turns == ()
    await stores.say("Anew", id_=id_)


async def test_a_title_follows_the_first_message_until_a_user_chooses_one(stores: Stores) -> None:
    conversations, id_ = stores.conversations, await stores.say("a sheep")
    for message, title in (("a goat", "a goat"), ("a cow", "Mine")):
        if title == "Mine":
            await conversations.change("t", id_, title=title)
        await conversations.delete_turns("t", id_, (await stores.load(id_)).turns[0].number)
        await stores.say(message, id_=id_)
        await stores.say("and then?", id_=id_)
        assert [c.title for c in await conversations.list("t", limit=9)] == [title]
        assert len(await conversations.list("t", query=title, limit=9)) == 1
    await conversations.delete_turns("t", id_, (await stores.load(id_)).turns[1].number)
    assert (await stores.load(id_)).title == "Mine"


async def test_a_turn_that_is_asked_differently_keeps_its_versions(stores: Stores) -> None:
    """Each path reads as if the others were not there, whichever of them was asked last."""
    store, id_ = stores.conversations, await stores.say("One", "1")
    await stores.say("Two", "2", id_=id_)
    await stores.say("Three", "3", id_=id_)
    await stores.say("Zwei", "II", id_=id_, after=1, send=[b"cat"])

    async def path(through: int | None = None) -> list[int]:
        return [turn.number for turn in (await store.load("t", id_, through)).turns]

    assert await path() == [1, 4], "the one asked last"
    assert await path(2) == [1, 2, 3]
    assert await path(1) == [1, 4]
    found = await stores.load(id_)
    assert [list(found.versions[turn.parent]) for turn in found.turns] == [[1], [2, 4]]
    assert {number: found.later[number] for number in found.tree} == {1: 3, 2: 1, 3: 0, 4: 0}
    said = [message.text for message in store.messages(found)]
    assert said == ["One", "1", "Zwei", "II"]

    await store.change("t", id_, turn=2)
    assert await path() == [1, 2, 3], "the newest path through the one that was chosen"
    await stores.say("Four", "4", id_=id_)
    assert await path() == [1, 2, 3, 5]
    for other in (0, 9):
        with pytest.raises(NotFoundError, match=f"no turn {other}"):
            await store.change("t", id_, turn=other)
        with pytest.raises(NotFoundError, match=f"no turn {other}"):
            await store.load("t", id_, other)
    with pytest.raises(ConflictError, match="3 turns would go, and not 2"):
        await store.delete_turns("t", id_, 2, 2)
    await store.delete_turns("t", id_, 2, 3)
    assert await path() == [1, 4], "the version that is left"
    with pytest.raises(ConflictError, match="behind turn 3, but the next one is 6"):
        await stores.say("Late", id_=id_, number=5, after=3)
    await store.delete_turns("t", id_, 4)
    assert await path() == [1]
    await stores.expire()
    assert await stores.media.sweep() == 1


async def test_a_question_asked_again_replaces_the_one_without_an_answer(stores: Stores) -> None:
    store, id_ = stores.conversations, await stores.say("One", "1")
    for words in ("Two", "Two", "Zwei"):
        number = max((await stores.load(id_)).tree) + 1
        turn = NewTurn([StoredText(text=words)], "mini", parent=1)
        await store.add_turn("t", id_, number, turn)
    found = await stores.load(id_)
    assert [title_of(turn.parts) for turn in found.tree.values()] == ["One", "Two", "Zwei"]
    await store.answer_so_far(id_, 4, turn, "zw")
    assert [message.text for message in store.messages(await stores.load(id_))][-1] == "zw"
    again = NewTurn([StoredText(text="Zwei")], "mini", parent=1)
    await store.add_turn("t", id_, 5, again)
    assert set((await stores.load(id_)).tree) == {1, 3, 4, 5}, "some words of it are there"
    await store.take_back("t", id_, 5, again)
    assert [turn.number for turn in (await stores.load(id_)).turns] == [1, 4]


async def test_each_change_of_conversations_is_told(stores: Stores) -> None:
    store = stores.conversations
    states = [await store.state("t")]

    async def changed(by: object) -> None:
        states.append(await store.state("t"))
        assert states[-1] != states[-2], by

    id_ = await stores.say()
    await changed("a new one")
    await stores.say(id_=id_)
    await changed("a turn")
    await stores.say(id_=id_, after=0)
    await changed("a version")
    await store.change("t", id_, turn=2)
    await changed("a choice")
    await store.change("t", id_, title="Mine")
    await changed("a title")
    for change in ({"pinned": True}, {"archived": True}, {"system": "Be brief."}):
        await store.change("t", id_, **change)
        await changed(change)
    await store.delete_turns("t", id_, 3)
    await changed("turns less")
    other = await stores.say()
    await changed("another one")
    await store.delete("t", other)
    await changed("one less")
    await stores.say(tenant="other")
    assert await store.state("t") == states[-1], "another's"


SEARCHES = [
    *(("", "ABCD"), ("cat", "AB"), ("CAT", "AB"), ("ÄPFEL", "C"), ("strasse", "C")),
    ("a\u0308pfel", "C"),  # the same letter in two characters
    *((text, "D") for text in ("100%", "%", "_", "\\", "/")),
    *((text, "") for text in ("c_t", "c%t", "' OR 1=1 --")),
    *(("renamed", "B"), ("second answer", "A")),
    ("first message here", "B"),  # still said, if not in the title
    *(("here first", "B"), ('"here first"', ""), ('"first message"', "B")),
    *(("concatenated message", "B"), ("cat 100%", ""), ('"', "")),
    # Fewer characters than the index has, or more, and what its own language would mean.
    *(("ca", "AB"), ("c", "ABD"), ("fe", "C"), ("NEAR(cat)", ""), ("cat*", ""), ("cat OR dog", "")),
    *(('cat" OR "dog', ""), ("-cat", ""), ("text_folded:cat", ""), ("concatenate" * 40, "")),
    ("catenatenated", ""),  # its runs of three are all there, and it is not
    *(("SIGN.jpg", "D"), ("0199", "D"), ("hello there 0199", "D"), ("sign hello cat", "")),
]


@BOTH
async def test_search(stores: Stores) -> None:
    conversations = stores.conversations
    written = WrittenText(text="555-0199", box=(0, 0, 1, 1), confidence=1)
    spoken = SpokenText(text="Hello there", start=0, end=1, confidence=1)
    seen = MediaReport(name="sign.jpg", kind="image", written=(written,))
    heard = MediaReport(name="a.wav", kind="image", spoken=(spoken,))
    ids = {
        await stores.say("A Cat?"): "A",
        await stores.say("The first message here", "concatenated"): "B",
        await stores.say("Äpfel", "Straße"): "C",
        await stores.say("100% of a_b\\c/d", send=[b"1", b"2"], reports=[seen, heard]): "D",
    }
    first, second, *_ = ids
    await stores.say("cat Äpfel 100%", tenant="other")
    await stores.say("More", "The SECOND answer", id_=first)
    await conversations.change("t", second, title="Renamed")
    newest = [ids[info.id] for info in await conversations.list("t", limit=9)]
    assert newest == ["A", "D", "C", "B"], "the last answered first"
    page = await conversations.list("t", limit=2)
    behind = await conversations.list("t", limit=9, before=page[-1].id)
    assert [ids[info.id] for info in behind] == newest[2:]
    for query, found in SEARCHES:
        listed = await conversations.list("t", query=query, limit=9)
        assert sorted(ids[info.id] for info in listed) == sorted(found), query
    for query in ("nul\0", "half \ud83d"):
        with pytest.raises(RequestError, match="query"):
            await conversations.list("t", query=query, limit=1)
    assert await conversations.list("t", query="ﷺ%" * 500, limit=1) == (), "folding makes it grow"


@BOTH
@pytest.mark.parametrize("text", ["nul\0", "half \ud83d"])
async def test_text_that_cannot_be_stored(stores: Stores, text: str) -> None:
    id_ = await stores.say()
    for call in (
        stores.say(text, id_=id_),
        stores.say(system=text),
        stores.conversations.change("t", id_, title=text),
    ):
        with pytest.raises(RequestError, match=r"NUL character|surrogate pair"):
            await call
    await stores.say("Hi", f"a{text}b", id_=id_)
    answer = (await stores.load(id_)).turns[-1].answer
    assert answer == f"a{text[:-1]}\ufffdb", "the model's other words are not lost"


@BOTH
async def test_a_client_that_leaves_while_a_turn_is_stored(stores: Stores) -> None:
    for delay in range(10):
        task = asyncio.create_task(stores.say(send=[bytes([delay])]))
        await asyncio.sleep(delay / 1000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    listed = await stores.conversations.list("t", limit=20)
    found = [await stores.load(info.id) for info in listed]
    paths = [part.path for c in found for part in stores.conversations.messages(c)[0].files]
    assert sorted(str(path) for path in paths) == [str(path) for path in stores.files()]


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
    assert title_of([StoredText(text=text), *media]) == title
    assert len(title) <= 60


async def test_a_pinned_medium_is_pinned_in_the_messages(stores: Stores) -> None:
    id_ = await stores.say("What?", send=[b"cat", b"dog"])
    cat, dog = (await stores.load(id_)).turns[0].parts[:2]
    assert isinstance(cat, StoredMedium)
    assert isinstance(dog, StoredMedium)
    await stores.conversations.change("t", id_, pinned_media={dog.media_id: True})
    (asked, _) = stores.conversations.messages(await stores.load(id_))
    assert [file.pinned for file in asked.files] == [False, True]
    for wrong in ((id_, "u"), (new_id("conv"), "t")):
        with pytest.raises(NotFoundError):
            await stores.conversations.change(wrong[1], wrong[0], pinned_media={cat.media_id: True})
