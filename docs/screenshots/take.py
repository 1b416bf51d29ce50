"""Take the pictures of the page that are in this folder.

    python -m docs.screenshots.take               # needs Debian's chromium

The page and its server run in this process, so that an answer waits until Stop is pressed.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from mico_chat.assistant import Assistant
from mico_chat.load import load_assistant
from mico_chat.media import MediaDecoder
from mico_server.app import create_app
from mico_server.settings import ServerSettings
from mico_ui.browser.app import create_app as create_page
from tests.server.running import live

FOLDER = Path(__file__).parent
EXAMPLES = FOLDER.parents[1] / "ui" / "mico_ui" / "examples"
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
WAIT_MS = 60_000
N_PIECES = 12  # of an answer that is stopped
WORDS = re.compile(r"\w+ \w+ \w+")

going_on = threading.Event()
"""While it is clear, an answer waits after N_PIECES of its pieces."""


def held(stream: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., Any]:
    """``Assistant.stream`` with answers that can be held."""

    async def holding(*arguments: Any, **named: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(stream(*arguments, **named)) as pieces:
            n = 0
            async for piece in pieces:
                yield piece
                n += 1
                while n > N_PIECES and not going_on.is_set():
                    await asyncio.sleep(0.05)

    return holding


@contextmanager
def served() -> Iterator[str]:
    """The address of a page whose server has the mini."""

    def load() -> Assistant:
        assistant = load_assistant("mini", decoder)
        assistant.stream = held(assistant.stream)  # type: ignore[method-assign]
        return assistant

    with TemporaryDirectory() as data, MediaDecoder() as decoder:
        app = create_app(load, ServerSettings(data_dir=Path(data)))
        with live(app, lifespan="on") as server:
            page = create_page(str(server.base_url))
            with live(page, lifespan="on") as client:
                yield str(client.base_url)


def main(url: str) -> None:
    going_on.set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        everything(browser, url, "")
        everything(browser, url, "phone-", viewport=PHONE, has_touch=True)
        with page(browser, url, color_scheme="dark") as shown:
            example(shown, "What do you see and what do you hear?")
            report(shown)
            take(shown, "dark")
        with page(browser, url, viewport=PHONE, has_touch=True, color_scheme="dark") as shown:
            example(shown, "Which way is the dragon going?")
            report(shown)
            take(shown, "phone-dark")
        browser.close()


def everything(browser: Browser, url: str, prefix: str, **context: Any) -> None:
    """The page from its beginning to a broken file, at one width."""
    with page(browser, url, **context) as shown:
        expect(shown.locator(".example img").first).to_be_visible(timeout=WAIT_MS)
        take(shown, f"{prefix}welcome")
        attach(shown, "sheep.jpg", "snare-drum.flac", "dragon.mp4", "near.depth.png")
        ask(shown, "What do you see and hear?", send=False)
        take(shown, f"{prefix}attached")
        shown.get_by_label("Message", exact=True).press("Enter")
        answered(shown, 1)
        report(shown)
        take(shown, f"{prefix}report")
        going_on.clear()
        ask(shown, "Tell me a long story about a sheep.")
        expect(shown.locator(".turn:nth-child(2) .text")).to_contain_text(WORDS, timeout=WAIT_MS)
        shown.get_by_role("button", name="Stop").click()
        answered(shown, 2)
        going_on.set()
        take(shown, f"{prefix}stopped")
        compare(shown)
        take(shown, f"{prefix}compare")
        refuse(shown)
        take(shown, f"{prefix}refused")
    with page(browser, url, **context) as shown:
        example(shown, "What is in this photograph?")
        report(shown)
        shown.locator(".log").evaluate("element => element.scrollTo(0, 0)")
        take(shown, f"{prefix}answer")


@contextmanager
def page(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    with browser.new_context(**{"viewport": DESKTOP, **context}) as made:
        shown = made.new_page()
        shown.goto(url)
        expect(shown.locator(".model")).to_contain_text("tokens", timeout=WAIT_MS)
        yield shown


def attach(shown: Page, *names: str) -> None:
    files = [str(EXAMPLES / name) for name in names]
    shown.locator(".composer input[type=file]").set_input_files(files)
    expect(shown.locator(".composer .chip[data-kind]")).to_have_count(len(names), timeout=WAIT_MS)


def ask(shown: Page, question: str, *, send: bool = True) -> None:
    shown.get_by_label("Message", exact=True).fill(question)
    expect(shown.locator(".meter")).to_contain_text("tokens", timeout=WAIT_MS)
    if send:
        shown.get_by_label("Message", exact=True).press("Enter")


def example(shown: Page, question: str) -> None:
    shown.get_by_role("button", name=question).click()
    answered(shown, 1)


def answered(shown: Page, turn: int) -> None:
    answer = shown.locator(f".turn:nth-child({turn}) .answer[aria-busy=false]")
    expect(answer).to_be_visible(timeout=WAIT_MS)


def report(shown: Page) -> None:
    shown.locator("details.report summary").last.click()
    expect(shown.locator(".report img").first).to_be_visible(timeout=WAIT_MS)
    shown.locator(".answer").last.evaluate("element => element.scrollIntoView()")
    shown.wait_for_timeout(300)


def compare(shown: Page) -> None:
    shown.get_by_role("tab", name="Compare").click()
    shown.get_by_role("button", name="Show me an example").click()
    expect(shown.locator(".grid table")).to_be_visible(timeout=WAIT_MS)
    shown.locator(".caution").evaluate("element => element.scrollIntoView()")


def refuse(shown: Page) -> None:
    shown.get_by_role("tab", name="Chat").click()
    broken = {"name": "broken.jpg", "mimeType": "image/jpeg"}
    half = (EXAMPLES / "sheep.jpg").read_bytes()[:900]
    shown.locator(".composer input[type=file]").set_input_files([{**broken, "buffer": half}])
    expect(shown.locator(".chips-problem").first).to_contain_text("damaged", timeout=WAIT_MS)


def take(shown: Page, name: str) -> None:
    """A picture of few colours: these pages have few, and a repository keeps all of them."""
    path = FOLDER / f"{name}.png"
    shown.mouse.move(0, 0)
    shown.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
        path, optimize=True
    )
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    with served() as url:
        main(url)
