"""The page itself: media, settings, the keyboard, phones, keys, and everybody's access."""

import base64
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("playwright.sync_api")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from mico_ui.browser.markup import html_of
from tests.server.support.running import new_key, revoke_keys
from tests.support.pdf import line, pdf
from tests.ui.chat_page import DESK, PHONE, ChatPage
from tests.ui.conftest import EXAMPLES, OpenPage
from tests.ui.live import FakeServer, MiniSite

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = "<img src=x onerror=alert(1)>"


def test_files_are_refused_in_words_or_taken(chat: ChatPage, tmp_path: Path) -> None:
    problem = chat.page.locator(".composer .chips-problem")
    sheep = (EXAMPLES / "sheep.jpg").read_bytes()
    for name, content, reason in (
        ("notes.txt", bytes(range(9)) * 9, "the bytes are of no known format"),
        ("blank.md", b" \n", "the file has no text"),
        ("empty.png", b"", "the file is empty"),
        ("broken.jpg", sheep[:700], "broken.jpg: damaged JPEG"),
        (f"{HOSTILE}.png", b"\x89PNG\r\n\x1a\n" + bytes(99), "onerror=alert(1)"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        chat.page.locator(".composer input[type=file]").set_input_files(str(path))
        expect(problem).to_contain_text(reason)
        expect(chat.chips).to_have_count(0)
    depth = np.linspace(0.5, 7.25, 64 * 48, dtype=np.float32).reshape(48, 64)
    depth[:4] = np.nan
    np.save(tmp_path / "room.npy", depth)
    chat.attach(tmp_path / "room.npy")  # a good file takes the words away
    expect(problem).to_be_hidden()
    assert chat.chips.get_attribute("data-kind") == "depth"
    expect(chat.chips).to_contain_text("farthest 7.25 m")
    chat.press("Remove room.npy")
    # Markup in names, questions and titles stays text.
    (tmp_path / f"{HOSTILE}.jpg").write_bytes(sheep)
    chat.attach(tmp_path / f"{HOSTILE}.jpg")
    chat.ask(f"{HOSTILE} ${{1+1}} {{{{value}}}} `what` is it?")
    chat.answer(1)
    expect(chat.turns.nth(0).locator(".said")).to_contain_text(HOSTILE)
    expect(chat.conversations.first).to_contain_text(HOSTILE)
    assert chat.page.locator("img[src=x]").count() == 0


def test_a_sound_a_picture_and_a_video_are_recorded(chat: ChatPage) -> None:
    timer = chat.page.get_by_role("timer")

    def record(start: str, stop: str) -> None:
        chat.press(start)
        expect(timer).to_have_text("0:01")
        chat.press(stop)
        expect(timer).to_be_hidden()

    def open_camera() -> None:
        chat.press("Camera")
        ready = "document.querySelector('dialog.camera video').videoWidth > 0"
        chat.page.wait_for_function(ready)

    record("Record sound", "Stop recording")
    open_camera()
    chat.press("Take a picture")
    expect(chat.page.locator(".chip[data-kind=image]")).to_be_visible()
    open_camera()
    chat.press("Record a video")
    expect(timer).to_have_text("0:01")
    chat.page.keyboard.press("Escape")  # takes nothing along
    expect(chat.page.locator("dialog.camera")).to_be_hidden()
    open_camera()
    record("Record a video", "Stop and attach")
    expect(chat.page.locator(".chip[data-kind=video]")).to_be_visible()
    expect(chat.chips).to_have_count(3)
    for kind in ("audio", "image", "video"):
        expect(chat.page.locator(f".chip[data-kind={kind}]")).to_be_visible()
    chat.ask("What is this?")
    assert chat.text(1).startswith("[audio ")


@pytest.mark.parametrize(("device", "first"), [(DESK, "user"), (PHONE, "environment")])
def test_the_camera_is_turned_round(
    open_page: OpenPage, device: dict[str, Any], first: str
) -> None:
    chat = open_page(**device, is_mobile=device is PHONE)
    chat.page.evaluate(
        """() => {
            const { mediaDevices } = navigator;
            const ask = mediaDevices.getUserMedia.bind(mediaDevices);
            window.asked = [];
            mediaDevices.getUserMedia = (wanted) => {
                window.asked.push(wanted.video.facingMode.ideal);
                return ask({ video: true });
            };
            mediaDevices.enumerateDevices = async () => [1, 2].map(() => ({ kind: "videoinput" }));
        }"""
    )
    chat.press("Camera")
    other = "user" if first == "environment" else "environment"
    for asked in ([first, other], [first, other, first]):
        chat.press("Other camera")
        chat.page.wait_for_function(f"String(window.asked) === '{','.join(asked)}'")
    chat.press("Close")
    expect(chat.chips).to_have_count(0)


@pytest.mark.base_llm
def test_a_recording_becomes_the_words_in_it(chat: ChatPage, talk: Path) -> None:
    chat.message.fill("Listen:")
    chat.attach(talk)
    kind = chat.page.get_by_label("Show talk.wav as")
    expect(kind.get_by_text("as text")).to_have_count(1)
    kind.select_option("as text")
    expect(chat.message).to_have_value(re.compile("^Listen:\\n.*close the window"))
    expect(chat.chips).to_have_count(0)


def test_what_is_read_after_attaching_comes_to_its_chip_and_takes_no_focus(chat: ChatPage) -> None:
    chat.page.evaluate(
        """() => {
            const { call } = mico;
            window.tokens = 50;
            mico.call = async (name, given) => {
                const found = await call(name, given);
                for (const one of found?.cards || []) Object.assign(one, { tokens, spoken: "Ha" });
                return found;
            };
        }"""
    )
    chat.attach(EXAMPLES / "sheep.jpg")
    expect(chat.chips).to_contain_text("50 tokens")
    expect(chat.chips.locator("option", has_text="as text")).to_have_count(1)
    remove = chat.page.get_by_label("Remove sheep.jpg")
    remove.focus()
    chat.page.evaluate("() => { window.tokens = 99; mico.attachments.onchange(); }")
    expect(chat.chips).to_contain_text("99 tokens")
    expect(remove).to_be_focused()


def test_files_are_pasted_dropped_looked_at_and_played(chat: ChatPage) -> None:
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
    for n, (place, kind) in enumerate((("#mico-message", "paste"), (".log", "drop")), 1):
        chat.page.evaluate(send, [place, kind])
        expect(chat.chips).to_have_count(n)
    chat.press("Remove drop.jpg")
    expect(chat.chips).to_have_count(1)
    # A whole picture, with nobody's head cut off.
    thumbnail = chat.chips.first.locator("img")
    assert thumbnail.evaluate("element => getComputedStyle(element).objectFit") == "contain"

    chat.attach(EXAMPLES / "dragon.mp4")
    chat.press("Open paste.jpg")
    picture = chat.page.locator("dialog.viewer img")
    expect(picture).to_be_visible()
    before = picture.evaluate("element => element.clientWidth")
    chat.page.keyboard.press("Tab")
    chat.page.locator(".zoom").press("Enter")
    assert picture.evaluate("element => element.clientWidth") > before
    chat.page.keyboard.press("Escape")
    chat.press("Play dragon.mp4")
    expect(chat.page.locator("dialog.viewer video")).to_be_visible()


def test_many_files_leave_the_message_box_in_the_window(open_page: OpenPage) -> None:
    n = 32
    chat = open_page(**PHONE)
    picture = (EXAMPLES / "sheep.jpg").read_bytes()
    name = f"{'a long name ' * 7}.jpg"
    files: Any = [
        {"name": f"{i} {name}", "mimeType": "image/jpeg", "buffer": picture + bytes([i])}
        for i in range(n)
    ]
    chat.page.locator(".composer input[type=file]").set_input_files(files)
    expect(chat.chips).to_have_count(n)
    chat.message.fill("What are they?\n" * 40)
    send = chat.page.get_by_role("button", name="Send")
    cost = chat.page.locator(".meter > span").last
    expect(cost).to_contain_text("tokens + up to")
    for size in (PHONE, DESK):
        chat.page.set_viewport_size(size["viewport"])
        assert cost.evaluate("element => element.offsetHeight") < 30, "it is in one line"
        for needed in (chat.message, send):
            expect(needed).to_be_in_viewport(ratio=1)
    expect(send).to_be_enabled()
    chat.press(f"Remove 0 {name}")
    expect(chat.chips).to_have_count(n - 1)
    expect(chat.page.get_by_role("button", name=f"Remove 1 {name}")).to_be_focused()


def test_an_upload_shows_its_progress(chat: ChatPage) -> None:
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
    expect(chat.chips).to_have_count(1)
    found = {int(n) for n in re.findall(r"sending: (\d+) %", " ".join(chat.page.evaluate("said")))}
    assert len(found) > 1
    assert max(found) < 100


def test_a_refused_upload_says_why(chat: ChatPage, tmp_path: Path) -> None:
    (tmp_path / "long.jpg").write_bytes(bytes(20 << 20))  # is refused before it has arrived
    problem = chat.page.locator(".composer .chips-problem")
    add = chat.page.locator(".composer input[type=file]").set_input_files
    chat.page.evaluate("mico.profile = () => ({ user: 'nobody', key: '' })")
    add(str(tmp_path / "long.jpg"))
    expect(problem).to_contain_text("user: String should match pattern")
    chat.page.evaluate("mico.largest = 19 << 20")
    add(str(tmp_path / "long.jpg"))
    expect(problem).to_contain_text("long.jpg: the file is too large: at most 19 MB")
    expect(chat.chips).to_have_count(0)


def turn(answer: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "state": "done",
        "message": "x",
        "media": [],
        "answer": answer,
        "problem": None,
    }
    return {**found, "html": html_of(answer), "usage": None, "finish_reason": "stop", **more}


def show(chat: ChatPage, *turns: dict[str, Any]) -> None:
    numbered = [{**turn, "turn": n} for n, turn in enumerate(turns, 1)]
    shown = {"id": None, "title": "x", "turns": numbered}
    chat.page.evaluate("shown => mico.showConversation(shown)", shown)


def test_code_is_coloured_and_copied(open_page: OpenPage) -> None:
    chat = open_page(permissions=["clipboard-read", "clipboard-write"])
    code = 'def add(a, b):\n    return a + b  # "<b>"\n'
    show(chat, turn(f"Like so:\n\n```python\n{code}```\n\n```\nplain <b>\n```"))
    colours = {
        chat.page.locator(f".text .hl-{name}").first.evaluate("e => getComputedStyle(e).color")
        for name in ("k", "nf", "c1", "n")
    }
    assert len(colours) == 4
    assert chat.page.locator(".text b").count() == 0
    chat.page.get_by_role("button", name="Copy the code").first.click()
    expect(chat.page.locator(".quiet")).to_have_text("Copied.")
    assert chat.page.evaluate("navigator.clipboard.readText()") == code


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_unsure_answer_says_so(open_page: OpenPage, scheme: str) -> None:
    chat = open_page(color_scheme=scheme)
    show(chat, *(turn("A cat.", **more) for more in ({"unsure": True}, {"unsure": False}, {})))
    mark = chat.page.locator(".unsure")
    expect(mark).to_have_count(1)
    expect(chat.answer(1).locator(".unsure")).to_have_text("(not sure)")
    expect(mark).to_have_attribute("title", re.compile("low probability"))
    assert barriers(chat) == []


def test_conversations_are_grouped_by_date(chat: ChatPage) -> None:
    chat.ask("Hello!")
    chat.answer(1)
    now = datetime.now()
    groups = ((0, "Today"), (1, "Yesterday"), (4, "Last 7 days"), (20, "Last 30 days"))
    for days, group in (*groups, (90, f"{now:%B %Y}")):
        chat.page.clock.set_fixed_time(now + timedelta(days=days))
        chat.page.reload()
        found = chat.page.get_by_role("list", name=group)
        expect(found).to_contain_text("Hello!")
    assert chat.page.locator(".conversations ul").count() == 1


def test_the_keyboard_alone(chat: ChatPage) -> None:
    keys = chat.page.keyboard
    expect(chat.message).to_be_focused()
    keys.type("Why?")
    chat.press("Send")
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


def test_a_menu_stays_open_when_the_list_is_loaded_anew(chat: ChatPage) -> None:
    chat.ask("Why?")
    chat.answer(1)
    chat.page.get_by_label("More about Why?").click()
    chat.page.evaluate(
        "document.querySelector('.conversations ul').dataset.old = 'yes'; mico.emit('list')"
    )
    expect(chat.page.locator(".conversations ul[data-old]")).to_have_count(0)
    chat.page.get_by_role("button", name="Rename").click()
    chat.page.get_by_label("New title").fill("Because")
    chat.page.keyboard.press("Enter")
    expect(chat.conversations).to_have_text(["Because"])


def test_settings_that_are_empty_or_wrong(chat: ChatPage) -> None:
    def change(fields: dict[str, str], kept: dict[str, Any]) -> None:
        """Fill in fields, by their labels, and check the settings that the browser keeps then."""
        chat.press("Settings")
        for label, value in fields.items():
            chat.page.locator("dialog.settings").get_by_label(label).fill(value)
        chat.press("Done")
        found = """wanted => {
            const kept = JSON.parse(localStorage.getItem("mico-settings")) || {};
            return Object.entries(wanted).every(([name, value]) => kept[name] === value);
        }"""
        chat.page.wait_for_function(found, arg=kept)

    key = "sk-not-a-key-that-is-needed"
    fields = {"Top-p": "0.9", "Repetition penalty": "1.2", "Seed": "7", "System prompt": "Rhyme."}
    kept = {"top_p": 0.9, "repetition_penalty": 1.2, "seed": 7, "system": "Rhyme."}
    change({**fields, "API key": key}, {**kept, "key": key, "max_tokens": None})
    change({"Top-p": "3", "Seed": ""}, {"top_p": 0.9})
    # The dialog stays, and says what is wrong.
    expect(chat.page.get_by_role("heading", name="Settings")).to_be_visible()
    chat.page.keyboard.press("Escape")
    seedless = "() => JSON.parse(localStorage.getItem('mico-settings')).seed === null"
    chat.page.wait_for_function(seedless)
    chat.ask("Hello!")
    assert chat.text(1)


@pytest.mark.base_llm
def test_an_answer_goes_on_behind_its_limit_and_a_long_question_is_refused(chat: ChatPage) -> None:
    chat.press("Settings")
    chat.page.get_by_label("Longest answer, in tokens").fill("4")
    chat.press("Done")
    chat.page.reload()
    chat.ask("Tell me a long story about a sheep and a dragon.")
    begun = chat.text(1)
    note = chat.answer(1).locator(".note")
    expect(note).to_have_text("Stopped at the 4-token limit. Raise it in Settings.")
    # Text alone has nothing to fold out.
    assert chat.answer(1).locator("details.report:not(.cost)").count() == 0
    expect(chat.answer(1).locator(".usage")).to_contain_text("tokens a second")
    chat.press("Continue")
    expect(chat.growing).not_to_have_text(begun)
    longer = chat.text(1)
    assert longer.startswith(begun)
    expect(chat.answer(1).locator(".usage")).to_contain_text("were already computed")
    chat.page.reload()
    assert chat.text(1) == longer
    expect(chat.turns).to_have_count(1)
    chat.message.fill("sheep " * 9000)
    expect(chat.page.locator(".meter")).to_contain_text("too long")
    chat.message.press("Enter")
    expect(chat.problem(2)).to_contain_text("8192")
    expect(chat.problem(2)).to_contain_text("Start a new chat")


def test_a_calm_page_asks_for_little(chat: ChatPage) -> None:
    chat.page.clock.install()
    chat.page.reload()
    expect(chat.page.locator(".model")).to_contain_text("tokens")
    expect(chat.page.locator(".example img").first).to_be_visible()
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
    caution = chat.page.locator(".caution")
    expect(caution).to_contain_text("right name for 64 %")
    compare = chat.page.get_by_role("button", name="Compare", exact=True)
    compare.click()
    expect(chat.page.locator(".compare-problem")).to_contain_text("at least two")
    chat.press("Show me an example")
    rows = chat.page.locator(".grid tbody tr")
    expect(rows.first).to_be_visible()
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    n = len(cells) // 2
    # Each medium fits its own sentence best, and each sentence its own medium.
    scores = np.array([[float(cell.split()[0]) for cell in row[n:]] for row in cells[:n]])
    assert scores.argmax(0).tolist() == scores.argmax(1).tolist() == list(range(n))
    said = " ".join(cell for row in cells for cell in row)
    values = [float(v) for v in re.findall(r"(?<!\S)-?\d\.\d\d", said)]
    legend = chat.page.locator(".legend .scale")
    expect(legend).to_contain_text(f"{min(values):.2f}")
    expect(legend).to_contain_text(f"{max(values):.2f}")

    chat.page.locator(".compare input[type=file]").set_input_files(str(EXAMPLES / "box.normal.png"))
    files = chat.page.locator(".compare .chip[data-kind]")
    expect(files).to_have_count(n + 1)
    chat.page.get_by_label("Sentences, one on each line").fill("a sheep\n\na snare drum\n")
    compare.click()
    expect(rows).to_have_count(n + 3)


def barriers(chat: ChatPage) -> list[Any]:
    """What keeps some people from using the page, and the elements that do."""
    found = Axe().run(chat.page).response["violations"]
    return [(one["id"], [node["target"] for node in one["nodes"]]) for one in found]


TOO_SMALL = """() => Array.from(document.querySelectorAll(
        ".mico :is(button, summary, select, input, textarea)"))
    .filter((one) => one.checkVisibility({ visibilityProperty: true }))
    .map((one) => [one.outerHTML.slice(0, 90), one.getBoundingClientRect()])
    .filter(([, box]) => box.width < 43.9 || box.height < 43.9)
    .map(([name, box]) => `${name} ${box.width} x ${box.height}`)"""


@pytest.mark.base_llm
@pytest.mark.parametrize(
    ("scheme", "size"), [("light", DESK), ("dark", PHONE)], ids=["light desk", "dark phone"]
)
def test_everybody_can_use_it(open_page: OpenPage, scheme: str, size: dict[str, Any]) -> None:
    chat = open_page(color_scheme=scheme, **size)

    def check(what: str) -> None:
        assert barriers(chat) == [], what
        wide = chat.page.evaluate("document.querySelector('.mico').scrollWidth - innerWidth")
        assert wide <= 0, f"{what} is wider than the window"
        if size is PHONE:
            assert chat.page.evaluate(TOO_SMALL) == [], f"{what}: fingers need 44 pixels"

    expect(chat.page.locator(".example img").first).to_be_visible()
    check("an empty chat")
    chat.press("What animal is this?")
    assert "panda" in chat.text(1).lower()
    chat.answer(1).locator("summary").click()
    chat.attach(EXAMPLES / "sheep.jpg")
    check("a conversation")
    if size is PHONE:
        chat.press("Conversations")
    chat.page.locator(".menu summary").first.click()
    check("the menu of a conversation")
    chat.page.keyboard.press("Escape")
    chat.press("Settings")
    check("settings")
    chat.press("Done")
    chat.press("Keyboard shortcuts")
    check("the shortcuts")
    chat.page.keyboard.press("Escape")
    if size is PHONE:
        chat.press("Close the list")
    chat.page.get_by_role("tab", name="Compare").click()
    chat.press("Show me an example")
    expect(chat.page.locator(".grid table")).to_be_visible()
    check("a comparison")


@pytest.mark.parametrize(
    ("scheme", "size", "way"),
    [
        ("light", DESK, "ltr"),
        ("dark", PHONE, "ltr"),
        ("dark", DESK, "rtl"),
        ("light", PHONE, "rtl"),
    ],
    ids=["light desk", "dark phone", "dark desk to the left", "light phone to the left"],
)
def test_no_state_of_the_page_has_a_barrier(
    open_page: OpenPage, server: FakeServer, tmp_path: Path,
    scheme: str, size: dict[str, Any], way: str,
) -> None:  # fmt: skip
    chat = open_page(color_scheme=scheme, bypass_csp=False, **size)
    if way:  # as a browser's translation makes it
        chat.page.evaluate("Object.assign(document.documentElement, { dir: 'rtl', lang: 'ar' })")
    found: dict[str, list[Any]] = {}

    def check(state: str, *shown: str) -> None:
        """Once all that is ``shown``, by CSS selectors, is there."""
        for one in shown:
            expect(chat.page.locator(one).first).to_be_visible()
        found[state] = barriers(chat)
        wide = chat.page.evaluate("document.querySelector('.mico').scrollWidth - innerWidth")
        found[state] += [f"{wide} pixels wider than the window"] if wide > 0 else []

    check("an empty page", ".example img")
    (tmp_path / "bad.jpg").write_bytes((EXAMPLES / "sheep.jpg").read_bytes()[:700])
    chat.page.locator(".composer input[type=file]").set_input_files(str(tmp_path / "bad.jpg"))
    check("a file that is refused", ".composer .chips-problem")
    chat.attach(EXAMPLES / "sheep.jpg", EXAMPLES / "dragon.mp4")
    check("files in the composer", ".composer .chip")
    chat.ask("ما هذا؟ **What** is this? `code` $x^2$\n\n| a | b |\n|---|---|\n| 1 | 2 |")
    chat.answer(1).locator("details.report summary").first.click()
    check("an answer, its report open", ".report figure")
    chat.turns.nth(0).get_by_role("button", name="Edit the question").click()
    check("a question that is edited", ".editing textarea")
    chat.page.keyboard.press("Escape")
    server.allow(1)
    chat.ask("Slow?")
    check("an answer that grows", "[data-do=stop]")
    chat.press("Stop")
    chat.expect_stopped(turn=2)
    server.allow()
    chat.ask("refuse this")
    check("an answer that failed", ".answer .problem")
    if size is PHONE:
        chat.press("Conversations")
    menus = f"{'.side' if size is PHONE else '.mico'} details.menu > summary:visible"
    for number, menu in enumerate(chat.page.locator(menus).all()):
        menu.click()
        check(f"menu {number}", "details.menu[open] .menu-list")
        chat.page.keyboard.press("Escape")
    chat.page.evaluate("void mico.confirm('Delete it?', 'Delete')")
    check("a question of the page", "dialog.confirm")
    chat.page.keyboard.press("Escape")
    for name in ("settings", "help", "camera", "viewer", "talk"):
        chat.page.evaluate(f"document.querySelector('dialog.{name}').showModal()")
        check(name, f"dialog.{name}")
        chat.page.evaluate(f"document.querySelector('dialog.{name}').close()")
    if size is PHONE:
        chat.press("Close the list")
    chat.page.get_by_role("tab", name="Compare").click()
    chat.page.get_by_role("button", name="Compare", exact=True).click()
    check("a comparison of nothing", ".compare-problem")
    server.kill()
    chat.page.evaluate("mico.check()")
    check("a server that is away", ".banner")
    server.start()
    assert {state: bad for state, bad in found.items() if bad} == {}


def test_a_page_that_runs_to_the_left_is_mirrored_and_texts_run_as_their_letters_do(
    open_page: OpenPage,
) -> None:
    chat = open_page()
    for n, question in enumerate(("ما هذا؟\n\n- اثنان", "What is it?\n\n- one\n\n```\nx\n```"), 1):
        chat.ask(question)
        chat.answer(n)

    def middles(*selectors: str) -> list[float]:
        shown = [chat.page.locator(one).first for one in selectors]
        for one in shown:
            expect(one).to_be_visible()  # "Send" comes back a moment after an answer has ended
        boxes: list[Any] = [one.bounding_box() for one in shown]
        return [box["x"] + box["width"] / 2 for box in boxes]

    def turn(way: str) -> None:
        chat.page.evaluate("way => document.documentElement.dir = way", way)

    parts = (".side", ".model", ".said", "button.send", "[data-do=settings]", "[role=tab]")
    usual = middles(*parts)
    assert usual[0] < 200 < 800 < usual[1]
    turn("rtl")
    assert middles(*parts) == pytest.approx([DESK["viewport"]["width"] - x for x in usual], abs=12)

    # By how much a text is nearer to the right edge of its paragraph than to the left one.
    nearer = """([selector, n]) => {
      const [range, element] = [new Range(), document.querySelectorAll(selector)[n]];
      range.selectNodeContents(element);
      const [text, box] = [range, element].map((one) => one.getBoundingClientRect());
      return text.left - box.left - (box.right - text.right);
    }"""
    for way in ("rtl", "ltr"):
        turn(way)
        for selector in (".answer .text p", ".answer .text li"):
            found = [chat.page.evaluate(nearer, [selector, n]) for n in (0, 1)]
            assert found[0] > 100 > -100 > found[1], (way, selector)
        assert chat.page.evaluate(nearer, [".code pre", 0]) < -100, way


@pytest.mark.base_llm
def test_only_visitors_through_a_proxy_need_a_key(
    mini: MiniSite, open_page: OpenPage, request: pytest.FixtureRequest
) -> None:
    def apart(work: Callable[..., Any], *given: Any) -> Any:
        with ThreadPoolExecutor(1) as thread:  # Playwright has the loop of this thread
            return thread.submit(work, *given).result()

    chat = open_page(home=True)
    chat.ask("Name a colour.")
    assert chat.text(1)
    key = apart(new_key, mini.data, "me")
    request.addfinalizer(lambda: apart(revoke_keys, mini.data))
    # The first key leaves the page of this machine as it was.
    chat.page.reload()
    expect(chat.page.locator(".model")).to_contain_text("tokens")
    expect(chat.conversations).to_have_count(1)
    assert chat.text(1)  # the conversation is open again
    chat.ask("And another one?")
    assert chat.text(2)
    expect(chat.banner).to_be_hidden()
    assert "ours-" not in mini.said()

    proxied = open_page(wait=False)
    expect(proxied.banner).to_contain_text("This server asks for a key.")
    expect(proxied.page.locator(".model")).to_be_empty()

    def enter(text: str) -> None:
        proxied.banner.get_by_role("button", name="Open Settings").click()
        expect(proxied.page.get_by_label("API key")).to_be_focused()
        proxied.page.get_by_label("API key").fill(text)
        proxied.press("Done")

    enter("mico-guess")
    expect(proxied.banner).to_contain_text("is not valid here.")
    enter(key)
    expect(proxied.banner).to_be_hidden()
    proxied.ask("Name a colour.")
    assert proxied.text(1)


def test_depth_is_estimated_of_a_picture(chat: ChatPage) -> None:
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.press("Estimate the depth of sheep.jpg")
    expect(chat.chips).to_have_count(2)
    depth = chat.chips.nth(1)
    assert depth.get_attribute("data-kind") == "depth"
    expect(depth.locator("img")).to_have_attribute("alt", re.compile("^estimated depth map"))
    expect(depth).to_contain_text("nearest 2.00 m")
    expect(chat.page.get_by_role("button", name="Estimate the depth")).to_have_count(0)
    chat.ask("How far?")
    assert chat.text(1) == "[image sheep.jpg, depth depth of sheep.jpg.png] How far?"
    chat.answer(1).locator("details.report summary").click()
    expect(chat.answer(1).locator(".report")).to_contain_text("estimated by fake-depth")


def test_a_document_is_dropped_and_its_pages_are_looked_at(chat: ChatPage) -> None:
    send = """text => {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "farm.pdf", { type: "application/pdf" }));
        const options = { bubbles: true, cancelable: true, dataTransfer: data };
        document.querySelector(".log").dispatchEvent(new DragEvent("drop", options));
    }"""
    file = pdf(line("Our flock"), line("has 37 sheep."))
    chat.page.evaluate(send, base64.b64encode(file).decode())
    expect(chat.chips).to_have_count(1)
    assert chat.chips.get_attribute("data-kind") == "document"
    chat.press("Open farm.pdf")
    pages = chat.page.locator("dialog.viewer img")
    expect(pages).to_have_count(2)
    assert pages.last.get_attribute("alt") == "page 2 of farm.pdf"
    chat.page.keyboard.press("Escape")
    chat.ask("How many?")
    assert chat.text(1) == "[document farm.pdf] How many?"
    report = chat.answer(1).locator("details.report")
    report.locator("summary").click()
    expect(report).to_contain_text("What was taken from the document")
    expect(report.locator("figcaption", has_text="page 2")).to_be_visible()


def test_a_text_is_read_page_by_page(chat: ChatPage, tmp_path: Path) -> None:
    leaves = [f"This is leaf {n}, <b>{HOSTILE}</b>\n{'x' * 1900}" for n in range(1, 61)]
    (tmp_path / "notes.md").write_text("\f".join(leaves))
    chat.attach(tmp_path / "notes.md")
    assert chat.chips.get_attribute("data-kind") == "document"
    expect(chat.chips).to_contain_text("of 60 pages")
    expect(chat.chips.locator(".leaf")).to_contain_text("This is leaf 1,")
    chat.press("Open notes.md")
    viewer = chat.page.locator("dialog.viewer")
    expect(viewer.locator("pre").first).to_contain_text("This is leaf 1,")
    assert barriers(chat) == []
    chat.page.keyboard.press("Escape")
    chat.ask("What is on page 58?")
    sent = chat.answer(1).locator(".left-out")
    expect(sent).to_contain_text(re.compile(r"notes.md: pages 1 to 5\d and 58 of 60 are sent\."))
    report = chat.answer(1).locator("details.report")
    report.locator("summary").first.click()
    report.get_by_text("Text of page 58").click()
    expect(report.locator("pre", has_text="This is leaf 58,")).to_be_visible()
    expect(report.locator("pre", has_text="This is leaf 57,")).to_have_count(0)
    assert barriers(chat) == []
    chat.ask("And the last page?")
    expect(chat.answer(2).locator(".left-out")).to_contain_text("58 and 60 of 60 are sent")
    chat.page.reload()
    expect(chat.answer(2).locator(".left-out")).to_contain_text("58 and 60 of 60 are sent")
    expect(chat.turns.nth(0).locator(".leaf")).to_contain_text("This is leaf 1,")
    first = chat.turns.nth(0)
    first.get_by_role("button", name="Edit the question").click()
    first.locator(".editing textarea").fill("No page at all?")
    chat.press("Remove notes.md")
    first.get_by_role("button", name="Ask", exact=True).click()
    expect(chat.answer(1)).to_contain_text("[] No page at all?")
    expect(chat.answer(1).locator(".left-out")).to_have_count(0)


def test_a_picture_is_taught_a_name_and_a_wrong_answer_put_right(
    chat: ChatPage, server: FakeServer
) -> None:
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask("What is it?")
    chat.answer(1)
    chat.press("Teach sheep.jpg")
    dialog = chat.page.locator("dialog.teach")
    assert Axe().run(chat.page).response["violations"] == []
    dialog.get_by_label("Its name").fill(" ")
    dialog.get_by_role("button", name="Teach the name").click()
    expect(dialog.locator(".problem")).to_contain_text("expected 1 to 60 printable characters")
    dialog.get_by_label("Its name").fill("Dolly")
    dialog.locator("input[type=file]").set_input_files(str(EXAMPLES / "coffee.jpg"))
    expect(dialog.locator(".chip[data-kind=image]")).to_be_visible()
    dialog.get_by_role("button", name="Teach the name").click()
    expect(dialog).to_be_hidden()
    expect(chat.page.locator(".quiet")).to_have_text("Dolly is taught.")
    taught = httpx.get(f"{server.url}/v1/teach", trust_env=False).json()["data"]
    (dolly,) = (one for one in taught if one["name"] == "Dolly")
    assert (dolly["examples"], dolly["corrections"][0]["turn"]) == (2, 1)
