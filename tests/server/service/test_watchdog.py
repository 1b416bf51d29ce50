"""A process that does not come on is renewed or ended; the clock is the test's."""

import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.batching import BatchingEngine
from mico_chat.errors import ModelError
from mico_server import watchdog as module
from mico_server.settings import ServerSettings
from mico_server.watchdog import Watchdog
from tests.engine.fake_model import END, FakeModel, ids, joined_letters
from tests.server.support.running import running
from tests.support.fakes import FakeAssistant
from tests.support.tiny import in_loop
from tests.support.waiting import PATIENCE_S


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.0)
    monkeypatch.setattr("mico_server.watchdog.faulthandler.dump_traceback", lambda: None)


class Watched:
    """A watchdog of one model, and what it did."""

    def __init__(self) -> None:
        self.clock, self.did = Clock(), list[str]()
        self.host = SimpleNamespace(name="tiny", step_s=0.0, give_up=self.did.append)
        models: Any = SimpleNamespace(hosts=[self.host])
        self.dog = Watchdog(
            models,
            max_step_s=10,
            renew=lambda reason: self.did.append(f"renew: {reason}"),
            end=lambda: self.did.append("end"),
            clock=self.clock,
        )

    def at(self, seconds: float) -> list[str]:
        self.clock.now = seconds
        self.dog.look()
        return self.did


def test_a_step_that_lasts_too_long_is_given_up_and_the_process_renewed() -> None:
    watched = Watched()
    watched.host.step_s = 20.0
    assert watched.at(0) == []
    watched.host.step_s = 20.5
    gave_up, renewed = watched.at(1)
    assert gave_up == "tiny: a step has lasted 20 s and is given up"
    assert renewed == f"renew: {gave_up}"


def test_an_event_loop_that_stands_still_is_noticed() -> None:
    watched = Watched()
    assert watched.at(1000) == [], "it may take long to start"
    watched.dog.beat()
    assert watched.at(1000 + module.LOOP_S) == []
    (said,) = watched.at(1001 + module.LOOP_S)
    assert said == "renew: the event loop has stood still for 61 s"


def test_a_machine_that_slept_is_given_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    watched.dog.beat()
    monkeypatch.setattr("mico_server.watchdog.time.sleep", lambda seconds: watched.dog.beat())
    assert watched.at(5000) == []


def test_the_process_ends_within_its_time_whatever_runs() -> None:
    watched = Watched()
    watched.dog.beat()
    watched.host.step_s = 1e6
    watched.dog.end_within(9)
    assert watched.at(9) == [], "what runs may end, and nothing is renewed"
    assert watched.at(9.5) == ["end"]


@in_loop
async def test_an_engine_in_a_step_without_end_answers_with_an_error() -> None:
    entered, release = threading.Event(), threading.Event()

    def stuck(_: Any) -> None:
        entered.set()
        release.wait(PATIENCE_S)

    engine = BatchingEngine(FakeModel(before=stuck), joined_letters(), (END,), name="fake")
    answers = engine.generate(Prompt((ids("hi"),)), GenerationOptions(max_tokens=2))
    assert engine.busy_s == 0

    def notice() -> None:
        entered.wait(PATIENCE_S)
        engine.give_up("a step has lasted")

    threading.Thread(target=notice).start()
    with pytest.raises(ModelError, match="a step has lasted"):
        await anext(answers)
    assert engine.busy_s > 0
    with pytest.raises(ModelError, match="a step has lasted"):
        await anext(engine.generate(Prompt((ids("ho"),)), GenerationOptions(max_tokens=2)))
    release.set()
    engine.close()


def test_a_service_whose_step_lasts_too_long_is_not_ready(tmp_path: Path) -> None:
    assistant = FakeAssistant()
    settings = ServerSettings(data_dir=tmp_path, max_step_s=3)
    with running(lambda: assistant, settings) as client:
        assert client.get("/health/ready").status_code == 200
        assistant.engine.busy_s = 4.0  # type: ignore[misc]
        refused = client.get("/health/ready")
        assert refused.status_code == 503
        assert "lasted 4 s, more than 3 (MICO_SERVER_MAX_STEP_S)" in refused.text
        assert client.post("/v1/chat", data={"message": "x"}).status_code == 503
        assert client.get("/health/live").status_code == 200
        assistant.engine.busy_s = 0.0  # type: ignore[misc]
        assert client.post("/v1/chat", data={"message": "x"}).status_code == 200


SERVICE = """
import os, sys, threading
from pathlib import Path
from mico_server import app
from mico_server.settings import read_settings
from tests.support.fakes import FakeAssistant

marker = Path(sys.argv[1])

def load(*_):
    assistant = FakeAssistant(gate=threading.Event())  # it answers nothing
    if not marker.exists():
        marker.touch()
        assistant.engine.busy_s = 1e6
    return assistant

app.load_assistant = load
print(os.getpid(), flush=True)
app.main(read_settings(sys.argv[2:]), lambda line: print(line, flush=True))
"""


def test_a_real_process_is_renewed_and_ends_whatever_runs(tmp_path: Path) -> None:
    """The same process, a new program: it is ready a second time. SIGTERM ends it beside a request
    that never ends.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--data-dir", str(tmp_path / "data"), "--shutdown-timeout-s", "1"]
    command = [sys.executable, "-c", SERVICE, str(tmp_path / "marker"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip() for _ in range(4)]
            assert lines[0] == lines[2] == str(process.pid)
            assert lines[1] == lines[3] == f"mico-chat is ready at http://127.0.0.1:{port}"
            asking = threading.Thread(target=_ask, args=(f"http://127.0.0.1:{port}/v1/chat",))
            asking.start()
            process.terminate()
            assert process.wait(PATIENCE_S) in (0, 1)
            asking.join()
        finally:
            process.kill()


def _ask(url: str) -> None:
    with suppress(httpx.HTTPError):
        httpx.post(url, data={"message": "x"}, timeout=PATIENCE_S)
