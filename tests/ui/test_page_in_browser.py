"""The page itself: refusals in words, recording, the keyboard, phones, and everybody's access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("playwright.sync_api")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.ui.chat_page import ANSWER_MS, ChatPage
from tests.ui.conftest import EXAMPLES, OpenPage

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


def test_files_that_are_no_media_are_refused_in_words(chat: ChatPage, tmp_path: Path) -> None:
    problem = chat.page.locator(".composer .chips-problem")
    for name, content, reason in (
        ("notes.txt", b"hello there", "the bytes look like text"),
        ("empty.png", b"", "the file is empty"),
        ("broken.jpg", (EXAMPLES / "sheep.jpg").read_bytes()[:700], "broken.jpg: truncated JPEG"),
        ("<img src=x onerror=alert(1)>.png", b"\x89PNG\r\n\x1a\n" + bytes(99), "onerror=alert(1)"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        chat.page.locator(".composer input[type=file]").set_input_files(str(path))
        expect(problem).to_contain_text(reason, timeout=ANSWER_MS)
        expect(chat.chips).to_have_count(0)
    chat.attach(EXAMPLES / "sheep.jpg")  # a good one takes the words away
    expect(problem).to_be_hidden()


def test_an_array_is_depth_and_its_distances_show(chat: ChatPage, tmp_path: Path) -> None:
    depth = np.linspace(0.5, 7.25, 64 * 48, dtype=np.float32).reshape(48, 64)
    depth[:4] = np.nan
    np.save(tmp_path / "room.npy", depth)
    chat.attach(tmp_path / "room.npy")
    assert chat.chips.get_attribute("data-kind") == "depth"
    expect(chat.chips).to_contain_text("farthest 7.25 m")


def test_markup_in_names_questions_and_titles_stays_text(chat: ChatPage, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    path = tmp_path / f"{hostile}.jpg"
    path.write_bytes((EXAMPLES / "sheep.jpg").read_bytes())
    chat.attach(path)
    chat.ask(f"{hostile} ${{1+1}} {{{{value}}}} `what` is it?")
    chat.answer(1)
    expect(chat.turns.nth(0).locator(".said")).to_contain_text(hostile)
    expect(chat.conversations.first).to_contain_text(hostile)
    assert chat.page.locator("img[src=x]").count() == 0


def test_a_sound_a_picture_and_a_video_are_recorded(chat: ChatPage) -> None:
    chat.page.get_by_role("button", name="Record sound").click()
    expect(chat.page.get_by_role("timer")).to_have_text("0:01", timeout=ANSWER_MS)
    chat.page.get_by_role("button", name="Stop recording").click()
    expect(chat.page.locator(".chip[data-kind=audio]")).to_be_visible(timeout=ANSWER_MS)
    for action, kind in (("Take a picture", "image"), ("Record a video", "video")):
        chat.page.get_by_role("button", name="Camera").click()
        chat.page.wait_for_function(
            "document.querySelector('dialog.camera video').videoWidth > 0", timeout=ANSWER_MS
        )
        chat.page.get_by_role("button", name=action).click()
        if kind == "video":
            expect(chat.page.get_by_role("timer")).to_have_text("0:01", timeout=ANSWER_MS)
            chat.page.get_by_role("button", name="Stop and attach").click()
        expect(chat.page.locator(f".chip[data-kind={kind}]")).to_be_visible(timeout=ANSWER_MS)
    chat.ask("What is this?")
    assert chat.text(1)


def test_files_are_pasted_and_dropped(chat: ChatPage) -> None:
    send = """([selector, kind]) => {
        const bytes = Uint8Array.from(atob(window.sheep), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], `${kind}.jpg`, { type: "image/jpeg" }));
        const options = { bubbles: true, cancelable: true };
        const event = kind === "paste"
            ? new ClipboardEvent("paste", { ...options, clipboardData: data })
            : new DragEvent("drop", { ...options, dataTransfer: data });
        document.querySelector(selector).dispatchEvent(event);
    }"""
    import base64

    sheep = base64.b64encode((EXAMPLES / "sheep.jpg").read_bytes()).decode()
    chat.page.evaluate("text => { window.sheep = text; }", sheep)
    chat.page.evaluate(send, ["#mico-message", "paste"])
    expect(chat.chips).to_have_count(1, timeout=ANSWER_MS)
    chat.page.evaluate(send, [".log", "drop"])
    expect(chat.chips).to_have_count(2, timeout=ANSWER_MS)
    chat.page.get_by_role("button", name="Remove drop.jpg").click()
    expect(chat.chips).to_have_count(1)


@pytest.mark.base_llm
def test_a_question_too_long_for_the_model(chat: ChatPage) -> None:
    chat.message.fill("sheep " * 9000)
    expect(chat.page.locator(".meter")).to_contain_text("too long", timeout=ANSWER_MS)
    chat.message.press("Enter")
    problem = chat.answer(1).locator(".problem")
    expect(problem).to_contain_text("8192")
    expect(problem).to_contain_text("Start a new chat")


def test_the_keyboard_alone(chat: ChatPage) -> None:
    keys = chat.page.keyboard
    chat.page.locator(".skip").focus()
    keys.press("Enter")  # skip to the message box
    expect(chat.message).to_be_focused()
    keys.type("Hello!")
    keys.press("Enter")
    chat.answer(1)
    expect(chat.message).to_be_focused()
    tab = chat.page.get_by_role("tab", name="Chat")
    tab.focus()
    keys.press("ArrowRight")
    expect(chat.page.get_by_role("tab", name="Compare")).to_be_focused()
    expect(chat.page.get_by_role("heading", name="What belongs together?")).to_be_visible()
    keys.press("ArrowLeft")
    chat.page.get_by_label("More about Hello!").focus()
    keys.press("Enter")
    expect(chat.page.get_by_role("button", name="Rename")).to_be_focused()
    keys.press("Escape")
    expect(chat.page.get_by_label("More about Hello!")).to_be_focused()
    chat.page.get_by_role("button", name="Settings").focus()
    keys.press("Enter")
    expect(chat.page.get_by_role("heading", name="Settings")).to_be_visible()
    keys.press("Escape")
    expect(chat.page.get_by_role("button", name="Settings")).to_be_focused()


@pytest.mark.base_llm
def test_settings_are_kept_and_sent(chat: ChatPage) -> None:
    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_label("Longest answer, in tokens").fill("3")
    chat.page.get_by_label("API key").fill("sk-not-a-key-that-is-needed")
    chat.page.get_by_role("button", name="Done").click()
    chat.page.reload()
    chat.ask("Tell me about the sea.")
    expect(chat.answer(1).locator(".note")).to_contain_text("3-token limit", timeout=ANSWER_MS)
    kept = chat.page.evaluate("JSON.parse(localStorage.getItem('mico-settings'))")
    assert (kept["max_tokens"], kept["key"]) == (3, "sk-not-a-key-that-is-needed")


@pytest.mark.base_llm
def test_media_and_sentences_are_compared(chat: ChatPage) -> None:
    chat.page.get_by_role("tab", name="Compare").click()
    chat.page.get_by_role("button", name="Compare", exact=True).click()
    expect(chat.page.locator(".compare-problem")).to_contain_text("at least two")
    chat.page.locator(".compare input[type=file]").set_input_files(
        [str(EXAMPLES / "sheep.jpg"), str(EXAMPLES / "snare-drum.flac")]
    )
    expect(chat.page.locator(".compare .chip[data-kind]")).to_have_count(2, timeout=ANSWER_MS)
    chat.page.get_by_label("Sentences, one on each line").fill("a sheep\n\na snare drum\n")
    chat.page.get_by_role("button", name="Compare", exact=True).click()
    rows = chat.page.locator(".grid tbody tr")
    expect(rows).to_have_count(4, timeout=ANSWER_MS)
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    names = [row.locator("th").inner_text().strip() for row in rows.all()]
    sheep, drum = names.index("sheep.jpg"), names.index("snare-drum.flac")

    def similarity(medium: int, text: str) -> float:
        return float(cells[medium][names.index(text)].split()[0])

    assert similarity(sheep, "a sheep") > similarity(sheep, "a snare drum")
    assert similarity(drum, "a snare drum") > similarity(drum, "a sheep")
    assert "match" in cells[sheep][names.index("a sheep")]
    assert "match" not in cells[sheep][drum]


@pytest.mark.base_llm
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{}, PHONE], ids=["desktop", "phone"])
def test_everybody_can_use_it(open_page: OpenPage, scheme: str, size: dict[str, Any]) -> None:
    chat = open_page(color_scheme=scheme, **size)
    axe = Axe()

    def check(what: str) -> None:
        found = axe.run(chat.page).response["violations"]
        bad = [one for one in found if one["impact"] in ("serious", "critical")]
        told = [(one["id"], [node["target"] for node in one["nodes"]]) for one in bad]
        assert told == [], what
        wide = chat.page.evaluate("document.querySelector('.mico').scrollWidth - innerWidth")
        assert wide <= 0, f"{what} is wider than the window"

    expect(chat.page.locator(".example img").first).to_be_visible(timeout=ANSWER_MS)
    check("an empty chat")
    chat.page.get_by_role("button", name="Which is farther away, the oval or the otter?").click()
    assert "otter" in chat.text(1).lower()
    chat.answer(1).locator("summary").click()
    chat.attach(EXAMPLES / "sheep.jpg")
    check("a conversation")
    if size:
        chat.page.get_by_role("button", name="Conversations").click()
    chat.page.locator(".menu summary").first.click()
    check("the menu of a conversation")
    chat.page.keyboard.press("Escape")
    chat.page.get_by_role("button", name="Settings").click()
    check("settings")
    chat.page.get_by_role("button", name="Done").click()
    chat.page.get_by_role("button", name="Keyboard shortcuts").click()
    check("the shortcuts")
    chat.page.keyboard.press("Escape")
    if size:
        chat.page.get_by_role("button", name="Close the list").click()
    chat.page.get_by_role("tab", name="Compare").click()
    chat.page.get_by_role("button", name="Show me an example").click()
    expect(chat.page.locator(".grid table")).to_be_visible(timeout=ANSWER_MS)
    check("a comparison")
