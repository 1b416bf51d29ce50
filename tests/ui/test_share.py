"""A chat as one HTML file, as whoever gets it opens it: without a script and without a network."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")

from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page as BrowserPage
from playwright.sync_api import Request, expect

from mico_ui.browser import share
from tests.ui.chat_page import ChatPage
from tests.ui.conftest import EXAMPLES

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = (
    '</title></style><script>window.ran = 1</script><img src="http://127.0.0.1:9/a.png" '
    'onerror="window.ran = 2"> [a](javascript:ran) ![b](http://127.0.0.1:9/b.png) '
    "<meta http-equiv=refresh content=0;url=http://127.0.0.1:9> [c](https://example.com) "
    "$\\frac{1}{2}$ and `code`"
)


def shared(chat: ChatPage, title: str, folder: Path) -> Path:
    with chat.page.expect_download() as saved:
        chat.choose(title, "Share as a page")
    path = folder / saved.value.suggested_filename
    saved.value.save_as(path)
    return path


def opened(chat: ChatPage, path: Path, **context: Any) -> tuple[BrowserPage, list[Request]]:
    """The file in another browser, and what it asks for beside itself."""
    assert chat.page.context.browser is not None
    tab = chat.page.context.browser.new_context(**context).new_page()
    asked: list[Request] = []
    tab.on("request", lambda request: asked.append(request))
    tab.goto(path.as_uri())
    return tab, [one for one in asked if not one.url.startswith(("file:", "data:"))]


def test_a_shared_chat_shows_everything_and_asks_for_nothing(
    chat: ChatPage, tmp_path: Path
) -> None:
    named = tmp_path / "<img src=x onerror=ran=3>.jpg"
    with Image.open(EXAMPLES / "sheep.jpg") as sheep:
        sheep.resize((1600, 1600)).save(named)
    chat.attach(named)  # one after the other: in this order
    for name in ("snare-drum.flac", "dragon.mp4", "near.depth.png"):
        chat.attach(EXAMPLES / name)
    chat.ask("Is it <b>safe</b>?")
    first = chat.text(1)
    chat.ask(HOSTILE)
    chat.answer(2)
    rendered = chat.answer(2).locator(".text")
    path = shared(chat, "Is it <b>safe</b>?", tmp_path)
    assert path.name == "Is-it-b-safe-b.html"
    for scheme in ("light", "dark"):
        tab, asked = opened(chat, path, color_scheme=scheme)
        expect(tab.locator("h1")).to_have_text("Is it <b>safe</b>?")
        expect(tab.locator(".said")).to_have_text(["Is it <b>safe</b>?", HOSTILE])
        expect(tab.locator(".answer .text").first).to_have_text(first)
        assert tab.locator("script, .said *").count() == 0
        # The same as on the page: formulas, code, and no picture of another site.
        ours = tab.locator(".answer .text").nth(1)
        assert ours.inner_text() == rendered.inner_text()
        for part in ("math mfrac", "code"):
            assert ours.locator(part).count() == rendered.locator(part).count() == 1
        assert ours.locator("img, script").count() == 0
        link = ours.locator("a[href='https://example.com']")
        expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
        assert ours.locator("a:not([href^=http])").count() == 0
        # Every picture is there, and what sounds or moves can be played.
        captions = tab.locator("figure figcaption strong")
        names = [named.name, "snare-drum.flac", "dragon.mp4", "near.depth.png"]
        expect(captions).to_have_text(names)
        seen = "() => [...document.images].every((one) => one.complete && one.naturalWidth > 0)"
        tab.wait_for_function(seen)
        assert (
            tab.locator("figure").first.locator("img").evaluate("e => e.naturalWidth")
            == share.PICTURE_SIDE
        )
        for player in ("audio", "video"):
            tab.wait_for_function(f"() => document.querySelector('{player}').duration > 0.5")
        found = Axe().run(tab)
        assert found.violations_count == 0, found.generate_report()
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        tab.emulate_media(media="print")
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(255, 255, 255)"
        assert tab.evaluate("window.ran") is None
        assert asked == []
        tab.context.close()


def test_a_shared_chat_runs_and_fetches_nothing_even_with_markup_in_it(
    chat: ChatPage, tmp_path: Path
) -> None:
    """The policy in the file holds where an escape would be forgotten."""
    chat.ask("One?")
    chat.answer(1)
    path = shared(chat, "One?", tmp_path)
    address = f"{chat.url}/robots.txt"  # it answers
    unsafe = f"""<script src="{address}"></script><script>window.ran = 1</script>
        <img src="{address}" onerror="window.ran = 2"><iframe src="{address}"></iframe>"""
    path.write_text(path.read_text().replace("</main>", unsafe))
    tab, asked = opened(chat, path)
    assert tab.locator("script").count() == 2
    assert tab.evaluate("window.ran") is None
    assert {one.failure for one in asked} == {"csp"}
    tab.context.close()
