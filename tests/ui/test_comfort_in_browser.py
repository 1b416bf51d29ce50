"""What makes the page comfortable: nothing out of reach, nothing lost from sight, few clicks."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import expect

from mico_ui.browser.turns import html_of
from tests.ui.chat_page import ANSWER_MS, ChatPage
from tests.ui.conftest import EXAMPLES, OpenPage
from tests.ui.live import FakeServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

DESKTOP: dict[str, Any] = {}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])


def show(chat: ChatPage, answer: str, **view: Any) -> None:
    """A turn on the page, as if the server had kept it."""
    turn = {"state": "done", "message": "x", "media": [], "answer": answer, "turn": 1, **view}
    turn |= {"html": html_of(answer), "usage": None, "finish_reason": "stop", "problem": None}
    conversation = {"id": None, "title": "x", "turns": [turn]}
    chat.page.evaluate("shown => mico.showConversation(shown)", conversation)


@SIZES
@pytest.mark.parametrize("n", [9, 32])
def test_many_files_leave_the_message_box_in_the_window(
    open_page: OpenPage, size: dict[str, Any], n: int
) -> None:
    chat = open_page(**size)
    picture = (EXAMPLES / "sheep.jpg").read_bytes()
    name = f"{'a long name ' * 7}.jpg"
    files: Any = [
        {"name": f"{i} {name}", "mimeType": "image/jpeg", "buffer": picture + bytes([i])}
        for i in range(n)
    ]
    chat.page.locator(".composer input[type=file]").set_input_files(files)
    expect(chat.chips).to_have_count(n, timeout=ANSWER_MS)
    chat.message.fill("What are they?\n" * 40)
    for needed in (chat.message, chat.page.get_by_role("button", name="Send")):
        box = needed.bounding_box()
        assert box is not None
        height = chat.page.viewport_size["height"] if chat.page.viewport_size else 0
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= height
    expect(chat.page.get_by_role("button", name="Send")).to_be_enabled()
    chat.page.get_by_role("button", name=f"Remove 0 {name}").click()
    expect(chat.chips).to_have_count(n - 1)
    expect(chat.page.get_by_role("button", name=f"Remove 1 {name}")).to_be_focused()


@SIZES
def test_media_are_looked_at_and_played_before_they_are_sent(
    open_page: OpenPage, size: dict[str, Any]
) -> None:
    chat = open_page(**size)
    chat.attach(EXAMPLES / "sheep.jpg", EXAMPLES / "dragon.mp4")
    chat.page.get_by_role("button", name="Open sheep.jpg").click()
    picture = chat.page.locator("dialog.viewer img")
    expect(picture).to_be_visible(timeout=ANSWER_MS)
    before = picture.evaluate("element => element.clientWidth")
    chat.page.keyboard.press("Tab")
    chat.page.locator(".zoom").press("Enter")
    assert picture.evaluate("element => element.clientWidth") > before
    chat.page.keyboard.press("Escape")
    chat.page.get_by_role("button", name="Play dragon.mp4").click()
    expect(chat.page.locator("dialog.viewer video")).to_be_visible(timeout=ANSWER_MS)
    chat.page.keyboard.press("Escape")
    # A whole picture, with nobody's head cut off.
    thumbnail = chat.chips.first.locator("img")
    assert thumbnail.evaluate("element => getComputedStyle(element).objectFit") == "contain"


def test_how_far_an_upload_is(chat: ChatPage) -> None:
    watch = """() => {
        window.said = [];
        const list = document.querySelector(".composer .chips");
        const options = { childList: true, subtree: true, characterData: true };
        new MutationObserver(() => window.said.push(list.textContent)).observe(list, options);
    }"""
    chat.page.evaluate(watch)
    network = chat.page.context.new_cdp_session(chat.page)
    network.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 400_000}
    network.send("Network.emulateNetworkConditions", slow)
    content = (EXAMPLES / "sheep.jpg").read_bytes() + bytes(600_000)
    large: Any = {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": content}
    chat.page.locator(".composer input[type=file]").set_input_files(large)
    expect(chat.chips).to_have_count(1, timeout=ANSWER_MS)
    found = {int(n) for n in re.findall(r"sending: (\d+) %", " ".join(chat.page.evaluate("said")))}
    assert len(found) > 1
    assert max(found) < 100


def test_a_recording_shows_its_length(chat: ChatPage) -> None:
    for start, stop in (
        ("Record sound", "Stop recording"),
        ("Record a video", "Stop and attach"),
    ):
        if "video" in start:
            chat.page.get_by_role("button", name="Camera").click()
            ready = "document.querySelector('dialog.camera video').videoWidth > 0"
            chat.page.wait_for_function(ready, timeout=ANSWER_MS)
        chat.page.get_by_role("button", name=start).click()
        time = chat.page.get_by_role("timer")
        expect(time).to_have_text("0:01", timeout=ANSWER_MS)
        chat.page.get_by_role("button", name=stop).click()
        expect(time).to_be_hidden()


def test_code_is_coloured_and_copied(open_page: OpenPage) -> None:
    chat = open_page(permissions=["clipboard-read", "clipboard-write"])
    code = 'def add(a, b):\n    return a + b  # "<b>"\n'
    show(chat, f"Like so:\n\n```python\n{code}```\n\n```\nplain <b>\n```")
    colours = {
        chat.page.locator(f".text .hl-{name}").first.evaluate("e => getComputedStyle(e).color")
        for name in ("k", "nf", "c1", "n")
    }
    assert len(colours) == 4
    assert chat.page.locator(".text b").count() == 0
    chat.page.get_by_role("button", name="Copy the code").first.click()
    expect(chat.page.locator(".quiet")).to_have_text("Copied.")
    assert chat.page.evaluate("navigator.clipboard.readText()") == code


@pytest.mark.base_llm
def test_an_answer_goes_on_behind_its_limit(open_page: OpenPage) -> None:
    chat = open_page({"max_tokens": 4})
    chat.ask("Tell me a long story about a sheep and a dragon.")
    begun = chat.text(1)
    note = chat.answer(1).locator(".note")
    expect(note).to_have_text("Stopped at the 4-token limit. Raise it in Settings.")
    # Text alone has nothing to fold out.
    assert chat.answer(1).locator("details").count() == 0
    expect(chat.answer(1).locator(".usage")).to_contain_text("tokens a second")
    chat.page.get_by_role("button", name="Continue").click()
    expect(chat.turns.nth(0).locator(".text")).not_to_have_text(begun, timeout=ANSWER_MS)
    longer = chat.text(1)
    assert longer.startswith(begun)
    expect(chat.answer(1).locator(".usage")).to_contain_text("were already computed")
    chat.page.reload()
    assert chat.text(1) == longer
    expect(chat.turns).to_have_count(1)


def test_conversations_are_grouped_by_date(chat: ChatPage) -> None:
    chat.ask("Hello!")
    chat.answer(1)
    now = datetime.now()
    for days, group in (
        (0, "Today"),
        (1, "Yesterday"),
        (4, "Last 7 days"),
        (20, "Last 30 days"),
        (90, f"{now:%B %Y}"),
    ):
        chat.page.clock.set_fixed_time(now + timedelta(days=days))
        chat.page.reload()
        expect(chat.page.get_by_role("list", name=group)).to_contain_text(
            "Hello!", timeout=ANSWER_MS
        )
    assert chat.page.locator(".conversations ul").count() == 1


def test_the_message_box_has_the_focus_and_keys_do_the_rest(chat: ChatPage) -> None:
    keys = chat.page.keyboard
    expect(chat.message).to_be_focused()
    keys.type("Why?")
    expect(chat.message).to_have_value("Why?")
    chat.page.get_by_role("button", name="Send").click()
    expect(chat.message).to_be_focused()
    chat.answer(1)
    chat.page.locator(".log").focus()
    keys.press("?")
    dialog = chat.page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(dialog).to_contain_text("Stop the answer")
    keys.press("Escape")
    expect(dialog).to_be_hidden()
    keys.press("/")
    expect(chat.message).to_be_focused()
    keys.press("Control+k")
    expect(chat.page.get_by_label("Search conversations")).to_be_focused()
    keys.press("Control+Shift+O")
    expect(chat.turns).to_have_count(0)
    expect(chat.message).to_be_focused()


def test_escape_stops_an_answer(chat: ChatPage, server: FakeServer) -> None:
    server.allow(1)
    chat.ask("Tell me a long story about a sheep and a dragon.")
    expect(chat.turns.nth(0).locator(".text")).to_have_text("[]", timeout=ANSWER_MS)
    chat.page.keyboard.press("Escape")
    expect(chat.answer(1).locator(".note")).to_have_text("Stopped.", timeout=ANSWER_MS)


def test_settings_that_are_empty_or_wrong(chat: ChatPage) -> None:
    def kept(**wanted: Any) -> None:
        found = """wanted => {
            const kept = JSON.parse(localStorage.getItem("mico-settings")) || {};
            return Object.entries(wanted).every(([name, value]) => kept[name] === value);
        }"""
        chat.page.wait_for_function(found, arg=wanted)

    chat.page.get_by_role("button", name="Settings").click()
    fields = {"Top-p": "0.9", "Repetition penalty": "1.2", "Seed": "7", "System prompt": "Rhyme."}
    for label, value in fields.items():
        chat.page.get_by_label(label).fill(value)
    chat.page.get_by_role("button", name="Done").click()
    kept(top_p=0.9, repetition_penalty=1.2, seed=7, system="Rhyme.", max_tokens=None)

    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_label("Top-p").fill("3")
    chat.page.get_by_label("Seed").fill("")
    chat.page.get_by_role("button", name="Done").click()
    expect(
        chat.page.get_by_role("heading", name="Settings")
    ).to_be_visible()  # it says what is wrong
    chat.page.keyboard.press("Escape")
    kept(top_p=0.9, seed=None)
    chat.ask("Hello!")
    assert chat.text(1)


def test_a_calm_page_asks_for_little(open_page: OpenPage) -> None:
    chat = open_page()
    chat.page.clock.install()
    chat.page.reload()
    expect(chat.page.locator(".model")).to_contain_text("tokens", timeout=ANSWER_MS)
    expect(chat.page.locator(".example img").first).to_be_visible(timeout=ANSWER_MS)
    asked: list[str] = []
    chat.page.on("request", lambda request: asked.append(request.post_data or request.url))
    for _ in range(10):
        chat.page.clock.run_for(60_000)
    with chat.page.expect_request("**/robots.txt"):  # the browser tells of requests in their order
        chat.page.evaluate("fetch('robots.txt')")
    assert len(asked) <= 6, asked


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fingers_find_everything(open_page: OpenPage, scheme: str) -> None:
    chat = open_page(color_scheme=scheme, **PHONE)
    small = """() => Array.from(document.querySelectorAll(
            ".mico :is(button, summary, select, input, textarea)"))
        .filter((one) => one.checkVisibility({ visibilityProperty: true }))
        .map((one) => [one.outerHTML.slice(0, 90), one.getBoundingClientRect()])
        .filter(([, box]) => box.width < 43.9 || box.height < 43.9)
        .map(([name, box]) => `${name} ${box.width} x ${box.height}`)"""

    def check() -> None:
        assert chat.page.evaluate(small) == []

    check()
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask("What is it?")
    chat.answer(1)
    chat.attach(EXAMPLES / "snare-drum.flac")
    check()
    chat.page.get_by_role("button", name="New chat").click()  # in the header
    expect(chat.turns).to_have_count(0)
    chat.page.get_by_role("button", name="Conversations").click()
    check()
    chat.page.get_by_role("button", name="Settings").click()
    check()
    chat.page.get_by_role("button", name="Done").click()
    chat.page.get_by_role("button", name="Close the list").click()
    chat.page.get_by_role("tab", name="Compare").click()
    check()


@pytest.mark.base_llm
@SIZES
def test_a_photograph_comes_first_and_is_named(open_page: OpenPage, size: dict[str, Any]) -> None:
    chat = open_page(**size)
    first = chat.page.locator(".example").first
    expect(first).to_contain_text("CC0", timeout=ANSWER_MS)
    first.click()
    assert "espresso" in chat.text(1).lower()


@pytest.mark.base_llm
@SIZES
def test_compare_says_how_far_its_scores_go(open_page: OpenPage, size: dict[str, Any]) -> None:
    chat = open_page(**size)
    chat.page.get_by_role("tab", name="Compare").click()
    caution = chat.page.locator(".caution")
    expect(caution).to_contain_text("do not know real photographs")
    expect(caution).to_contain_text("11 %")
    assert "bright" not in chat.page.locator(".compare").inner_text()
    chat.page.get_by_role("button", name="Show me an example").click()
    rows = chat.page.locator(".grid tbody tr")
    expect(rows.first).to_be_visible(timeout=ANSWER_MS)
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    n = len(cells) // 2
    scores = [[float(cell.split()[0]) for cell in row[n:]] for row in cells[:n]]
    # Each medium fits its own sentence best, and each sentence its own medium.
    assert [row.index(max(row)) for row in scores] == list(range(n))
    assert [column.index(max(column)) for column in map(list, zip(*scores, strict=True))] == list(
        range(n)
    )
    said = " ".join(cell for row in cells for cell in row)
    values = [float(v) for v in re.findall(r"(?<!\S)-?\d\.\d\d", said)]
    legend = chat.page.locator(".legend .scale")
    expect(legend).to_contain_text(f"{min(values):.2f}")
    expect(legend).to_contain_text(f"{max(values):.2f}")
