"""What the tests share: a service with a fake assistant, and the processes that browsers need.

Two pages serve all tests in a browser: one in front of a fake assistant, whose answers the tests
hold and let go on, and one in front of the mini.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageDraw

from mico_chat.media.kinds import KINDS
from mico_chat.wire import MediaList, MediaObject
from mico_server.settings import ServerSettings
from mico_ui.client import Client
from mico_ui.routes import Call, read_as
from tests.server.support.running import running, wait_until_ready
from tests.support.fakes import FakeAssistant
from tests.ui.live import Command, FakeServer, MiniSite

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.ui.chat_page import ChatPage

OpenPage = Callable[..., "ChatPage"]

EXAMPLES = Path(__file__).parents[1] / "support" / "media"


@contextmanager
def served(folder: Path, assistant: FakeAssistant) -> Iterator[Client]:
    """A client of a service whose data are in ``folder``, while the block runs."""
    settings = ServerSettings(data_dir=folder / "data")
    with running(lambda: assistant, settings) as http:
        wait_until_ready(http)
        with Client(str(http.base_url)) as client:
            yield client


def stored_media(client: Client) -> list[MediaObject]:
    """The media that the service stores, the newest first."""
    return client.send(Call("GET", "/v1/media", read_as(MediaList))).data


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red circle.png"
    image = Image.new("RGB", (224, 224), (255, 255, 255))
    ImageDraw.Draw(image).ellipse((40, 40, 184, 184), fill=(220, 20, 20))
    image.save(path)
    return path


@pytest.fixture
def halfway() -> threading.Event:
    """While it is clear, no answer goes on after its first word."""
    event = threading.Event()
    event.set()
    return event


@pytest.fixture
def assistant(halfway: threading.Event) -> FakeAssistant:
    return FakeAssistant(halfway=halfway)


@pytest.fixture
def client(tmp_path: Path, assistant: FakeAssistant) -> Iterator[Client]:
    with served(tmp_path, assistant) as client:
        yield client


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    server = FakeServer(tmp_path_factory.mktemp("served"))
    yield server
    server.kill()


@pytest.fixture
def server(fake_server: FakeServer) -> FakeServer:
    fake_server.allow()
    return fake_server


@pytest.fixture(scope="session")
def site(fake_server: FakeServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    command = Command(tmp_path_factory.mktemp("page"), "/robots.txt", "--api", fake_server.url)
    yield command
    command.stop()


@pytest.fixture(scope="module")
def two_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """``fake`` reads everything, ``ear`` hears alone, and ``reader`` reads text alone."""
    models = {"fake": KINDS, "ear": ("audio",), "reader": ()}
    server = FakeServer(tmp_path_factory.mktemp("two"), models)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def two_models(
    two_server: FakeServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Command]:
    """The page in front of them."""
    folder = tmp_path_factory.mktemp("two-page")
    command = Command(folder, "/robots.txt", "--api", two_server.url)
    yield command
    command.stop()


@pytest.fixture(scope="session")
def mini(base_llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSite]:
    """The page with a server of its own, which has the mini."""
    folder = tmp_path_factory.mktemp("mini")
    site = MiniSite(folder, folder / "data")
    yield site
    site.stop()


@pytest.fixture(scope="module")
def microphone() -> list[str]:
    """A browser's arguments that say what is heard: without them, beeps."""
    return []


@pytest.fixture(scope="module")
def chromium(microphone: list[str]) -> Iterator[Browser]:
    """A browser with a camera and a microphone; without one the test is skipped, but not in CI.

    It ends with the module: while Playwright runs, no other test of this thread can run a loop.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        reason = "Chromium is not installed (Debian's package chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import expect, sync_playwright

    media = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", *microphone]
    with sync_playwright() as playwright:
        expect.set_options(timeout=300_000)  # a busy machine answers slowly
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage", *media]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    """Opens the page in a browser of its own, as another user has it, or with ``home`` in one more
    browser of the person at this machine.

    A test that is marked with ``base_llm`` has the page in front of the mini, one that is marked
    with ``two_models`` in front of those, any other test in front of the fake assistant. No page
    fetches from another site, and no script fails.
    """
    from playwright.sync_api import expect

    from tests.ui.chat_page import DESK, OTHERS, ChatPage

    if request.node.get_closest_marker("base_llm"):
        site: Command = request.getfixturevalue("mini")
    elif request.node.get_closest_marker("two_models"):
        site = request.getfixturevalue("two_models")
    else:
        request.getfixturevalue("server")
        site = request.getfixturevalue("site")
    opened: list[ChatPage] = []

    def open_one(*, wait: bool = True, home: bool = False, **context: Any) -> ChatPage:
        # Playwright waits for functions by `eval`, which the page's policy forbids.
        chosen = {**DESK, "bypass_csp": True, **({} if home else OTHERS), **context}
        page = ChatPage(chromium.new_context(**chosen).new_page(), site.url)
        page.page.set_default_timeout(300_000)
        opened.append(page)
        page.page.goto(site.url)
        if wait:
            expect(page.page.locator(".model")).to_contain_text("tokens")
        return page

    yield open_one
    for page in opened:
        page.page.context.close()
    assert [trouble for page in opened for trouble in page.trouble] == []


@pytest.fixture
def chat(open_page: OpenPage) -> ChatPage:
    return open_page()
