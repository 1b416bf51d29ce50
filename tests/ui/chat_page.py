"""The page as a user has it: what can be done on it, by the words and roles that users meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

ANSWER_MS = 60_000
"""A busy machine answers slowly; nothing here measures by the clock."""

DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


class ChatPage:
    """A browser's page; ``trouble`` collects what must never happen on it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.trouble: list[str] = []
        page.on("pageerror", lambda error: self.trouble.append(f"script: {error}"))
        page.on("dialog", lambda dialog: self.trouble.append(f"dialog: {dialog.message}"))
        page.on("request", self._check_request)

    def _check_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.trouble.append(f"fetched from another site: {request.url}")

    def open(self, settings: dict[str, Any] | None = None) -> None:
        """Open it, as a browser that has these settings."""
        if settings is not None:
            script = "settings => localStorage.setItem('mico-settings', JSON.stringify(settings))"
            self.page.goto(f"{self.url}/robots.txt")  # of the same origin, and nothing else
            self.page.evaluate(script, settings)
        self.page.goto(self.url)
        expect(self.page.locator(".model")).to_contain_text("tokens", timeout=ANSWER_MS)

    @property
    def message(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def turns(self) -> Locator:
        return self.page.locator(".turn")

    @property
    def chips(self) -> Locator:
        return self.page.locator(".composer .chip[data-kind]")

    @property
    def conversations(self) -> Locator:
        return self.page.locator(".conversations .open")

    def attach(self, *files: Path) -> None:
        """Add files that the server takes, and wait until it has."""
        before = self.chips.count()
        self.page.locator(".composer input[type=file]").set_input_files([str(f) for f in files])
        expect(self.chips).to_have_count(before + len(files), timeout=ANSWER_MS)

    def ask(self, text: str) -> None:
        """Write a question and send it."""
        self.message.fill(text)
        self.message.press("Enter")

    def answer(self, turn: int) -> Locator:
        """The answer of a turn, from 1, once it has ended."""
        answer = self.turns.nth(turn - 1).locator(".answer[aria-busy=false]")
        expect(answer).to_be_visible(timeout=ANSWER_MS)
        return answer

    def text(self, turn: int) -> str:
        """What was answered in a turn."""
        return self.answer(turn).locator(".text").inner_text()

    def confirm(self, action: str) -> None:
        """Say yes to the question that is shown."""
        self.page.locator("dialog.confirm").get_by_role("button", name=action).click()

    def choose(self, title: str, action: str) -> None:
        """An action of a conversation in the list."""
        self.page.get_by_label(f"More about {title}").click()
        self.page.get_by_role("button", name=action, exact=True).click()
