"""The page itself: media, settings, the keyboard, phones, keys, and everybody's access."""

from __future__ import annotations

import base64
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("playwright.sync_api")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from mico_ui.browser.turns import html_of
from tests.server.running import new_key
from tests.ui.chat_page import ANSWER_MS, DESK, PHONE, ChatPage
from tests.ui.conftest import EXAMPLES, OpenPage
from tests.ui.live import MiniSite

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SIZES = pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])


def test_files_that_are_no_media_are_refused_in_words_and_others_taken(
    chat: ChatPage, tmp_path: Path
) -> None:
    problem = chat.page.locator(".composer .chips-problem")
    for name, content, reason in (
        ("notes.txt", b"hello there", "the bytes look like text"),
        ("empty.png", b"", "the file is empty"),
        ("broken.jpg", (EXAMPLES / "sheep.jpg").read_bytes()[:700], "broken.jpg: damaged JPEG"),
        ("<img src=x onerror=alert(1)>.png", b"\x89PNG\r\n\x1a\n" + bytes(99), "onerror=alert(1)"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        chat.page.locator(".composer input[type=file]").set_input_files(str(path))
        expect(problem).to_contain_text(reason, timeout=ANSWER_MS)
        expect(chat.chips).to_have_count(0)
    chat.attach(EXAMPLES / "sheep.jpg")  # a good one takes the words away
    expect(problem).to_be_hidden()
    chat.page.get_by_role("button", name="Remove sheep.jpg").click()

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
    timer = chat.page.get_by_role("timer")

    def record(start: str, stop: str) -> None:
        chat.page.get_by_role("button", name=start).click()
        expect(timer).to_have_text("0:01", timeout=ANSWER_MS)
        chat.page.get_by_role("button", name=stop).click()
        expect(timer).to_be_hidden()

    def open_camera() -> None:
        chat.page.get_by_role("button", name="Camera").click()
        ready = "document.querySelector('dialog.camera video').videoWidth > 0"
        chat.page.wait_for_function(ready, timeout=ANSWER_MS)

    record("Record sound", "Stop recording")
    open_camera()
    chat.page.get_by_role("button", name="Take a picture").click()
    expect(chat.page.locator(".chip[data-kind=image]")).to_be_visible(timeout=ANSWER_MS)
    open_camera()
    record("Record a video", "Stop and attach")
    for kind in ("audio", "image", "video"):
        expect(chat.page.locator(f".chip[data-kind={kind}]")).to_be_visible(timeout=ANSWER_MS)
    chat.ask("What is this?")
    assert chat.text(1).startswith("[audio ")


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
    sheep = base64.b64encode((EXAMPLES / "sheep.jpg").read_bytes()).decode()
    chat.page.evaluate("text => { window.sheep = text; }", sheep)
    chat.page.evaluate(send, ["#mico-message", "paste"])
    expect(chat.chips).to_have_count(1, timeout=ANSWER_MS)
    chat.page.evaluate(send, [".log", "drop"])
    expect(chat.chips).to_have_count(2, timeout=ANSWER_MS)
    chat.page.get_by_role("button", name="Remove drop.jpg").click()
    expect(chat.chips).to_have_count(1)


@SIZES
def test_many_files_leave_the_message_box_in_the_window(
    open_page: OpenPage, size: dict[str, Any]
) -> None:
    n = 32
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


def test_media_are_looked_at_and_played_before_they_are_sent(chat: ChatPage) -> None:
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


def show(chat: ChatPage, answer: str, **view: Any) -> None:
    """A turn on the page, as if the server had kept it."""
    turn = {"state": "done", "message": "x", "media": [], "answer": answer, "turn": 1, **view}
    turn |= {"html": html_of(answer), "usage": None, "finish_reason": "stop", "problem": None}
    conversation = {"id": None, "title": "x", "turns": [turn]}
    chat.page.evaluate("shown => mico.showConversation(shown)", conversation)


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


def test_the_keyboard_alone(chat: ChatPage) -> None:
    keys = chat.page.keyboard
    expect(chat.message).to_be_focused()
    keys.type("Why?")
    chat.page.get_by_role("button", name="Send").click()
    chat.answer(1)
    expect(chat.message).to_be_focused()
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
    chat.page.locator(".skip").focus()
    keys.press("Enter")  # skip to the message box
    expect(chat.message).to_be_focused()
    chat.page.get_by_role("tab", name="Chat").focus()
    keys.press("ArrowRight")
    expect(chat.page.get_by_role("tab", name="Compare")).to_be_focused()
    expect(chat.page.get_by_role("heading", name="What belongs together?")).to_be_visible()
    keys.press("ArrowLeft")
    for opens, shown in (("More about Why?", "Rename"), ("Settings", "Done")):
        opener = chat.page.get_by_label(opens) if "More" in opens else None
        opener = opener or chat.page.get_by_role("button", name=opens)
        opener.focus()
        keys.press("Enter")
        expect(chat.page.get_by_role("button", name=shown)).to_be_visible()
        keys.press("Escape")
        expect(opener).to_be_focused()
    keys.press("Control+Shift+O")
    expect(chat.turns).to_have_count(0)
    expect(chat.message).to_be_focused()


def test_settings_that_are_empty_or_wrong(chat: ChatPage) -> None:
    def kept(**wanted: Any) -> None:
        found = """wanted => {
            const kept = JSON.parse(localStorage.getItem("mico-settings")) || {};
            return Object.entries(wanted).every(([name, value]) => kept[name] === value);
        }"""
        chat.page.wait_for_function(found, arg=wanted)

    chat.page.get_by_role("button", name="Settings").click()
    fields = {"Top-p": "0.9", "Repetition penalty": "1.2", "Seed": "7", "System prompt": "Rhyme."}
    fields["API key"] = "sk-not-a-key-that-is-needed"
    for label, value in fields.items():
        chat.page.get_by_label(label).fill(value)
    chat.page.get_by_role("button", name="Done").click()
    kept(
        top_p=0.9,
        repetition_penalty=1.2,
        seed=7,
        system="Rhyme.",
        max_tokens=None,
        key=fields["API key"],
    )

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


@pytest.mark.base_llm
def test_settings_are_sent_and_an_answer_goes_on_behind_its_limit(chat: ChatPage) -> None:
    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_label("Longest answer, in tokens").fill("4")
    chat.page.get_by_role("button", name="Done").click()
    chat.page.reload()
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


@pytest.mark.base_llm
def test_a_question_too_long_for_the_model(chat: ChatPage) -> None:
    chat.message.fill("sheep " * 9000)
    expect(chat.page.locator(".meter")).to_contain_text("too long", timeout=ANSWER_MS)
    chat.message.press("Enter")
    problem = chat.answer(1).locator(".problem")
    expect(problem).to_contain_text("8192")
    expect(problem).to_contain_text("Start a new chat")


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
def test_compare_says_how_far_its_scores_go(chat: ChatPage) -> None:
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


def test_fingers_find_everything(open_page: OpenPage) -> None:
    chat = open_page(**PHONE)
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
@pytest.mark.parametrize(
    ("scheme", "size"), [("light", DESK), ("dark", PHONE)], ids=["light desk", "dark phone"]
)
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
    if size is PHONE:
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
    if size is PHONE:
        chat.page.get_by_role("button", name="Close the list").click()
    chat.page.get_by_role("tab", name="Compare").click()
    chat.page.get_by_role("button", name="Show me an example").click()
    expect(chat.page.locator(".grid table")).to_be_visible(timeout=ANSWER_MS)
    check("a comparison")


def make_key(mini: MiniSite) -> str:
    """The secret of a new key. Playwright has the loop of this thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(new_key, mini.data, "me").result()


@pytest.mark.base_llm
def test_the_first_key_leaves_the_page_of_this_machine_as_it_was(
    chat: ChatPage, mini: MiniSite
) -> None:
    chat.ask("Name a colour.")
    assert chat.text(1)
    expect(chat.conversations).to_have_count(1, timeout=ANSWER_MS)

    make_key(mini)
    chat.page.reload()
    expect(chat.page.locator(".model")).to_contain_text("tokens", timeout=ANSWER_MS)
    expect(chat.conversations).to_have_count(1, timeout=ANSWER_MS)
    chat.ask("And another one?")
    assert chat.text(2)
    expect(chat.page.locator(".banner")).to_be_hidden()
    assert "ours-" not in mini.said()


@pytest.mark.base_llm
def test_who_comes_through_a_proxy_is_asked_for_a_key(mini: MiniSite, chromium: Browser) -> None:
    key = make_key(mini)
    proxied = {"x-forwarded-for": "203.0.113.7"}
    chat = ChatPage(chromium.new_context(extra_http_headers=proxied).new_page(), mini.url)
    chat.page.goto(chat.url)
    banner, field = chat.page.locator(".banner"), chat.page.get_by_label("API key")
    expect(banner).to_contain_text("This server asks for a key.", timeout=ANSWER_MS)
    expect(chat.page.locator(".model")).to_be_empty()

    def enter(text: str) -> None:
        banner.get_by_role("button", name="Open Settings").click()
        expect(field).to_be_focused()
        field.fill(text)
        chat.page.get_by_role("button", name="Done").click()

    enter("mico-guess")
    expect(banner).to_contain_text("The key in Settings is not valid here.", timeout=ANSWER_MS)
    enter(key)
    expect(banner).to_be_hidden(timeout=ANSWER_MS)
    chat.ask("Name a colour.")
    assert chat.text(1)
    assert chat.trouble == []
    chat.page.context.close()
