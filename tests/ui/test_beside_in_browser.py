"""Two models answer one question side by side on the page, and somebody says which is better."""

import json
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, expect

from tests.ui.chat_page import PHONE, ChatPage
from tests.ui.conftest import OpenPage
from tests.ui.live import FakeServer
from tests.ui.test_models_in_browser import picker

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.two_models]


def side_by_side(chat: ChatPage, model: str) -> None:
    picker(chat).click()
    chat.page.get_by_label("Side by side with").select_option(model)
    chat.page.keyboard.press("Escape")


def columns(chat: ChatPage, turn: int = 1) -> Locator:
    return chat.turns.nth(turn - 1).locator(".pair .answer")


def better(chat: ChatPage) -> Locator:
    return chat.page.get_by_role("button", name="This answer is better")


def test_two_answers_grow_and_the_better_one_is_gone_on_with(
    open_page: OpenPage, two_server: FakeServer
) -> None:
    chat = open_page()
    side_by_side(chat, "ear")
    expect(picker(chat)).to_have_text("fake + ear")
    two_server.allow(3)
    chat.ask("Which one is it now?")
    texts = columns(chat).locator(".text")
    expect(texts).to_have_text(["[] Which one"] * 2)
    expect(columns(chat).locator("h2")).to_have_text(["fake", "ear"])
    chat.page.reload()  # both go on
    expect(texts).to_have_text(["[] Which one"] * 2)
    chat.page.get_by_role("button", name="Stop ear").click()
    expect(columns(chat).nth(1).locator(".note")).to_have_text("Stopped.")
    expect(better(chat)).to_have_count(0)  # one of them still grows
    two_server.allow()
    expect(texts).to_have_text(["[] Which one is it now?", "[] Which one"])
    expect(better(chat)).to_have_count(2)
    found = Axe().run(chat.page)
    assert found.violations_count == 0, found.generate_report()
    other = ChatPage(chat.page.context.new_page(), chat.url)
    other.page.goto(chat.page.url)
    expect(columns(other)).to_have_count(2)
    better(chat).nth(1).click()
    for tab in (chat, other):
        expect(columns(tab)).to_have_count(0)
        assert tab.text(1) == "[] Which one"
        expect(tab.versions).to_have_text("2/2")
        expect(tab.answer(1)).to_contain_text("You found this answer better than another one.")
        expect(picker(tab)).to_have_text("ear + fake")
    # The chat goes on with it, side by side again; nobody need decide.
    chat.ask("And then?")
    expect(columns(chat, 2).locator(".text")).to_have_text(["[] And then?"] * 2)
    expect(better(chat)).to_have_count(2)
    side_by_side(chat, "")
    expect(picker(chat)).to_have_text("ear")
    chat.ask("Last?")
    chat.answer(3)
    # Another version of the question takes nothing of the choice away.
    chat.turns.nth(0).get_by_role("button", name="Edit the question").click()
    chat.page.locator(".editing textarea").fill("Which one was it?")
    chat.page.locator(".editing textarea").press("Enter")
    expect(chat.versions).to_have_text("3/3")
    chat.answer(1)
    with chat.page.expect_download() as saved:
        chat.page.get_by_label("All chats").click()
        chat.press("Export preferences")
    (row,) = map(json.loads, Path(saved.value.path()).read_text().splitlines())
    assert row["prompt"] == [{"role": "user", "content": "Which one is it now?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "[] Which one "}]
    assert row["rejected"] == [{"role": "assistant", "content": "[] Which one is it now?"}]
    assert other.trouble == []


def test_one_model_refuses_and_the_other_answers(
    open_page: OpenPage, two_server: FakeServer, picture: Path
) -> None:
    two_server.allow()
    chat = open_page(**PHONE)
    side_by_side(chat, "ear")
    chat.attach(picture)
    chat.ask("What is it?")
    expect(columns(chat).nth(0).locator(".text")).to_have_text("[image red circle.png] What is it?")
    expect(columns(chat).nth(1).locator(".problem")).to_contain_text(
        "ear cannot read red circle.png"
    )
    expect(better(chat)).to_have_count(0)
    assert chat.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # The chat goes on; a model that sees none is told the names of earlier pictures.
    chat.ask("And now?")
    expect(columns(chat, 2).nth(0).locator(".text")).to_have_text("[image red circle.png] And now?")
    chat.page.reload()
    expect(chat.turns).to_have_count(2)
    expect(columns(chat)).to_have_count(0)  # of those that the chat went on from
    assert chat.text(1) == "[image red circle.png] What is it?"
