"""Several models behind the page: the picker, and what each of them lets a user attach."""

from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, expect

from tests.server.support.sent import wav
from tests.ui.chat_page import PHONE, ChatPage
from tests.ui.conftest import OpenPage

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.two_models]

EVERYTHING = [
    *("picture", "sound", "video", "depth map", "normal map", "document"),
    "any of these",
]


@pytest.fixture
def beep(tmp_path: Path) -> Path:
    path = tmp_path / "beep.wav"
    path.write_bytes(wav())
    return path


def picker(chat: ChatPage) -> Locator:
    return chat.page.locator(".picker summary")


def choose(chat: ChatPage, model: str) -> None:
    picker(chat).click()
    chat.page.locator(".picker .menu-list button").filter(has_text=model).click()
    expect(picker(chat)).to_have_text(model)


def offered(chat: ChatPage) -> Locator:
    """What the attach button offers, once it is pressed."""
    chat.page.locator("summary[aria-label='Add files']").click()
    return chat.page.locator(".attach .menu-list button")


def drop(chat: ChatPage, file: Path) -> None:
    """Drop a file on the page."""
    chat.page.evaluate(
        """([name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
        }""",
        [file.name, list(file.read_bytes())],
    )


def test_a_model_that_hears_alone_is_offered_no_picture(
    chat: ChatPage, picture: Path, beep: Path
) -> None:
    problem = chat.page.locator(".composer .chips-problem")
    expect(picker(chat)).to_have_text("fake")
    picker(chat).click()
    listed = chat.page.locator(".picker .menu-list button small")
    everything, hearing, reading = listed.all_inner_texts()
    assert everything == "text, pictures, sounds, videos, depth maps, normal maps, documents"
    assert hearing.split(" · ")[0] == "text, sounds"
    assert reading.split(" · ")[0] == "text"
    chat.page.keyboard.press("Escape")
    expect(listed.first).to_be_hidden()
    expect(offered(chat)).to_have_text(EVERYTHING)
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("button", name="Camera")).to_be_visible()
    choose(chat, "ear")
    expect(offered(chat)).to_have_text(["sound"])
    expect(chat.page.get_by_role("button", name="Camera")).to_be_hidden()
    expect(chat.page.get_by_role("button", name="Record sound")).to_be_visible()
    expect(chat.page.locator(".welcome p")).to_contain_text("Add one or several sounds.")
    for kind in chat.page.locator(".example .kind").all_inner_texts():
        assert set(kind.split(" + ")) == {"sound"}
    drop(chat, picture)
    expect(problem).to_contain_text("red circle.png is a picture, but ear reads a sound.")
    expect(problem).to_contain_text("Choose another model for it.")
    expect(chat.chips).to_have_count(0)
    with chat.page.expect_file_chooser() as choosing:
        chat.page.locator(".attach .menu-list button", has_text="sound").click()
    assert choosing.value.element.get_attribute("accept") == "audio/*"
    choosing.value.set_files(str(beep))
    expect(chat.chips).to_have_count(1)
    expect(problem).to_be_hidden()
    chat.ask("What is it?")
    assert chat.text(1) == "[audio beep.wav] What is it?"
    expect(chat.page.locator(".model")).to_contain_text("1000 tokens")  # it is loaded by now


def test_what_another_model_cannot_read_is_not_sent(chat: ChatPage, picture: Path) -> None:
    chat.attach(picture)
    choose(chat, "ear")
    chat.ask("What is it?")
    problem = chat.page.locator(".composer .chips-problem")
    expect(problem).to_contain_text("ear does not read red circle.png.")
    expect(chat.message).to_have_value("What is it?")
    expect(chat.turns).to_have_count(0)
    choose(chat, "fake")
    chat.message.press("Enter")
    assert chat.text(1) == "[image red circle.png] What is it?"


def test_a_model_that_reads_text_alone_greets_with_no_media(chat: ChatPage) -> None:
    greeting = chat.page.locator(".welcome h2")
    expect(greeting).to_have_text("Ask about what you see and hear")
    choose(chat, "reader")
    expect(greeting).to_have_text("Ask anything")
    for device in ("microphone", "camera"):
        expect(chat.page.locator(f"[data-do={device}]")).to_be_hidden()
    expect(chat.page.locator("details.attach")).to_be_hidden()
    expect(chat.page.locator(".example")).to_have_count(0)
    chat.ask("Hello")
    assert chat.text(1) == "[] Hello"


def test_a_chat_about_a_picture_goes_on_with_a_model_that_sees_none(
    chat: ChatPage, picture: Path
) -> None:
    chat.attach(picture)
    chat.ask("What is it?")
    assert chat.text(1) == "[image red circle.png] What is it?"
    for turn, model in enumerate(("ear", "reader"), 2):
        choose(chat, model)
        chat.ask("And now?")
        assert chat.text(turn) == "[] And now?"


def test_a_conversation_and_a_browser_keep_their_model(chat: ChatPage) -> None:
    choose(chat, "ear")
    chat.ask("For the ear")
    chat.answer(1)
    chat.page.get_by_role("button", name="New chat").first.click()
    choose(chat, "fake")
    chat.ask("For the other")
    chat.answer(1)
    chat.conversations.filter(has_text="For the ear").click()
    expect(picker(chat)).to_have_text("ear")
    chat.open_anew()
    expect(picker(chat)).to_have_text("fake")  # the one that was chosen last


def test_the_picker_on_a_phone_and_for_everybody(open_page: OpenPage) -> None:
    chat = open_page(wait=False, **PHONE)
    expect(picker(chat)).to_be_visible()
    choose(chat, "ear")
    expect(offered(chat)).to_have_count(1)
    chat.page.keyboard.press("Escape")
    picker(chat).click()
    assert chat.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = Axe().run(chat.page)
    assert found.violations_count == 0, found.generate_report()
