"""The page as a user has it: what can be done on it, by the words and roles that users meet."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
# A page behind a proxy cannot know whether two browsers are one person's.
OTHERS = {"extra_http_headers": {"x-forwarded-for": "203.0.113.7"}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


class ChatPage:
    """A browser's page. ``trouble`` collects failed scripts, dialogs and foreign requests."""

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

    @property
    def growing(self) -> Locator:
        """The text of the first answer, in progress or not."""
        return self.turns.nth(0).locator(".text")

    @property
    def versions(self) -> Locator:
        """Which version of a turn is shown, as 2/3."""
        return self.page.locator(".versions > span")

    @property
    def banner(self) -> Locator:
        return self.page.locator(".banner")

    def problem(self, turn: int) -> Locator:
        return self.answer(turn).locator(".problem")

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button).click()

    def open_anew(self) -> None:
        """Close the page, and open it with no conversation in its address."""
        self.page.goto(f"{self.url}/robots.txt")
        self.page.goto(self.url)

    def edit(self, text: str) -> Locator:
        """Write another text for the first question, and give the box of that text."""
        self.turns.nth(0).get_by_role("button", name="Edit the question").click()
        box = self.page.get_by_label("Edit the question").last
        box.fill(text)
        return box

    def expect_stopped(self, note: str = "Stopped.", *, turn: int = 1) -> None:
        expect(self.answer(turn).locator(".note")).to_have_text(note)

    def attach(self, *files: Path) -> None:
        """Add files, and wait until the server has them."""
        before = self.chips.count()
        self.page.locator(".composer input[type=file]").set_input_files([str(f) for f in files])
        expect(self.chips).to_have_count(before + len(files))

    def ask(self, text: str) -> None:
        self.message.fill(text)
        self.message.press("Enter")

    def answer(self, turn: int) -> Locator:
        """The answer of a turn, from 1, once it has ended."""
        answer = self.turns.nth(turn - 1).locator(".answer[aria-busy=false]")
        expect(answer).to_be_visible()
        return answer

    def text(self, turn: int) -> str:
        return self.answer(turn).locator(".text").inner_text()

    def confirm(self, action: str) -> None:
        self.page.locator("dialog.confirm").get_by_role("button", name=action).click()

    def choose(self, title: str, action: str) -> None:
        self.page.get_by_label(f"More about {title}").click()
        self.page.get_by_role("button", name=action, exact=True).click()
