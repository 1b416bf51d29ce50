"""What the tests share: a service with a fake assistant, and the processes that browsers need.

Two pages serve all tests in a browser: one in front of a fake assistant, whose answers the tests
hold and let go on, and one in front of the mini.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mico_ui.client import Client
from tests.fakes import FakeAssistant
from tests.ui.live import Command, FakeServer, MiniSite
from tests.ui.served import served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.ui.chat_page import ChatPage

OpenPage = Callable[..., "ChatPage"]

EXAMPLES = Path(__file__).parents[2] / "ui" / "mico_ui" / "examples"


@pytest.fixture
def halfway() -> threading.Event:
    """While it is clear, no answer goes on after its first word."""
    event = threading.Event()
    event.set()
    return event


@pytest.fixture
def assistant(halfway: threading.Event) -> FakeAssistant:
    """What a service has in place of a model."""
    return FakeAssistant(halfway=halfway)


@pytest.fixture
def client(tmp_path: Path, assistant: FakeAssistant) -> Iterator[Client]:
    """Of a service with it."""
    with served(tmp_path, assistant) as client:
        yield client


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """The service with the fake assistant, as a process."""
    server = FakeServer(tmp_path_factory.mktemp("served"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(fake_server: FakeServer) -> FakeServer:
    """The service with the fake assistant, whose answers are held by no one yet."""
    fake_server.allow()
    return fake_server


@pytest.fixture(scope="session")
def site(fake_server: FakeServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The page in front of the fake assistant's service."""
    folder = tmp_path_factory.mktemp("page")
    command = Command(folder, "mico_chat.cli ui", "/robots.txt", "--api", fake_server.url)
    command.start()
    yield command
    command.stop()


@pytest.fixture(scope="session")
def mini(base_llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSite]:
    """The page with a server of its own beside it, which has the mini."""
    folder = tmp_path_factory.mktemp("mini")
    site = MiniSite(folder, folder / "data")
    site.start()
    yield site
    site.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser with a camera and a microphone; without one the test is skipped, but not in CI.

    It ends with the module: while Playwright runs, no other test of this thread can run a loop.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        reason = "Chromium is not installed (Debian's package chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    media = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage", *media]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    """Opens the page in a browser of its own, as another user has it.

    A test that is marked with ``base_llm`` has the page in front of the mini, any other test the
    page in front of the fake assistant. Nothing may be fetched from another site on any page, and
    no script may fail.
    """
    from tests.ui.chat_page import ChatPage

    if request.node.get_closest_marker("base_llm"):
        site: Command = request.getfixturevalue("mini")
    else:
        request.getfixturevalue("server")
        site = request.getfixturevalue("site")
    opened: list[ChatPage] = []

    def open_one(settings: dict[str, Any] | None = None, **context: Any) -> ChatPage:
        view = {"viewport": {"width": 1280, "height": 800}, **context}
        page = ChatPage(chromium.new_context(**view).new_page(), site.url)
        opened.append(page)
        page.open(settings)
        return page

    yield open_one
    for page in opened:
        page.page.context.close()
    assert [trouble for page in opened for trouble in page.trouble] == []


@pytest.fixture
def chat(open_page: OpenPage) -> ChatPage:
    """The page, opened for the first time."""
    return open_page()
