"""Take the pictures of the page that are in this folder.

python -m docs.screenshots.take               # needs Debian's chromium
"""

import os
import shutil
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from mico_chat.media.kinds import KINDS, Kind
from mico_ui.browser.app import create_app
from mico_ui.browser.visitor import Access
from mico_ui.local_server import local_server
from tests.server.support.running import live
from tests.ui.live import FakeServer
from tests.ui.test_talk_in_browser import MICROPHONE, speech

FOLDER = Path(__file__).parent
EXAMPLES = FOLDER.parents[1] / "tests" / "support" / "media"
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
WAIT_MS = 60_000


def main() -> None:
    os.environ["MICO_DEPTH_MODEL"] = "mini"  # of the server
    with (
        TemporaryDirectory() as data,
        local_server(["--model", "mini", "--data-dir", data]) as (api, secret),
        live(create_app(api, Access(secret=secret)), lifespan="on") as client,
        sync_playwright() as playwright,
    ):
        url = str(client.base_url)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        everything(browser, url, "")
        everything(browser, url, "phone-", viewport=PHONE, has_touch=True)
        with page(browser, url, color_scheme="dark") as shown:
            example(shown, "Do the picture and the sound belong together?")
            take(shown, "dark")
        with page(browser, url, viewport=PHONE, has_touch=True, color_scheme="dark") as shown:
            example(shown, "What colour is it?")
            take(shown, "phone-dark")
        talking(browser, url)
        several_models(browser)
        browser.close()


def several_models(browser: Browser) -> None:
    """The picker and the attach menu, before stand-ins that have the names of other models."""
    models: dict[str, Sequence[Kind]] = {
        "mini": KINDS,
        "Qwen/Qwen2.5-Omni-3B": ("image", "audio", "video"),
        "Qwen/Qwen2-Audio-7B-Instruct": ("audio",),
    }
    with TemporaryDirectory() as data:
        server = FakeServer(Path(data), models)
        try:
            with live(create_app(server.url), lifespan="on") as client:
                url = str(client.base_url)
                for prefix, viewport in (("", DESKTOP), ("phone-", PHONE)):
                    with page(browser, url, viewport=viewport) as shown:
                        expect(shown.locator(".example img").first).to_be_visible(timeout=WAIT_MS)
                        choose(shown, "Qwen/Qwen2-Audio-7B-Instruct")
                        shown.locator(".picker summary").click()
                        take(shown, f"{prefix}picker")
                        shown.keyboard.press("Escape")
                        shown.get_by_label("Add files").first.click()
                        take(shown, f"{prefix}attach-menu")
        finally:
            server.kill()


CAMERA = """async (photo) => {
    const picture = Object.assign(new Image(), { src: photo });
    await picture.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: 640, height: 427 });
    const ask = navigator.mediaDevices.getUserMedia;
    setInterval(() => canvas.getContext("2d").drawImage(picture, 0, 0, 640, 427), 100);
    navigator.mediaDevices.getUserMedia = (wanted) =>
        wanted.audio ? ask(wanted) : Promise.resolve(canvas.captureStream(10));
}"""


def talking(browser: Browser, url: str) -> None:
    """A question that is spoken, about what the camera sees."""
    photo = b64encode((EXAMPLES / "coffee.jpg").read_bytes()).decode()
    with page(browser, url) as shown:
        shown.evaluate(MICROPHONE)
        shown.evaluate(CAMERA, f"data:image/jpeg;base64,{photo}")
        shown.get_by_role("button", name="Talk", exact=True).click()
        expect(shown.locator(".state")).to_have_text("Listening", timeout=WAIT_MS)
        shown.get_by_role("button", name="Use the camera").click()
        shown.evaluate("sound => speak(sound)", b64encode(speech("What is it?")).decode())
        expect(shown.locator(".captions .it")).to_be_visible(timeout=WAIT_MS)
        expect(shown.locator(".state")).to_have_text("Listening", timeout=WAIT_MS)
        take(shown, "talk")


def choose(shown: Page, model: str) -> None:
    shown.locator(".picker summary").click()
    shown.locator(".picker .menu-list button").filter(has_text=model).click()


def everything(browser: Browser, url: str, prefix: str, **context: Any) -> None:
    """The page from its beginning to a broken file, at one width."""
    with page(browser, url, **context) as shown:
        expect(shown.locator(".example img").first).to_be_visible(timeout=WAIT_MS)
        take(shown, f"{prefix}welcome")
        attach(shown, "sheep.jpg", "snare-drum.flac", "dragon.mp4", "near.depth.png")
        message = shown.get_by_label("Message", exact=True)
        message.fill("What do you see and hear?")
        expect(shown.locator(".meter")).to_contain_text("tokens", timeout=WAIT_MS)
        take(shown, f"{prefix}attached")
        message.press("Enter")
        report(shown)
        take(shown, f"{prefix}report")
        compare(shown)
        take(shown, f"{prefix}compare")
        refuse(shown)
        take(shown, f"{prefix}refused")
    with page(browser, url, **context) as shown:
        example(shown, "What is in this photograph?")
        shown.locator(".log").evaluate("element => element.scrollTo(0, 0)")
        take(shown, f"{prefix}answer")
    explained(browser, url, prefix, **context)
    with page(browser, url, **context) as shown:
        attach(shown, "coffee.jpg")
        shown.get_by_role("button", name="Estimate the depth of coffee.jpg").click()
        expect(shown.locator(".chip[data-kind=depth] img")).to_be_visible(timeout=WAIT_MS)
        shown.get_by_label("Message", exact=True).fill("How far is it?")
        shown.get_by_label("Message", exact=True).press("Enter")
        report(shown)
        take(shown, f"{prefix}depth")


def explained(browser: Browser, url: str, prefix: str, **context: Any) -> None:
    """Which medium made an answer."""
    with page(browser, url, **context) as shown:
        example(shown, "Do the picture and the sound belong together?")
        shown.get_by_role("button", name="Which medium made this answer?").click()
        rests = shown.locator(".why .rests")
        rests.wait_for(timeout=WAIT_MS)
        rests.scroll_into_view_if_needed()
        take(shown, f"{prefix}why")


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


def example(shown: Page, question: str) -> None:
    shown.get_by_role("button", name=question).click()
    report(shown)


def report(shown: Page) -> None:
    """Open the report of the first answer, once the answer is whole."""
    answer = shown.locator(".turn:nth-child(1) .answer[aria-busy=false]")
    expect(answer).to_be_visible(timeout=WAIT_MS)
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
    half = (EXAMPLES / "sheep.jpg").read_bytes()[:900]
    broken: Any = {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": half}
    shown.locator(".composer input[type=file]").set_input_files([broken])
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
    main()
