"""The page in Firefox, by WebDriver BiDi: Playwright sends commands that Debian's Firefox lacks."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import PATIENCE_S, until
from tests.ui.conftest import EXAMPLES
from tests.ui.live import Command, FakeServer

connect = pytest.importorskip("websockets.sync.client").connect

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ENTER = "\ue007"


class Firefox:
    """One page. ``trouble`` has the errors of its scripts."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._ids = socket, itertools.count()
        self.trouble: list[str] = []
        self.send("session.new", capabilities={})
        self.send("session.subscribe", events=["log.entryAdded"])
        self._page = self.send("browsingContext.getTree")["contexts"][0]["context"]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (said := json.loads(self._socket.recv(PATIENCE_S))).get("id") != number:
            if said.get("params", {}).get("level") == "error":
                self.trouble.append(said["params"]["text"])
        assert said["type"] == "success", said
        found: dict[str, Any] = said["result"]
        return found

    def open(self, url: str) -> None:
        self.send("browsingContext.navigate", context=self._page, url=url, wait="complete")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        target = {"context": self._page}
        found = self.send("script.evaluate", expression=script, target=target, awaitPromise=True)
        assert found["type"] == "success", found
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        until(lambda: self.run(script), pause_s=0.1)

    def attach(self, selector: str, file: Path) -> None:
        where = {"type": "css", "value": selector}
        found = self.send("browsingContext.locateNodes", context=self._page, locator=where)
        element = {"sharedId": found["nodes"][0]["sharedId"]}
        self.send("input.setFiles", context=self._page, element=element, files=[str(file)])

    def type(self, selector: str, text: str) -> None:
        """Press the keys of a text, in the place of what is written there."""
        self.run(f"document.querySelector('{selector}').select()")
        ways = ("keyDown", "keyUp")
        keys = [{"type": way, "value": letter} for letter in text for way in ways]
        presses = {"type": "key", "id": "keys", "actions": keys}
        self.send("input.performActions", context=self._page, actions=[presses])


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Firefox]:
    path = shutil.which("firefox-esr") or shutil.which("firefox")
    if path is None:
        pytest.skip("Firefox is not installed (Debian's package firefox-esr)")
    command = [path, "--headless", "--no-remote", "--remote-debugging-port=0", "--profile"]
    log = tmp_path / "log"
    with log.open("wb") as said:
        process = subprocess.Popen([*command, str(tmp_path)], stdout=said, stderr=said)
    try:
        listening = re.compile(r"BiDi listening on (ws://\S+)\n")
        (url,) = until(lambda: listening.findall(log.read_text(errors="replace")), pause_s=0.1)
        with connect(f"{url}/session", max_size=None, proxy=None) as socket:
            yield Firefox(socket)
    finally:
        process.kill()
        process.wait()


def test_a_picture_is_asked_about_and_the_question_changed(
    firefox: Firefox, site: Command, server: FakeServer
) -> None:
    firefox.open(site.url)
    firefox.wait("Boolean(window.mico?.begun && mico.model())")
    firefox.attach(".composer input[type=file]", EXAMPLES / "sheep.jpg")
    firefox.wait("Boolean(document.querySelector('.composer .chip[data-kind=image] img'))")
    firefox.type("#mico-message", "What is it?" + ENTER)
    answer = "document.querySelector('.answer[aria-busy=false] .text')?.innerText"
    firefox.wait(f"{answer} === '[image sheep.jpg] What is it?'")
    firefox.run("document.querySelector('[aria-label=\"Edit the question\"]').click()")
    firefox.type(".editing textarea", "And this?" + ENTER)
    firefox.wait(f"{answer} === '[image sheep.jpg] And this?'")
    firefox.wait("document.querySelector('.versions > span')?.innerText === '2/2'")
    assert firefox.trouble == []
