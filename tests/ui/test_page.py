"""What the page can call, against a real service whose assistant is a stand-in."""

import asyncio
import base64
import json
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mico_chat.checkpoints.marks import Marks
from mico_chat.media.medium import MediaReport
from mico_chat.wire import ConversationObject, TurnObject
from mico_ui import describe
from mico_ui.browser import share, turns
from mico_ui.browser.cards import MediaDesk, Previewer
from mico_ui.browser.markup import html_of
from mico_ui.browser.page import Page
from mico_ui.browser.turns import ENDED, problem_of
from mico_ui.browser.visitor import Access, Visitor, is_at_home
from mico_ui.client import ApiError, Client
from tests.support.fakes import FakeAssistant
from tests.ui.conftest import EXAMPLES as FOLDER

ME = {"user": "b-0123456789abcdef01"}
YOU = {"user": "b-fedcba98765432100"}


@pytest.fixture
def page(client: Client, tmp_path: Path) -> Iterator[Page]:
    (tmp_path / "uploads").mkdir()
    with closing(Previewer()) as previewer:
        yield Page(MediaDesk(client.api, previewer, tmp_path / "uploads"))


async def called(page: Page, name: str, profile: dict[str, Any] = ME, **sent: Any) -> Any:
    """The value of a call, or a view with the state ``error`` and the problem."""
    (function,) = (f for f in page.functions() if f.__name__ == name)
    answer = await function({**sent, "profile": profile})
    return answer.get("value", {"state": "error", **answer})


def call(page: Page, name: str, profile: dict[str, Any] = ME, **sent: Any) -> Any:
    """The value of a call, or its problem's message."""
    answer = asyncio.run(called(page, name, profile, **sent))
    failed = isinstance(answer, dict) and answer.get("problem")
    return failed["message"] if failed else answer


async def followed(page: Page, ask: str, profile: dict[str, Any] = ME) -> AsyncIterator[Any]:
    """The views of a turn, until it ends."""
    version = -1
    while True:
        view = await called(page, "follow", profile, ask=ask, version=version)
        yield view
        if view["state"] in ENDED:
            return
        version = view["version"]


def ask(page: Page, message: str, profile: dict[str, Any] = ME, **asked: Any) -> list[Any]:
    """The states of a turn."""
    question = {"ask": secrets.token_hex(4), "message": message, **asked}

    async def states() -> list[Any]:
        failed = await called(page, "ask", profile, asked=question)
        if failed:
            return [failed]
        return [view async for view in followed(page, question["ask"], profile)]

    return asyncio.run(states())


def attach(page: Page) -> Any:
    path = page.desk.uploads / "sheep.jpg"
    path.write_bytes((FOLDER / "sheep.jpg").read_bytes())
    return call(page, "attach", file={"path": str(path), "name": "sheep.jpg"})


def test_a_turn_grows_until_it_is_done_and_is_exported_and_replaced(
    page: Page, assistant: FakeAssistant
) -> None:
    card = attach(page)
    assert (card["kind"], card["kinds"]) == ("image", ["image", "normal"])
    assert card["pictures"][0]["src"].startswith("data:image/webp;base64,")
    shown = [{"id": card["id"], "kind": "image"}]
    cost = call(page, "estimate", asked={"ask": "estimate", "message": "?", "media": shown})
    assert (cost["prompt_tokens"], cost["cards"]) == (10, [{**card, "kinds": []}])
    assert assistant.read == [False, True], "what is attached need not be read yet"
    states = ask(page, "What is <b>it</b>?", media=shown)
    assert states[0]["state"] == "waiting"
    done = states[-1]
    assert (done["state"], done["turn"]) == ("done", 1)
    assert done["answer"].startswith("[image sheep.jpg]")
    assert "<b>" not in done["html"]
    assert [one["id"] for one in done["media"]] == [card["id"]]
    saved = call(page, "export", id=done["conversation_id"], form="markdown")
    assert saved["name"] == "What-is-b-it-b.md"
    assert "- image: sheep.jpg" in saved["text"]
    assert call(page, "export", id=done["conversation_id"], form="json")["type"].endswith("json")
    chat = done["conversation_id"]
    ask(page, "and then?", conversation_id=chat, after=1)
    # Another tab knows of the first turn alone.
    again = ask(page, "two", conversation_id=chat, after=0)[-1]
    assert (again["turn"], again["parent"]) == (3, 0)
    shown = call(page, "open", id=chat)["turns"]
    assert [(turn["message"], turn["versions"]) for turn in shown] == [("two", [1, 3])]
    first = call(page, "choose", id=chat, turn=1)["turns"]
    assert [turn["message"] for turn in first] == ["What is <b>it</b>?", "and then?"]
    saved = json.loads(call(page, "export", id=chat, form="json")["text"])
    assert [turn["parent"] for turn in saved["turns"]] == [0, 1, 0], "all versions"
    refused = call(page, "delete_turns", id=chat, first=1, turns=1)
    assert "2 turns would go, and not 1" in refused
    assert call(page, "delete_turns", id=chat, first=1, turns=2) is None
    assert [turn["turn"] for turn in call(page, "open", id=chat, turn=1)["turns"]] == [3]
    assert "no turn 2" in ask(page, "late", conversation_id=chat, after=2)[-1]["problem"]["message"]


def test_chats_are_exported_with_their_media_and_imported(page: Page) -> None:
    shown = [{"id": attach(page)["id"], "kind": "image"}]
    first = ask(page, "What is it?", media=shown)[-1]
    ask(page, "And now?", conversation_id=first["conversation_id"], after=0, media=shown)
    text = call(page, "export", id=first["conversation_id"], form="json")["text"]
    assert list(json.loads(text)["files"]) == [shown[0]["id"]]
    assert call(page, "delete", id=first["conversation_id"]) is None

    def brought(text: str) -> Any:
        path = page.desk.uploads / "chats.json"
        path.write_text(text)
        return call(page, "bring", YOU, file={"path": str(path), "name": "chats.json"})

    ids = brought(f"[{text}, {text}]")
    assert len({*ids}) == 2
    for id_ in ids:
        opened = call(page, "open", YOU, id=id_)
        assert [turn["message"] for turn in opened["turns"]] == ["And now?"]
        assert opened["turns"][0]["versions"] == [1, 2]
        medium = opened["turns"][0]["media"][0]["id"]
        assert call(page, "preview", YOU, shown={"id": medium, "kind": "image"})["pictures"]
    for wrong in ("{", "[1]", '{"title": "x"}', "[" * 100_000):
        assert "it holds no chats" in brought(wrong)
    order = {"title": "Mine", "system": "Rhyme.", "pinned": True, "archived": True}
    assert call(page, "change", YOU, id=ids[0], changes=order) is None
    (again,) = brought(call(page, "export", YOU, id=ids[0], form="json")["text"])
    assert [one["id"] for one in call(page, "conversations", YOU, query="")["data"]] == [ids[1]]
    for query, archived in (("", True), ("mine", False)):
        found = call(page, "conversations", YOU, query=query, archived=archived)["data"]
        assert {one["id"] for one in found} == {ids[0], again}
        assert all(order.items() <= one.items() for one in found)
    lacking = {**json.loads(text), "files": {}}
    assert "the file of sheep.jpg is missing" in brought(json.dumps(lacking))
    assert "no such upload" in call(page, "bring", file={"path": "/etc/passwd", "name": "x"})


def test_exported_preferences_have_the_pictures(page: Page) -> None:
    def preferred(**asked: Any) -> dict[str, Any]:
        first = ask(page, "What\u2028is it?", **asked)[-1]
        chat = first["conversation_id"]
        second = ask(page, "What\u2028is it?", conversation_id=chat, beside=first["ask"], **asked)[
            -1
        ]
        call(page, "prefer", id=chat, turn=second["turn"], over=first["turn"])
        text = call(page, "preferences")["text"]
        return dict(json.loads(text.split("\n")[-2]))

    said = preferred()["prompt"]
    assert said == [{"role": "user", "content": "What\u2028is it?"}], "a text model takes it"
    row = preferred(media=[{"id": attach(page)["id"], "kind": "image"}])
    assert row["prompt"][0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": said[0]["content"]},
    ]
    picture = base64.b64encode((FOLDER / "sheep.jpg").read_bytes()).decode()
    assert row["images"] == [f"data:image/jpeg;base64,{picture}"]


def test_what_is_too_large_for_a_shared_chat_is_named(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = attach(page)
    path = page.desk.uploads / "drum.flac"
    path.write_bytes((FOLDER / "snare-drum.flac").read_bytes())
    drum = call(page, "attach", file={"path": str(path), "name": "drum.flac"})
    media = [{"id": one["id"], "kind": one["kind"]} for one in (card, drum)]
    asked = ask(page, "What is it?", media=media)[-1]
    chat = asked["conversation_id"]
    ask(page, "And again?", conversation_id=chat, media=media[:1])

    def figures() -> list[str]:
        text = call(page, "export", id=chat, form="html")["text"]
        return [one.split("</figure>")[0] for one in text.split("<figure>")[1:]]

    sheep, sound, again = figures()
    assert sheep.count("<img") == 1
    assert "only" not in sheep + sound + again
    assert "<audio controls" in sound
    assert "the same as above" in again
    assert "<img" not in again
    monkeypatch.setattr(share, "MOST_OF_ONE", 1000)
    sheep, sound, _ = figures()
    assert "only" not in sheep
    assert "<audio" not in sound
    assert "only a small preview is here: the file is too large for this page" in sound
    monkeypatch.setattr(share, "MOST_OF_ALL", 1000)
    for figure in figures()[:2]:
        assert "<img" not in figure
        assert "only its name is here" in figure


def test_a_chat_has_its_own_system_prompt(page: Page, assistant: FakeAssistant) -> None:
    rhyme = {**ME, "system": "Rhyme."}

    def told(**asked: Any) -> str:
        ask(page, "hello", rhyme, **asked)
        first = assistant.asked[-1][0]
        return first.text if first.role == "system" else ""

    first = "conv-" + "1" * 24
    assert told() == told(conversation_id=first, create=True) == "Rhyme."
    for own in ("Sing.", ""):
        assert told(system=own) == own
    for new in ("Be brief.", None):
        assert call(page, "change", id=first, changes={"system": new}) is None
        assert told(conversation_id=first, system="Late.") == (new or "")
        assert call(page, "open", id=first)["system"] == new
    assert "20000" in call(page, "change", id=first, changes={"system": "x" * 20_001})
    assert "give at least one" in call(page, "change", id=first, changes={})


def test_another_answer_is_drawn_at_random(page: Page, assistant: FakeAssistant) -> None:
    first = ask(page, "one")[-1]
    assert (assistant.options[-1].temperature, first["sampled"]) == (0, None)
    for _ in range(2):
        again = ask(page, "one", conversation_id=first["conversation_id"], after=0, again=True)[-1]
        assert (assistant.options[-1].temperature, again["sampled"]) == (0.7, 0.7)
    assert assistant.options[-1].seed != assistant.options[-2].seed


def test_what_an_explanation_waits_for_is_shown(
    page: Page, halfway: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mico_server.service.PROGRESS_AFTER_S", 0)
    done = ask(page, "slowly", media=[{"id": attach(page)["id"], "kind": "image"}])[-1]
    halfway.clear()

    async def explained() -> tuple[str, Any]:
        asked = called(page, "explain", id=done["conversation_id"], turn=1)
        explaining = asyncio.create_task(asked)
        while not (said := await called(page, "explaining")):
            assert not explaining.done()
            assert not await called(page, "explaining", YOU)
            await asyncio.sleep(0.01)
        halfway.set()
        return said, await explaining

    said, found = asyncio.run(explained())
    assert said == "leaving out each part in turn: 512 of 4,100"
    assert found["media"][0]["effect"] == 2.0


def test_thoughts_are_told_from_the_answer_and_not_stored(page: Page) -> None:
    done = ask(page, "ponder")[-1]
    assert (done["thoughts"], done["answer"]) == ("Hm.", "[] ponder")
    (turn,) = call(page, "open", id=done["conversation_id"])["turns"]
    assert (turn["thoughts"], turn["answer"]) == ("", "[] ponder")


def test_an_unsure_answer_is_marked_also_when_it_is_opened_again(
    page: Page, assistant: FakeAssistant
) -> None:
    assistant.marks = Marks.read(0.5)
    media = [{"id": attach(page)["id"], "kind": "image"}]
    for message, unsure in (("perhaps", True), ("What is it?", False)):
        done = ask(page, message, media=media)[-1]
        assert done["unsure"] is unsure
        (turn,) = call(page, "open", id=done["conversation_id"])["turns"]
        assert turn["unsure"] is unsure


def test_options_reach_the_model_where_they_are_set(page: Page, assistant: FakeAssistant) -> None:
    given = {"top_p": 0.5, "repetition_penalty": 1.5, "seed": 3, "max_tokens": 9}
    ask(page, "hello", {**ME, **given})
    ask(page, "hello", {**ME, **dict.fromkeys(given)}, prefix="It is")
    for options, wanted in zip(assistant.options, [given, {"prefix": "It is"}], strict=True):
        assert (
            options.model_dump(exclude_unset=True, exclude={"stop", "temperature", "truncation"})
            == wanted
        )


def test_an_answer_goes_on_without_the_page_and_is_found_again(
    page: Page, halfway: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    halfway.clear()
    place: dict[str, Any] = {"conversation_id": f"conv-{5:024x}", "create": True}

    async def watched() -> list[Any]:
        for _ in range(2):  # a name is asked once
            await called(page, "ask", asked={"ask": "a1", "message": "one two three", **place})
        async for view in followed(page, "a1"):
            if view["state"] == "answering":
                break  # as the page is loaded anew
        (turn,) = (await called(page, "open", id=place["conversation_id"]))["turns"]
        assert (turn["ask"], turn["state"], turn["turn"]) == ("a1", "answering", 1)
        assert (turn["message"], turn["answer"]) == ("one two three", "[] ")
        same = await called(page, "follow", ask="a1", version=turn["version"])  # nothing is new
        assert (same["state"], same["version"]) == ("answering", turn["version"])
        theirs = await called(page, "follow", YOU, ask="a1", version=0)
        assert theirs["state"] == "gone"
        await page.answers.stop(Visitor.of(YOU), "a1")  # nor can another user stop it
        states = []
        async for view in followed(page, "a1"):
            states.append(view)
            halfway.set()
        (turn,) = (await called(page, "open", id=place["conversation_id"]))["turns"]
        assert (turn["state"], turn["ask"]) == ("done", "")
        while page.answers._answers:  # what has ended is forgotten
            await asyncio.sleep(0.01)
        assert [view["state"] async for view in followed(page, "a1")] == ["gone"]
        return states

    monkeypatch.setattr(turns, "ENDED_S", 0.5)
    monkeypatch.setattr(turns, "PATIENCE_S", 0.1)
    states = asyncio.run(asyncio.wait_for(watched(), 20))
    assert (states[0]["state"], states[0]["answer"]) == ("answering", "[] ")
    assert (states[-1]["state"], states[-1]["answer"]) == ("done", "[] one two three")


def test_errors_are_the_servers_words_and_say_what_to_do(page: Page) -> None:
    refused = ask(page, "refuse this")[-1]
    assert refused["state"] == "error"
    assert refused["problem"]["message"] == "refused"
    assert refused["problem"]["advice"]
    gone = ask(page, "hello", conversation_id="conv-none")[-1]
    assert "conv-none" in gone["problem"]["message"]
    assert "conv-none" in call(page, "open", id="conv-none")
    compared = {"model": "fake", "texts": ["one"]}
    assert "at least two" in call(page, "compare", compared=compared)
    compared["texts"] = ["one", "two"]
    assert "embeddings" in call(page, "compare", compared=compared)
    compared["texts"] = ["one"] * 100
    said = call(page, "compare", compared=compared)
    assert said == "Compare takes at most 24 sentences, and these are 100"


AT_HOME = {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860"])
def test_a_page_that_this_machine_has_opened(host: str) -> None:
    assert is_at_home({"host": host, "origin": f"http://{host}", "user-agent": "x"})


@pytest.mark.parametrize(
    "changed",
    [
        # DNS rebinding: the browser takes the page for the other site's.
        {"host": "evil.example:7860", "origin": "http://evil.example:7860"},
        {"host": "127.0.0.1.evil.example", "origin": "http://127.0.0.1.evil.example"},
        {"host": "evil@127.0.0.1", "origin": "http://evil@127.0.0.1"},
        {"host": "192.168.1.2:7860", "origin": "http://192.168.1.2:7860"},
        {"host": "", "origin": "http://"},
        {"host": "[::1", "origin": "http://[::1"},
        # Another site's page, or one of another server of this machine.
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:8080"},
        {"origin": "null"},
        {"origin": ""},
        # Proxies: they say so, or name the host that they ask and hand on the browser's origin.
        {"x-forwarded-for": "203.0.113.7"},
        {"X-Forwarded-Proto": "https"},
        {"forwarded": "for=203.0.113.7"},
        {"via": "1.1 proxy"},
        {"x-real-ip": "203.0.113.7"},
        {"origin": "https://chat.example.org"},
        {"origin": "https://127.0.0.1:7860"},
    ],
)
def test_pages_that_others_have_opened(changed: dict[str, str]) -> None:
    assert is_at_home(AT_HOME)
    assert not is_at_home({**AT_HOME, **changed})
    assert not is_at_home({"host": AT_HOME["host"]}), "not a page at all"
    access = Access("ours", require_key=True)
    assert access.for_visitor({**AT_HOME, **changed}) == Access(None, require_key=True)
    for name in ("access", "_access"):  # no browser can send one
        assert Visitor.of({**ME, name: {"secret": "x"}})._access == Access()


def test_a_page_names_no_other_files(page: Page, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes((FOLDER / "sheep.jpg").read_bytes())
    (page.desk.uploads / "link.jpg").symlink_to(secret)
    for path in ("/etc/passwd", "uploads/../secret.jpg", "uploads/link.jpg", ""):
        said = call(page, "attach", file={"path": str(tmp_path / path), "name": "x.jpg"})
        assert "no such upload" in said, path


def test_users_see_their_own_alone(page: Page) -> None:
    card = attach(page)
    medium, shown = card["id"], {"id": card["id"], "kind": "image"}
    conversation = ask(page, "mine", media=[shown])[-1]["conversation_id"]
    assert call(page, "conversations", YOU, query="")["data"] == []
    assert len(call(page, "conversations", ME, query="")["data"]) == 1
    calls: dict[str, dict[str, Any]] = {
        "open": {},
        "change": {"changes": {"title": "x"}},
        "delete": {},
    }
    calls |= {
        "delete_turns": {"first": 1, "turns": 1},
        "explain": {"turn": 1},
        "export": {"form": "json"},
    }
    for name, sent in calls.items():
        assert conversation in call(page, name, YOU, id=conversation, **sent), name
    assert medium in call(page, "original", YOU, id=medium)
    assert medium in call(page, "preview", YOU, shown=shown)
    assert call(page, "open", ME, id=conversation)["title"]
    # The original is written where nobody can guess.
    kept: list[str] = []
    page.keep_file = kept.append
    assert len({call(page, "original", id=medium) for _ in range(2)}) == 2
    for path in map(Path, kept):
        assert path.read_bytes() == (FOLDER / "sheep.jpg").read_bytes()
        assert len(path.parent.name) > 30
    page.desk.previewer._kept.clear()  # a lost preview is made again
    assert call(page, "preview", shown=shown)["pictures"] == card["pictures"]


def test_calls_that_make_no_sense_are_refused_and_not_crashed(page: Page) -> None:
    settings: tuple[Any, ...] = ({}, {"user": ""}, {"user": "a b" * 9}, {"user": "short"}, None, 3)
    for profile in (*settings, {**ME, "temperature": 9}):
        assert "see Settings" in call(page, "conversations", profile, query="")
        assert "see Settings" in ask(page, "hello", profile)[-1]["problem"]["message"]
    for function in page.functions():
        answer = asyncio.run(function({"profile": ME}))
        assert "value" in answer or "defect" not in answer["problem"]["message"], function
    assert "defect" not in ask(page, None)[-1]["problem"]["message"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[click](javascript:alert(1))",
        "![spy](https://example.org/spy.png)",
        '<https://example.org/a"onmouseover="alert(1)>',
        "```<b>```",
        "```python\nreturn '</pre><b>'\n```",
        "|a|b|\n|-|-|\n|<b>|2|",
        r"$\text{<img src=x onerror=alert(1)>}$",
        r"$\text{&lt;img src=x onerror=alert(1)&gt;}$",
        r"\(\href{javascript:alert(1)}{<b>}\)",
        "$$" + "{" * 1900 + "<b>$$",
        r"$\style{background:url(https://example.org)}{x}$",
    ],
)
def test_an_answer_brings_no_markup_of_its_own(text: str) -> None:
    html = html_of(text)
    for bad in ("<script", "<img", 'href="javascript', '"onmouseover', "<b>", "style="):
        assert bad not in html


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("10.", "<p>10.</p>"),
        (" 3)\n", "<p>3)</p>"),
        ("10. a", '<ol start="10">'),
        (r"so \(x^2\)", "<msup><mi>x</mi><mn>2</mn></msup>"),
        ("$\\frac{1}{2}$", "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>"),
        ("\\[\na<b\n\\]", 'display="block"><mrow><mi>a</mi><mo>&lt;</mo><mi>b</mi></mrow>'),
        (r"$\frac{$", r"<code>\frac{</code>"),
        ("$5 and $6", "<p>$5 and $6</p>"),
        ("`$x$`", "<code>$x$</code>"),
        ("see https://a.example/b?c=1.", '<a href="https://a.example/b?c=1">'),
    ],
)
def test_formulas_links_and_numbers_are_drawn(text: str, drawn: str) -> None:
    assert drawn in html_of(text)


def test_cuts_do_not_name_an_operators_settings() -> None:
    cut = ["frames: used 8 of 250, spread evenly (max_frames; MICO_MEDIA_MAX_FRAMES)"]
    cut.append("sound: kept the first 60.0 s of 90.0 s (max_seconds; MICO_MEDIA_MAX_SECONDS)")
    report = MediaReport(name="a.mp4", kind="video", frames_used=8, frames_total=250, cut=cut)
    assert "8 of 250 frames, spread evenly" in describe.facts(report)
    assert describe.cuts(report) == ("sound: kept the first 60.0 s of 90.0 s",)


def test_an_unanswered_question_in_an_export() -> None:
    turn = TurnObject(
        **{"turn": 1, "message": "Why?", "answer": "", "finish_reason": "unanswered"},
        **{"media": [], "usage": None, "reports": (), "created_at": 0},
    )
    about = {"id": "conv-1", "title": "T", "system": None, "created_at": 0, "updated_at": 0}
    text = describe.markdown(ConversationObject(model="m", turns=[turn], **about))
    assert text == "# T\n\n## Question\n\nWhy?\n\n## Answer (m)\n\n(not answered)\n"


def test_advice_goes_with_the_error() -> None:
    assert "Settings" in problem_of(ApiError("no", status=401)).advice
    assert "12 s" in problem_of(ApiError("no", status=429, retry_after_s=12)).advice
    too_long = problem_of(ApiError("no", status=400, code="context_length_exceeded"))
    assert "new chat" in too_long.advice
    assert problem_of(ApiError("no")).away
    refused, visitor = ApiError("no", status=401, code="invalid_api_key"), Visitor.of(ME)
    assert problem_of(refused).message == "The key in Settings is not valid here."
    keyless = problem_of(refused, visitor)  # nobody gave a key: the page's own secret was refused
    assert keyless.message == "This server asks for a key."
    keyless = problem_of(ApiError("no", status=401, code="missing_api_key"))
    assert (keyless.message, keyless.setting) == ("This server asks for a key.", "key")
