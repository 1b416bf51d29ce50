"""Keys as who sits at the page meets them: at the machine itself, and through a proxy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import expect

from tests.server.running import new_key
from tests.ui.chat_page import ANSWER_MS, ChatPage
from tests.ui.live import MiniSite

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.base_llm]

DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
PROXIED: dict[str, Any] = {"extra_http_headers": {"x-forwarded-for": "203.0.113.7"}}


def make_key(mini: MiniSite) -> str:
    """The secret of a new key. Playwright has the loop of this thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(new_key, mini.data, "me").result()


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


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_who_comes_through_a_proxy_is_asked_for_a_key(
    mini: MiniSite, chromium: Browser, size: dict[str, Any]
) -> None:
    key = make_key(mini)
    chat = ChatPage(chromium.new_context(**size, **PROXIED).new_page(), mini.url)
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
