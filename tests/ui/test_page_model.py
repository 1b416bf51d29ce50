"""Two tabs of one browser do what comes to their mind, and the server is killed in between.

Each answer that a tab has shown to its end stays in the store until a tab deletes it, and in the
end both tabs show what is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import httpx
import pytest

pytest.importorskip("playwright.sync_api")

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from playwright.sync_api import expect

from tests.support.waiting import until
from tests.ui.chat_page import ChatPage
from tests.ui.conftest import OpenPage
from tests.ui.live import FakeServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# The first is what hypothesis begins with.
ACTIONS = ["begin", "stop", "rename", "drop", "reload", "kill"]
ACTIONS += ["edit", "again", "choose", "delete", "open"] * 2 + ["ask"] * 4
SHOWN = "mico.chat.turns.map(({ view }) => [view.turn, view.state, view.message, view.answer])"
LOADS = """() => {
  if (mico.loads !== undefined) return;
  const { call } = mico;
  mico.loads = 0; // calls under way whose answer may show another path than the one that is shown
  mico.call = async (name, data) => {
    const loads = ["open", "choose", "delete_turns"].includes(name);
    mico.loads += loads;
    try {
      return await call(name, data);
    } finally {
      setTimeout(() => (mico.loads -= loads)); // the page has drawn it then
    }
  };
}"""
NUMBERS = itertools.count(1)

Turns = dict[int, dict[str, Any]]


class Tabs(RuleBasedStateMachine):
    open_page: ClassVar[OpenPage]
    server: ClassVar[FakeServer]
    actions: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        first = type(self).open_page()
        self.tabs = [first, ChatPage(first.page.context.new_page(), first.url)]
        self.tabs[1].page.set_default_timeout(300_000)
        self.tabs[1].page.goto(first.url)
        user = first.page.evaluate("mico.profile().user")
        self.http = httpx.Client(base_url=self.server.url, trust_env=False, timeout=300)
        self.http.headers["x-mico-browser"] = user
        self.kept: dict[tuple[str, int], tuple[str, str]] = {}
        self.parents: dict[str, int | None] = {}

    def teardown(self) -> None:
        try:
            self._check()
            for tab in self.tabs:
                tab.page.reload()
                tab.page.wait_for_function("mico.begun")
            self._check()
            assert [trouble for tab in self.tabs for trouble in tab.trouble] == []
        finally:
            self.http.close()
            self.tabs[0].page.context.close()

    @rule(do=st.sampled_from(ACTIONS), at=st.integers(0, 1), which=st.integers(0, 99))
    def act(self, do: str, at: int, which: int) -> None:
        type(self).actions += 1
        tab = self.tabs[at]
        tab.page.bring_to_front()  # Chromium draws what is behind once a second
        tab.page.evaluate(LOADS)
        shown = tab.page.evaluate(SHOWN)
        if do in ("edit", "again", "choose", "delete") and not shown:
            do = "ask"
        act: Callable[[ChatPage, int], None] = getattr(self, f"_{do}")
        act(tab, which % max(len(shown), 1))
        self._learn(tab)
        self._agree()

    def _question(self, parent: int | None, before: str = "") -> str:
        """A new question, which follows what its tab shows, whatever another tab does meanwhile."""
        message = f"{before}q{next(NUMBERS)}"
        self.parents[message] = parent
        return message

    def _last(self, tab: ChatPage) -> int | None:
        shown: list[Any] = tab.page.evaluate(SHOWN)
        return shown[-1][0] if shown else 0

    def _ask(self, tab: ChatPage, turn: int) -> None:
        tab.ask(self._question(self._last(tab)))

    def _edit(self, tab: ChatPage, turn: int) -> None:
        parent = tab.page.evaluate("mico.chat.turns.map(({ view }) => view.parent)")[turn]
        tab.turns.nth(turn).get_by_role("button", name="Edit the question").click()
        tab.page.locator(".editing textarea").fill(self._question(parent))
        tab.page.locator(".editing").get_by_role("button", name="Ask").click()

    def _again(self, tab: ChatPage, turn: int) -> None:
        tab.turns.nth(turn).get_by_role("button", name="gain").click()

    def _choose(self, tab: ChatPage, turn: int) -> None:
        ways = tab.page.locator(".version:enabled")
        if ways.count():
            ways.nth(turn % ways.count()).click()

    def _delete(self, tab: ChatPage, turn: int) -> None:
        (number, state, *_), id_ = tab.page.evaluate(f"[{SHOWN}[{turn}], mico.chat.id]")
        stored = self._stored(id_)
        gone = {number} & set(stored)
        for one in sorted(stored):
            gone |= {one} if stored[one]["parent"] in gone else set()
        tab.turns.nth(turn).get_by_role("button", name="Delete from here").click()
        if number is None or state == "error":
            tab.confirm("Delete")  # the server does not have it
            return
        with tab.page.expect_response(lambda it: "delete_turns" in (it.request.post_data or "")):
            tab.confirm("Delete")
        left = set(self._stored(id_))
        assert gone.isdisjoint(left) or gone <= left
        for one in gone - left:
            self.kept.pop((id_, one), None)

    def _open(self, tab: ChatPage, turn: int) -> None:
        """The chat that the other tab shows."""
        (other,) = (one for one in self.tabs if one is not tab)
        chat = "mico.chat.turns.some(({ view }) => view.turn) ? mico.chat.id : null"
        if id_ := other.page.evaluate(chat):
            tab.page.locator(f'.conversations [data-id="{id_}"] .open').click()

    def _begin(self, tab: ChatPage, turn: int) -> None:
        tab.page.locator("[data-do=new-chat]:visible").first.click()

    def _stop(self, tab: ChatPage, turn: int) -> None:
        self.server.allow(1)
        tab.ask(self._question(self._last(tab), "stopped "))
        expect(tab.turns.last.locator(".text")).to_have_text("[]")
        tab.page.get_by_label("Stop", exact=True).click()
        expect(tab.turns.last.locator(".note")).to_have_text("Stopped.")
        self.server.allow()
        tab.page.wait_for_function("!mico.isAnswering()")
        assert self._last(tab), "the part that was shown is stored"

    def _rename(self, tab: ChatPage, turn: int) -> None:
        change = "{ id: mico.chat.id, changes: { title: 'New' } }"
        stored = "mico.chat.turns.some(({ view }) => view.turn)"
        tab.page.evaluate(f"{stored} && mico.call('change', {change})")

    def _drop(self, tab: ChatPage, turn: int) -> None:
        """Delete the whole chat."""
        if id_ := tab.page.evaluate("mico.chat.id"):
            tab.page.evaluate("id => mico.call('delete', { id })", id_)
            self.kept = {place: said for place, said in self.kept.items() if place[0] != id_}
            tab.page.evaluate("mico.showConversation(null)")

    def _reload(self, tab: ChatPage, turn: int) -> None:
        tab.page.reload()
        tab.page.wait_for_function("mico.begun")

    def _kill(self, tab: ChatPage, turn: int) -> None:
        self.server.kill()
        self.server.start()
        for one in self.tabs:
            one.page.evaluate("mico.check()")
            expect(one.banner).to_be_hidden()

    # --- what is stored, and what is shown ---

    def _stored(self, id_: str | None, turn: int | None = None) -> Turns:
        """The turns of a chat by their numbers: all, or those of the path through a turn."""
        path = "all_versions=true" if turn is None else f"turn={turn}"
        found = self.http.get(f"/v1/conversations/{id_}?{path}")
        turns = found.json()["turns"] if found.status_code == 200 else []
        return {one["turn"]: one for one in turns}

    def _learn(self, tab: ChatPage) -> None:
        """Wait until the tab neither answers nor loads; what it shows then may not get lost."""
        tab.page.wait_for_function("mico.begun && !mico.isAnswering() && !mico.loads")
        id_, shown = tab.page.evaluate(f"[mico.chat.id, {SHOWN}]")  # of one chat, at one time
        stored = self._stored(id_)
        for one in stored.values():
            parent = self.parents.get(one["message"])
            assert parent in (None, one["parent"]), one
        for number, state, message, answer in shown:
            if state in ("done", "stopped") and number in stored:
                self.kept[id_, number] = message, answer

    def _check(self) -> None:
        for (id_, number), said in self.kept.items():
            found = self._stored(id_)[number]
            assert (found["message"], found["answer"]) == said
        self._agree()

    def _agree(self) -> None:
        for tab in self.tabs:
            tab.page.bring_to_front()
            until(partial(self._agrees, tab), pause_s=0.1)

    def _agrees(self, tab: ChatPage) -> bool:
        """Whether a tab shows a path as it is stored: it learns of changes elsewhere soon."""
        id_ = tab.page.evaluate("mico.chat.id")
        shown = [one for one in tab.page.evaluate(SHOWN) if one[0]]
        if not shown:
            return True
        stored = self._stored(id_, shown[-1][0]).values()
        return [[one[0], *one[2:]] for one in shown] == [
            [one["turn"], one["message"], one["answer"]] for one in stored
        ]


def run(open_page: OpenPage, server: FakeServer, **how: Any) -> None:
    Tabs.open_page, Tabs.server, Tabs.actions = staticmethod(open_page), server, 0
    slow = list(HealthCheck)
    chosen = settings(
        deadline=None, suppress_health_check=slow, database=None, phases=[Phase.generate], **how
    )
    run_state_machine_as_test(Tabs, settings=chosen)


def test_two_tabs_agree(open_page: OpenPage, server: FakeServer) -> None:
    run(open_page, server, max_examples=2, stateful_step_count=20, derandomize=True)


@pytest.mark.soak
def test_two_tabs_agree_after_hundreds_of_actions(open_page: OpenPage, server: FakeServer) -> None:
    run(open_page, server, max_examples=7, stateful_step_count=60)
    assert Tabs.actions >= 400
