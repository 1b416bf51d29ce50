"""Asking, stopping, changing and finding again: what a user does all day, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import expect

from tests.ui.chat_page import ANSWER_MS, PHONE, ChatPage
from tests.ui.conftest import EXAMPLES, OpenPage
from tests.ui.live import FakeServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STORY = "Tell me a long story about a sheep and a dragon."


@pytest.mark.base_llm
def test_every_modality_at_once_and_what_was_taken_of_each(chat: ChatPage) -> None:
    names = ["sheep.jpg", "snare-drum.flac", "dragon.mp4", "near.depth.png", "box.normal.png"]
    chat.attach(*(EXAMPLES / name for name in names))
    kinds = [chip.get_attribute("data-kind") for chip in chat.chips.all()]
    assert sorted(kinds, key=str) == ["audio", "depth", "image", "image", "video"]
    # Nothing in an 8-bit file tells a normal map from a picture: the user does.
    chat.page.get_by_label("Show box.normal.png as").select_option("as normal map")
    expect(chat.page.locator(".chip[data-kind=normal]")).to_be_visible(timeout=ANSWER_MS)
    expect(chat.page.locator(".meter")).to_contain_text("tokens + up to", timeout=ANSWER_MS)

    chat.ask("What do you see and hear?")
    assert chat.text(1)
    report = chat.answer(1).locator("details.report")
    report.locator("summary").click()
    assert "5 media" in report.locator("summary").inner_text()
    taken = {kind: report.locator(f".taken[data-kind={kind}]") for kind in (*kinds, "normal")}
    for kind, part in taken.items():
        expect(part.locator("img").first).to_be_visible(timeout=ANSWER_MS)
        assert "tokens" in part.inner_text(), kind
    assert taken["video"].locator("figcaption", has_text=" s").count() == 8
    assert "nearest 0.83 m" in taken["depth"].inner_text()
    assert taken["audio"].locator("img").count() == 2  # waveform and mel picture
    shown = chat.turns.nth(0).locator(".card")
    assert shown.count() == 5
    shown.filter(has_text="snare-drum.flac").get_by_role("button").click()
    player = chat.page.locator("dialog.viewer audio")
    expect(player).to_be_visible(timeout=ANSWER_MS)
    chat.page.wait_for_function(
        "document.querySelector('dialog.viewer audio').duration > 2", timeout=ANSWER_MS
    )


@pytest.mark.base_llm
def test_examples_and_a_follow_up_that_needs_no_file(chat: ChatPage) -> None:
    first = chat.page.locator(".example").first  # a photograph, and its author is named
    expect(first).to_contain_text("CC0", timeout=ANSWER_MS)
    first.click()
    assert "espresso" in chat.text(1).lower()
    chat.page.get_by_role("button", name="New chat").click()
    chat.page.get_by_role("button", name="Which way is the dragon going?").click()
    assert "right" in chat.text(1).lower()
    chat.ask("What moves in this clip?")
    assert chat.text(2)
    assert chat.turns.nth(1).locator(".card").count() == 0
    assert "32 of media" in chat.answer(2).locator(".usage").inner_text()
    expect(chat.conversations.first).to_have_text("Which way is the dragon going?")


@pytest.mark.parametrize("by_key", [False, True])
def test_an_answer_grows_and_stops(chat: ChatPage, server: FakeServer, by_key: bool) -> None:
    server.allow(1)
    chat.ask(STORY)
    growing = chat.turns.nth(0).locator(".text")
    for words, text in ((1, "[]"), (2, "[] Tell"), (5, "[] Tell me a long")):
        server.allow(words)
        expect(growing).to_have_text(text, timeout=ANSWER_MS)
    if by_key:
        chat.page.keyboard.press("Escape")
    else:
        chat.page.get_by_role("button", name="Stop").click()
    expect(chat.answer(1).locator(".note")).to_have_text("Stopped.", timeout=ANSWER_MS)
    # What was said until then is kept, and it ended there.
    server.allow()
    expect(chat.conversations).to_have_count(1)
    for _ in range(2):
        assert chat.text(1) == "[] Tell me a long"
        chat.page.reload()


def test_answer_again_and_edit_replace_the_turn(chat: ChatPage) -> None:
    chat.attach(EXAMPLES / "sheep-and-diamond.jpg")
    chat.ask("What is to the right of the sheep?")
    first = chat.text(1)
    chat.answer(1).get_by_role("button", name="Answer again").click()
    assert chat.text(1) == first  # greedy, so the same
    assert chat.turns.count() == 1
    chat.turns.nth(0).get_by_role("button", name="Edit the question").click()
    box = chat.page.get_by_label("Edit the question").last
    box.fill("Name the days of the week.")
    box.press("Enter")
    expect(chat.turns.nth(0).locator(".said")).to_have_text("Name the days of the week.")
    second = chat.text(1)
    assert second != first
    chat.page.reload()
    assert chat.text(1) == second
    assert chat.turns.count() == 1
    chat.ask("What is red?")
    chat.answer(2)
    chat.turns.nth(1).get_by_role("button", name="Delete from here").click()
    chat.confirm("Delete")
    expect(chat.turns).to_have_count(1)
    chat.page.reload()
    chat.answer(1)
    expect(chat.turns).to_have_count(1)


def test_a_reload_loses_nothing(chat: ChatPage) -> None:
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask("What is it?")
    answer = chat.text(1)
    chat.attach(EXAMPLES / "near.depth.png")
    chat.message.fill("not sent yet")
    chat.page.reload()
    assert chat.text(1) == answer
    expect(chat.turns.nth(0).locator(".card img")).to_be_visible(timeout=ANSWER_MS)
    expect(chat.message).to_have_value("not sent yet")
    expect(chat.chips).to_have_count(1)
    chat.message.press("Enter")
    assert chat.text(2)


def test_conversations_are_found_renamed_exported_and_deleted(chat: ChatPage) -> None:
    for question in ("Who are you?", "What is a harp?"):
        chat.page.get_by_role("button", name="New chat").click()
        chat.ask(question)
        chat.answer(1)
    expect(chat.conversations).to_have_text(["What is a harp?", "Who are you?"])
    chat.page.get_by_label("Search conversations").fill("harp")
    expect(chat.conversations).to_have_text(["What is a harp?"])
    chat.page.get_by_label("Search conversations").fill("")
    expect(chat.conversations).to_have_count(2)

    chat.choose("Who are you?", "Rename")
    chat.page.get_by_label("New title").fill("About <b>you</b>")
    chat.page.get_by_label("New title").press("Enter")
    expect(chat.conversations.nth(1)).to_have_text("About <b>you</b>")

    with chat.page.expect_download() as saved:
        chat.choose("About <b>you</b>", "Export as Markdown")
    text = Path(saved.value.path()).read_text()
    assert saved.value.suggested_filename == "About-b-you-b.md"
    assert "# About <b>you</b>" in text
    assert "Who are you?" in text
    with chat.page.expect_download() as saved:
        chat.choose("About <b>you</b>", "Export as JSON")
    (turn,) = json.loads(Path(saved.value.path()).read_text())["turns"]
    assert turn["message"] == "Who are you?"

    chat.choose("What is a harp?", "Delete")
    chat.confirm("Delete")
    expect(chat.conversations).to_have_text(["About <b>you</b>"])
    expect(chat.turns).to_have_count(0)  # it was the one on show
    chat.conversations.first.click()
    assert chat.text(1)


def test_a_reload_during_the_first_answer(chat: ChatPage, server: FakeServer) -> None:
    server.allow(3)
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask(STORY)
    text = chat.turns.nth(0).locator(".text")
    expect(text).to_have_text("[image sheep.jpg] Tell", timeout=ANSWER_MS)
    chat.page.reload()
    # The conversation is open, and the answer goes on to be written.
    expect(chat.turns.nth(0).locator(".said")).to_have_text(STORY)
    expect(chat.turns.nth(0).locator(".card img")).to_be_visible(timeout=ANSWER_MS)
    expect(text).to_have_text("[image sheep.jpg] Tell", timeout=ANSWER_MS)
    server.allow(5)
    expect(text).to_have_text("[image sheep.jpg] Tell me a", timeout=ANSWER_MS)
    chat.page.reload()
    chat.page.get_by_role("button", name="Stop").click(timeout=ANSWER_MS)
    expect(chat.answer(1).locator(".note")).to_have_text("Stopped.", timeout=ANSWER_MS)
    chat.page.reload()
    assert chat.text(1) == "[image sheep.jpg] Tell me a"
    expect(chat.turns).to_have_count(1)


def test_an_answer_goes_on_in_another_conversation(chat: ChatPage, server: FakeServer) -> None:
    server.allow(1)
    for n, question in enumerate((STORY, "And of a camel."), 1):
        chat.page.get_by_role("button", name="New chat").click()
        expect(chat.turns).to_have_count(0)
        chat.ask(question)
        expect(chat.turns.nth(0).locator(".text")).to_have_text("[]", timeout=ANSWER_MS)
        expect(chat.conversations).to_have_count(n, timeout=ANSWER_MS)
    chat.conversations.filter(has_text="long story").click()
    expect(chat.turns.nth(0).locator(".said")).to_have_text(STORY)
    server.allow()
    assert chat.text(1) == f"[] {STORY}"
    expect(chat.turns).to_have_count(1)
    chat.conversations.filter(has_text="And of a camel.").click()
    expect(chat.turns.nth(0).locator(".said")).to_contain_text("camel")
    assert chat.text(1) == "[] And of a camel."
    expect(chat.page.get_by_text("Stopped.")).to_have_count(0)


def test_a_question_edited_while_it_is_answered(chat: ChatPage, server: FakeServer) -> None:
    server.allow(2)
    chat.ask(STORY)
    text = chat.turns.nth(0).locator(".text")
    expect(text).to_have_text("[] Tell", timeout=ANSWER_MS)
    chat.turns.nth(0).get_by_role("button", name="Edit the question").click()
    box = chat.page.get_by_label("Edit the question").last
    box.fill("Invent a dragon.")
    # What is written stays when the answer ends meanwhile.
    chat.page.get_by_role("button", name="Stop").click()
    expect(chat.answer(1).locator(".note")).to_have_text("Stopped.", timeout=ANSWER_MS)
    expect(box).to_have_value("Invent a dragon.")
    box.press("Enter")
    said = chat.turns.nth(0).locator(".said")
    expect(said).to_have_text("Invent a dragon.", timeout=ANSWER_MS)
    # Asking stops the answer that is under way, and asks.
    expect(text).to_have_text("[] Invent", timeout=ANSWER_MS)
    chat.turns.nth(0).get_by_role("button", name="Edit the question").click()
    box.fill("Who are you?")
    box.press("Enter")
    expect(said).to_have_text("Who are you?", timeout=ANSWER_MS)
    # The message box keeps what cannot be sent yet, and says so.
    expect(text).to_have_text("[] Who", timeout=ANSWER_MS)
    chat.ask("And next?")
    expect(chat.page.locator(".meter")).to_contain_text("Not sent yet")
    expect(chat.message).to_have_value("And next?")
    chat.page.get_by_role("button", name="Stop").click()
    chat.answer(1)
    chat.page.reload()
    expect(said).to_have_text("Who are you?", timeout=ANSWER_MS)
    expect(chat.message).to_have_value("And next?")
    expect(chat.turns).to_have_count(1)


def test_two_browsers_do_not_see_each_other(open_page: OpenPage) -> None:
    mine, theirs = open_page(), open_page()
    mine.ask("What is my secret?")
    theirs.ask("Hello!")
    mine.answer(1)
    theirs.answer(1)
    expect(mine.conversations).to_have_text(["What is my secret?"])
    expect(theirs.conversations).to_have_text(["Hello!"])
    theirs.page.goto(mine.page.url)
    theirs.page.reload()
    expect(theirs.page.locator(".banner")).to_contain_text("conv-", timeout=ANSWER_MS)
    expect(theirs.turns).to_have_count(0)


def test_the_server_goes_away_and_comes_back(chat: ChatPage, server: FakeServer) -> None:
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask("What is it?")
    before = chat.text(1)
    server.stop(kill=True)
    try:
        banner = chat.page.locator(".banner")
        chat.ask("And its colour?")
        expect(banner).to_contain_text("no server answers at", timeout=ANSWER_MS)
        problem = chat.answer(2).locator(".problem")
        expect(problem).to_contain_text("no server answers at")
        expect(problem).to_contain_text("Nothing is lost")
        chat.page.reload()
        expect(chat.page.locator(".said", has_text="And its colour?")).to_be_visible()
    finally:
        server.start()
    expect(banner).to_be_hidden(timeout=ANSWER_MS)
    expect(chat.turns).to_have_count(2, timeout=ANSWER_MS)
    chat.answer(2).get_by_role("button", name="Ask again").click()
    expect(chat.answer(2).locator(".text")).not_to_be_empty(timeout=ANSWER_MS)
    chat.page.reload()
    assert chat.text(1) == before
    assert chat.text(2)


def test_a_server_that_is_killed_in_the_first_answer(chat: ChatPage, server: FakeServer) -> None:
    server.allow(3)
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask(STORY)
    text = chat.turns.nth(0).locator(".text")
    expect(text).to_have_text("[image sheep.jpg] Tell", timeout=ANSWER_MS)
    server.stop(kill=True)
    try:
        problem = chat.answer(1).locator(".problem")
        expect(problem).to_contain_text("broke off", timeout=ANSWER_MS)
        assert "peer" not in problem.inner_text()
        # Another chat has begun meanwhile, which the server knows nothing of.
        chat.page.goto(f"{chat.url}/robots.txt")
        chat.page.goto(chat.url)
        expect(chat.page.locator(".said")).to_have_text(STORY)
    finally:
        server.start()
    expect(chat.page.locator(".banner")).to_be_hidden(timeout=ANSWER_MS)
    expect(chat.conversations).to_have_text([STORY], timeout=ANSWER_MS)
    expect(chat.answer(1).locator(".note")).to_have_text("This question has no answer yet.")
    expect(chat.turns.nth(0).locator(".card img")).to_be_visible(timeout=ANSWER_MS)
    chat.answer(1).get_by_role("button", name="Ask again").click()
    expect(text).to_have_text("[image sheep.jpg] Tell", timeout=ANSWER_MS)
    chat.page.get_by_role("button", name="Stop").click()
    chat.answer(1)
    chat.page.reload()
    chat.answer(1)
    expect(chat.turns).to_have_count(1)
    expect(chat.conversations).to_have_count(1)


def test_a_first_question_that_no_server_hears(open_page: OpenPage, server: FakeServer) -> None:
    chat = open_page()
    chat.attach(EXAMPLES / "sheep.jpg")
    server.stop(kill=True)
    try:
        chat.ask("What is it?")
        expect(chat.answer(1).locator(".problem")).to_contain_text("no server answers")
        # A new chat puts it back where it was written.
        chat.page.get_by_role("button", name="New chat").click()
        expect(chat.message).to_have_value("What is it?")
        expect(chat.chips).to_have_count(1)
        chat.message.press("Enter")
        expect(chat.answer(1).locator(".problem")).to_contain_text("no server answers")
        chat.page.goto(f"{chat.url}/robots.txt")
        chat.page.goto(chat.url)
        expect(chat.page.locator(".said")).to_have_text("What is it?")
    finally:
        server.start()
    expect(chat.page.locator(".banner")).to_be_hidden(timeout=ANSWER_MS)
    chat.answer(1).get_by_role("button", name="Ask again").click()
    assert chat.text(1)
    expect(chat.turns).to_have_count(1)


def test_a_question_stopped_before_the_first_word(open_page: OpenPage, server: FakeServer) -> None:
    server.allow(0)
    chat = open_page(**PHONE)
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask(STORY)
    chat.page.get_by_role("button", name="Stop").click()
    note = chat.answer(1).locator(".note")
    expect(note).to_have_text("Stopped before the first word.", timeout=ANSWER_MS)
    expect(chat.conversations).to_have_count(0, timeout=ANSWER_MS)
    chat.page.reload()
    expect(chat.answer(1).locator(".note")).to_have_text("This question has no answer yet.")
    expect(chat.turns.nth(0).locator(".card img")).to_be_visible(timeout=ANSWER_MS)
    server.allow()
    chat.answer(1).get_by_role("button", name="Ask again").click()
    assert chat.text(1) == f"[image sheep.jpg] {STORY}"
    expect(chat.turns).to_have_count(1)
